"""Whole small checkpoints of MLX's float modes, against its own unpacking of them.

The files are made by `tests/fixtures/quant/make_mlx_floats.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gpu_worker.loading.dequantized import DequantizedSource
from gpu_worker.loading.safetensors_reader import SafetensorsReader
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.parallel.shares import ParallelError, Share
from gpu_worker.quant.mlx import MlxFloatFormat, MlxFormat
from gpu_worker.quant.repack import repack
from gpu_worker.quant.scheme import read_quantization
from gpu_worker.quant.weights import ScaledWeight
from tests.unit.gpu_worker.quant.exported import TOKENS, reference_logits
from tests.unit.gpu_worker.quant.paged_model import QuantizedModel

FIXTURES = Path(__file__).resolve().parents[3] / "fixtures" / "quant" / "mlx"
MODES = ("mxfp4", "mxfp8", "nvfp4")
DOWN = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize("mode", MODES)
def test_values_are_those_of_the_tool(mode: str) -> None:
    quant = read_quantization(HfConfig.open(FIXTURES / mode))
    assert quant is not None and quant.label == f"mlx {mode}"
    assert isinstance(quant.format_of(DOWN), MlxFloatFormat) and isinstance(quant.format_of("lm_head"), MlxFormat)
    expected = load_file(FIXTURES / mode / "dequantized.safetensors")
    assert len(expected) == 9
    reader = SafetensorsReader(FIXTURES / mode / "model.safetensors")
    source = DequantizedSource(reader, quant.format_of, expected.keys(), torch.float32)
    for name, weight in expected.items():
        assert weight.float().std() > 0.01
        assert torch.equal(source.read(name), weight.float()), name


@pytest.mark.parametrize("mode", MODES)
def test_a_share_is_that_part_of_the_whole_and_kernels_have_a_layout(mode: str) -> None:
    quant = read_quantization(HfConfig.open(FIXTURES / mode))
    stored = quant.format_of(DOWN) if quant is not None else None
    assert isinstance(stored, MlxFloatFormat)
    tensors = load_file(FIXTURES / mode / "model.safetensors")
    weight = load_file(FIXTURES / mode / "dequantized.safetensors")[f"{DOWN}.weight"].float()
    own = {name: tensors[f"{DOWN}.{name}"] for name in ("weight", "scales")}
    rules = stored.rules(*weight.shape)
    assert set(rules) == set(own)
    for name, tensor in own.items():
        assert tuple(tensor.shape) in rules[name].shapes and tensor.dtype in rules[name].dtypes
    num_outputs, num_inputs = weight.shape
    for rows, cols in (
        (Share(5, 12, num_outputs), Share(0, num_inputs, num_inputs)),
        (Share(0, num_outputs, num_outputs), Share(32, 32, num_inputs)),
    ):
        cut = {name: tensor[stored.index(name, tuple(tensor.shape), rows, cols)] for name, tensor in own.items()}
        part = stored.decode(cut, rows, cols)
        assert torch.equal(part.dequantize(), weight[rows.as_slice(), cols.as_slice()])
        assert isinstance(part, ScaledWeight) or repack(part) is not None
    with pytest.raises(ParallelError, match="another --tensor-parallel-size"):
        stored.index("weight", tuple(own["weight"].shape), rows, Share(8, 32, num_inputs))


@pytest.mark.parametrize("mode", MODES)
def test_greedy_tokens_are_those_of_the_dequantized_weights(mode: str, tmp_path: Path) -> None:
    expected = reference_logits(FIXTURES / mode, load_file(FIXTURES / mode / "dequantized.safetensors"), tmp_path)
    logits = QuantizedModel(FIXTURES / mode).logits(TOKENS)
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
