"""Weights that compressed-tensors packed, against its own unpacking of them; and any share of them against the whole.

The file is made by `tests/fixtures/quant/make_compressed_tensors.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpu_worker.models.hf_config import HfConfig
from gpu_worker.parallel.shares import Share
from gpu_worker.quant.formats import WeightFormat
from gpu_worker.quant.scheme import read_quantization
from tests.unit.gpu_worker.quant.stored_cases import stored_cases

N, K = 72, 192


def stored() -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
    return stored_cases("compressed_tensors.safetensors", "schemes")


CASES = sorted(stored()[0])


def format_of(case: str) -> WeightFormat:
    scheme = stored()[0][case]
    group = {"targets": ["Linear"], "weights": scheme["weights"]}
    fields = {
        "quant_method": "compressed-tensors",
        "format": scheme["format"],
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    quant = read_quantization(HfConfig({"quantization_config": fields}))
    assert quant is not None
    found = quant.format_of("model.layers.0.mlp.up_proj")
    assert found is not None
    return found


def dequantize(case: str, rows: Share, cols: Share) -> torch.Tensor:
    kind, tensors = format_of(case), stored()[1][case]
    cut = {
        name: tensor[kind.index(name, tuple(tensor.shape), rows, cols)]
        for name, tensor in tensors.items()
        if name != "decompressed"
    }
    return kind.decode(cut, rows, cols).dequantize()


@pytest.mark.parametrize("case", CASES)
def test_the_stored_tensors_are_those_that_the_format_expects(case: str) -> None:
    rules = format_of(case).rules(N, K)
    tensors = {name: tensor for name, tensor in stored()[1][case].items() if name != "decompressed"}
    for name, tensor in tensors.items():
        assert tuple(tensor.shape) in rules[name].shapes and tensor.dtype in rules[name].dtypes
    assert {name for name, rule in rules.items() if not rule.optional} <= set(tensors)
    assert format_of(case).size_of({name: tuple(tensor.shape) for name, tensor in tensors.items()}) == (N, K)


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_tool(case: str) -> None:
    ours = dequantize(case, Share(0, N, N), Share(0, K, K))
    assert ours.std() > 0.01
    # The tool multiplies and rounds to the scale's bfloat16; ours is the product before that rounding.
    assert torch.equal(ours.bfloat16(), stored()[1][case]["decompressed"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rows", [Share(24, 24, N), Share(8, 40, N), Share(40, 32, N)])
@pytest.mark.parametrize("cols", [Share(0, K, K), Share(64, 64, K), Share(160, 32, K), Share(32, 96, K)])
def test_a_share_is_that_part_of_the_whole(case: str, rows: Share, cols: Share) -> None:
    whole = dequantize(case, Share(0, N, N), Share(0, K, K))
    assert torch.equal(dequantize(case, rows, cols), whole[rows.as_slice(), cols.as_slice()])
