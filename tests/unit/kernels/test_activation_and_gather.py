from __future__ import annotations

import pytest
import torch
from stepwire_kernels import reference
from stepwire_kernels.activation import ACTIVATIONS, gated_activation, gated_activation_quantized
from stepwire_kernels.gather import gather_last_hidden, look_up_part
from stepwire_kernels.quantize_input import quantize_input

from tests.unit.kernels.checks import FLOAT_DTYPES, assert_close, poison


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize(("num_tokens", "width"), [(1, 8), (3, 123), (2, 1536)])
def test_gated_activation_matches_twin(device: str, dtype: torch.dtype, kind: str, num_tokens: int, width: int) -> None:
    packed = (4 * torch.randn(num_tokens, 2 * width, device=device)).to(dtype)
    out = gated_activation(packed, kind, out=poison(num_tokens, width, dtype=dtype, device=device))
    assert_close(out, reference.gated_activation(packed.double(), kind))


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_large_gates_stay_finite(device: str, kind: str) -> None:
    packed = torch.tensor([[-1e4, 1e4, -60.0, 60.0, 1.0, 1.0, 1.0, 1.0]], device=device)
    out = gated_activation(packed, kind)
    if kind == "swiglu_oai":
        torch.testing.assert_close(out, reference.gated_activation(packed.double(), kind).float())
        return
    assert torch.equal(out.cpu(), torch.tensor([[0.0, 1e4, 0.0, 60.0]])) or torch.allclose(
        out.cpu(), torch.tensor([[0.0, 1e4, 0.0, 60.0]]), atol=1e-20
    )


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("target", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize(("kind", "is_static"), [("silu", False), ("gelu_tanh", True)])
def test_quantized_gate_is_the_gate_quantized(
    device: str, dtype: torch.dtype, target: torch.dtype, kind: str, is_static: bool
) -> None:
    packed = (4 * torch.randn(3, 2 * 300, device=device)).to(dtype)
    static = torch.tensor(0.2, device=device) if is_static else None
    values, scales = gated_activation_quantized(packed, kind, target, static_scale=static)
    twin, twin_scales = quantize_input(gated_activation(packed, kind), target, static_scale=static)
    assert torch.equal(values.float(), twin.float()) and torch.equal(scales, twin_scales)


def test_unknown_activation_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match="choose one of silu"):
        gated_activation(torch.zeros(1, 4, device=device), "relu")


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_gather_takes_the_last_token_of_each_run(device: str, dtype: torch.dtype) -> None:
    hidden = torch.randn(9, 130, device=device).to(dtype)
    query_starts = torch.tensor([0, 1, 5, 5, 9], dtype=torch.int32, device=device)
    out = gather_last_hidden(hidden, query_starts, out=poison(4, 130, dtype=dtype, device=device))
    assert torch.equal(out, reference.gather_last_hidden(hidden, query_starts))
    assert torch.equal(out[0], hidden[0]) and torch.equal(out[1], hidden[4]) and torch.equal(out[3], hidden[8])
    assert torch.equal(out[2], torch.zeros_like(out[2]))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("first", [0, 5, 300])
def test_a_part_of_a_table_gives_its_own_rows_and_zeros(device: str, dtype: torch.dtype, first: int) -> None:
    table = torch.randn(7, 1300, device=device).to(dtype)
    token_ids = torch.tensor([0, 4, 5, 6, 11, 12, 300, 306, 307, 6], dtype=torch.int32, device=device)
    out = look_up_part(token_ids, table, first)
    assert torch.equal(out, reference.look_up_part(token_ids, table, first))
    is_held = (token_ids >= first) & (token_ids < first + 7)
    assert torch.equal(out.any(dim=1), is_held)


def test_parts_of_a_table_add_up_to_it(device: str) -> None:
    table = torch.randn(10, 48, device=device)
    token_ids = torch.tensor([9, 0, 5, 4, 9], device=device)
    parts = [look_up_part(token_ids, table[first : first + 5], first) for first in (0, 5)]
    assert torch.equal(parts[0] + parts[1], table[token_ids])
    assert look_up_part(token_ids[:0], table, 0).shape == (0, 48)
    with pytest.raises(ValueError, match="contiguous"):
        look_up_part(token_ids[::2], table, 0)
