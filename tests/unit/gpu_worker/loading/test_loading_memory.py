"""Peak memory of streaming through a checkpoint, measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

REPOSITORY_ROOT = Path(__file__).resolve().parents[4]
NUM_TENSORS = 24
ROWS, COLUMNS = 1024, 2560  # 10 MB as float32: 250 MB in all

# Prints by how many bytes the peak of resident memory (mapped files included) grew while every tensor was read and
# dropped. From /proc, as getrusage's ru_maxrss begins with the peak of the process that started this one.
_STREAM = """
import sys
from pathlib import Path
import torch
from gpu_worker.loading import safetensors_reader
from gpu_worker.loading.checkpoint import open_checkpoint
from gpu_worker.loading.tensor_source import iterate
safetensors_reader.REMAP_AFTER_BYTES = 64 << 20
torch.set_num_threads(1)
checkpoint = open_checkpoint(Path(sys.argv[1]))
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
open("/proc/self/clear_refs", "w").write("5")  # the peak begins at what is resident now
before = peak()
total, largest = 0.0, 0
for name, tensor in iterate(checkpoint):
    total += float(tensor[0, 0])
    tensor.max()  # touches every page
    largest = max(largest, tensor.numel() * tensor.element_size())
print(peak() - before)
"""


def _growth_while_streaming(path: Path) -> int:
    environment = {"PYTHONPATH": str(REPOSITORY_ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", _STREAM, str(path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((ROWS, COLUMNS), dtype=np.float32)


def test_safetensors_are_streamed(tmp_path: Path, values: np.ndarray) -> None:
    half = NUM_TENSORS // 2
    for shard in range(2):
        tensors = {f"t{shard * half + i}": torch.from_numpy(values + i) for i in range(half)}
        save_file(tensors, tmp_path / f"model-{shard + 1:05d}-of-00002.safetensors")
    # one mapping's worth of pages and a tensor, of 250 MB
    assert _growth_while_streaming(tmp_path) < 100 << 20


def test_gguf_is_streamed(tmp_path: Path, values: np.ndarray) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen2")
    writer.add_uint32("qwen2.attention.head_count", 4)
    packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    for layer in range(NUM_TENSORS):
        writer.add_tensor(f"blk.{layer}.ffn_up.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    # A few copies of one tensor of 10 MB while it is decoded, and what the allocator keeps of them (45 to 102 MiB):
    # of 250 MB.
    assert _growth_while_streaming(tmp_path / "m.gguf") < 150 << 20
