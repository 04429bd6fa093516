"""Weights that AutoGPTQ packed, against its own product of them: every width, act-order, both versions of zero points.

The file is made by `tests/fixtures/quant/make_gptq.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpu_worker.models.hf_config import HfConfig
from gpu_worker.parallel.shares import Share
from gpu_worker.quant.affine_formats import GptqFormat
from gpu_worker.quant.expert_stack import pack_expert
from gpu_worker.quant.scheme import read_quantization
from tests.unit.gpu_worker.quant.stored_cases import stored_cases

N, K = 64, 128
ROWS, COLS = Share(0, N, N), Share(0, K, K)


def stored() -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
    return stored_cases("gptq.safetensors", "settings")


CASES = sorted(stored()[0])


def format_of(case: str, **changes: Any) -> GptqFormat:
    fields = {"quant_method": "gptq"} | stored()[0][case] | changes
    quant = read_quantization(HfConfig({"quantization_config": fields}))
    assert quant is not None
    found = quant.format_of("model.layers.0.mlp.up_proj")
    assert isinstance(found, GptqFormat)
    return found


def packed(case: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in stored()[1][case].items() if name != "unpacked"}


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_tool(case: str) -> None:
    tensors, kind = packed(case), format_of(case)
    for name, rule in kind.rules(N, K).items():
        assert tuple(tensors[name].shape) in rule.shapes and tensors[name].dtype in rule.dtypes
    ours = kind.decode(tensors, ROWS, COLS).dequantize()
    assert ours.std() > 0.01
    # The tool's product with the identity adds zeros to each value.
    assert torch.equal(ours, stored()[1][case]["unpacked"])


@pytest.mark.parametrize("case", CASES)
def test_version_two_stores_the_zero_points_themselves(case: str) -> None:
    """The tool's zero points are version 1; one more in every field of the words is what version 2 would be."""
    kind, tensors = format_of(case), packed(case)
    bits = stored()[0][case]["bits"]
    words = tensors["qzeros"].long() & 0xFFFFFFFF
    for row in words:
        whole = sum(int(word) << (32 * place) for place, word in enumerate(row))
        fields = [((whole >> (bits * field)) & (2**bits - 1)) + 1 for field in range(N)]
        assert max(fields) < 2**bits
        whole = sum(field << (bits * place) for place, field in enumerate(fields))
        row.copy_(torch.tensor([(whole >> (32 * place)) & 0xFFFFFFFF for place in range(len(row))]))
    second = format_of(case, checkpoint_format="gptq_v2").decode(tensors | {"qzeros": words.int()}, ROWS, COLS)
    assert torch.equal(second.dequantize(), kind.decode(packed(case), ROWS, COLS).dequantize())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cols", [Share(64, 64, K), Share(32, 96, K)])
def test_a_share_is_that_part_of_the_whole(case: str, cols: Share) -> None:
    kind, tensors = format_of(case), packed(case)
    cut = {name: tensor[kind.index(name, tuple(tensor.shape), ROWS, cols)] for name, tensor in tensors.items()}
    whole = stored()[1][case]["unpacked"]
    assert torch.equal(kind.decode(cut, ROWS, cols).dequantize(), whole[:, cols.as_slice()])


@pytest.mark.parametrize("case", CASES)
def test_experts_stay_packed_unless_their_inputs_have_an_order(case: str) -> None:
    weight = format_of(case).decode(packed(case), ROWS, COLS)
    one = pack_expert([weight, weight])
    assert (one is None) == ("act-order" in case)
