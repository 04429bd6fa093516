"""Every family split over pipeline stages: one after the other they compute what the whole model does.

Stages of one process here; `tests/system/test_mixes_over_stages.py` and `test_parallel_serving.py` have processes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType

from gpu_worker.models.loader import read_spec
from gpu_worker.parallel.shares import ParallelContext
from gpu_worker.prepare.preparation import prepare
from gpu_worker.prepare.progress import SilentProgress
from tests.unit.gpu_worker.loading.synthetic_gguf import write_gguf
from tests.unit.gpu_worker.models.tiny_checkpoints import TINY, save_tiny
from tests.unit.gpu_worker.quant.paged_model import QuantizedModel

TOKEN_IDS = [3, 14, 9, 26, 23, 8, 27, 13, 18, 6, 29, 0, 7, 28, 19, 10, 11, 12]
# Stored in one tensor what others store apart, a tied head, windows, heads of two sizes, latent attention, mixtures in
# some layers.
GGUF_KINDS = {"attn_qkv": GGMLQuantizationType.Q8_0, "ffn_up": GGMLQuantizationType.Q5_0}
QUICK = ("phi3", "glm4", "gemma3", "gemma4-moe", "deepseek-v3", "ernie-moe-some-layers")


@torch.inference_mode()
def logits_of(stages: list[QuantizedModel]) -> torch.Tensor:
    """[num_tokens, vocab_size]: a prefill of all but two tokens, then two decodes."""
    found = []
    for start, stop in ((0, 16), (16, 17), (17, 18)):
        received = None
        for stage in stages:
            stage.plan(start, stop)
            token_ids, positions = torch.tensor(TOKEN_IDS[start:stop]), torch.arange(start, stop)
            hidden = stage.model.hidden_states(token_ids, positions, stage.attention, received)
            received = None if stage is stages[-1] else hidden.added()
        found.append(stages[-1].model.logits(hidden))
    return torch.cat(found)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in TINY
        # What one stage alone can hold is refused: `test_gemma4.py`.
        if not name.endswith("v4-config") and name not in ("gemma4", "gemma4-one-kind-of-heads")
    ],
)
def test_stages_compute_what_one_rank_computes(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path)
    num_layers = read_spec(tmp_path)[0].num_layers
    check_stages(tmp_path, (1,) * num_layers if name != "glm5-shared-choices" else (2, 2))


def test_packed_projections_that_a_file_fuses(tmp_path: Path) -> None:
    """Phi-3's as GGUF has them, in a format of their own each."""
    fused = {f"blk.{layer}.{name}.weight": kind for name, kind in GGUF_KINDS.items() for layer in (0, 1)}
    write_gguf(tmp_path / "m.gguf", "phi3", quantized=fused)
    prepared = prepare(tmp_path / "m.gguf", tmp_path / "cache", dtype="packed", progress=SilentProgress())
    check_stages(prepared.path, (1, 1))


def check_stages(directory: Path, parts: tuple[int, ...]) -> None:
    stages = [
        QuantizedModel(directory, parallel=ParallelContext(stage=stage, stage_layers=parts))
        for stage in range(len(parts))
    ]
    torch.testing.assert_close(logits_of(stages), logits_of([QuantizedModel(directory)]), atol=1e-5, rtol=1e-5)
