"""Checks that the kernels of packed weights and few tokens have in common."""

from __future__ import annotations

from typing import Any, Protocol

import pytest
import torch
from stepwire_kernels import reference
from stepwire_kernels.packed_in_flight import takes
from stepwire_kernels.packed_weight import PackedWeight, unpack
from stepwire_kernels.split_k import LinearWorkspace, allocate_linear_workspace

from gpu_worker.quant.repack import repack
from tests.unit.gpu_worker.quant.packed_cases import affine
from tests.unit.kernels.checks import assert_close, poison
from tests.unit.kernels.test_packed_linear import on_device, packed


class Multiply(Protocol):
    def __call__(
        self,
        x: torch.Tensor,
        weight: PackedWeight,
        bias: torch.Tensor | None,
        workspace: LinearWorkspace,
        tuning: Any,
        out: torch.Tensor,
        *,
        pdl: bool = False,
    ) -> torch.Tensor: ...


def affine_weight(n: int, k: int, group: int, device: str) -> PackedWeight:
    repacked = repack(affine(n, k, group, 4))
    assert repacked is not None
    return on_device(repacked.weight, device)


def check_linear(
    multiply: Multiply,
    weight: PackedWeight,
    num_tokens: int,
    device: str,
    tuning: object,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    torch.manual_seed(num_tokens)
    # Rows that are apart, and a last one behind which nothing may be read.
    x = torch.randn(num_tokens, weight.num_inputs + 16, device=device).to(dtype)[:, : weight.num_inputs]
    bias = torch.randn(weight.num_outputs, device=device).to(dtype)
    workspace = allocate_linear_workspace(device, partial_words=1 << 18)
    workspace.partial.fill_(float("nan"))
    expected = reference.linear(x.double(), unpack(weight), bias.double())
    for pdl in (False, device != "cpu" and torch.cuda.get_device_capability()[0] >= 9):
        out = poison(num_tokens, weight.num_outputs, dtype=dtype, device=device)
        multiply(x, weight, bias, workspace, tuning, out, pdl=pdl)
        assert_close(out, expected)
        assert not workspace.counters.any()


def check_format(multiply: Multiply, name: str, dtype: torch.dtype, device: str, tuning: object) -> None:
    """A format's numbers are the twin's, or it is refused."""
    weight = packed(name, device)
    x = torch.zeros(1, weight.num_inputs, dtype=dtype, device=device)
    if takes(x, weight):
        check_linear(multiply, weight, 3, device, tuning, dtype)
    else:
        with pytest.raises(ValueError, match="4-bit integers"):
            multiply(x, weight, None, LinearWorkspace(*torch.empty(2, 0)), tuning, x)
