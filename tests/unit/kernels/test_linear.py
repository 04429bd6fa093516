"""Which kernel a linear goes to."""

from __future__ import annotations

import json
from importlib import resources

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stepwire_kernels.fused_linear import MAX_FUSED_TOKENS, FusedTuning, load_fused_table
from stepwire_kernels.gated_choice import load_gated_table
from stepwire_kernels.gemm import MAX_GEMV_TOKENS, MAX_SKINNY_TOKENS, GemvTuning, SkinnyTuning, has_room, skinny_gemm
from stepwire_kernels.linear import MAX_TABLE_TOKENS, choose_linear, linear, load_table, nearest_shape
from stepwire_kernels.scaled_choice import load_scaled_table
from stepwire_kernels.split_k import allocate_linear_workspace
from stepwire_kernels.tile_linear import TileLinearTuning

from tests.unit.kernels.test_gemm import operands

CARD = "NVIDIA H100 80GB HBM3"


def test_linear_without_a_table_is_torch(device: str) -> None:
    x, weight, bias = operands(3, 40, 256, torch.float32, device)
    assert torch.equal(linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))


def test_shipped_tables_are_well_formed() -> None:
    for entry in (resources.files("stepwire_kernels") / "tuned").iterdir():
        if not entry.is_file():  # other kernels' tables
            continue
        data = json.loads(entry.read_text())
        table = load_table(f"NVIDIA {data['device']}")
        assert len(table) >= len(data["choices"])
        for (num_tokens, n, k), tuning in table.items():
            assert num_tokens <= MAX_TABLE_TOKENS and n > 0 and k > 0
            if isinstance(tuning, TileLinearTuning):
                assert tuning.is_filled_by(num_tokens)
            else:
                assert num_tokens <= MAX_SKINNY_TOKENS
            if isinstance(tuning, GemvTuning | FusedTuning):
                assert num_tokens <= MAX_GEMV_TOKENS
        fused = load_fused_table(f"NVIDIA {data['device']}")
        assert len(fused) >= len(data.get("fused", []))
        assert all(num_tokens <= MAX_FUSED_TOKENS for num_tokens, *_ in fused)
        gated = load_gated_table(f"NVIDIA {data['device']}")
        assert len(gated) >= len(data.get("gated", []))
        assert all(num_tokens <= MAX_TABLE_TOKENS for num_tokens, *_ in gated)
        assert len(load_scaled_table(f"NVIDIA {data['device']}")) >= len(data.get("scaled", []))


def test_unknown_device_has_no_table() -> None:
    assert load_table("Imaginary GPU") == {}


def test_measured_shapes_go_by_their_own_rows() -> None:
    table = load_table(CARD)
    shapes = {(n, k) for _, n, k in table}
    for n, k in shapes:
        for bucket in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            chosen = choose_linear(CARD, bucket, n, k)
            assert chosen == table.get((bucket, n, k))


def test_other_shapes_go_by_the_nearest() -> None:
    measured = {(4096, 4096), (6144, 4096), (4096, 14336)}
    assert nearest_shape(measured, 5120, 4096) == (6144, 4096)
    assert nearest_shape(measured, 4097, 4000) == (4096, 4096)
    assert nearest_shape(measured, 3500, 12000) == (4096, 14336)
    # Half as much, or twice, wants another launch.
    assert nearest_shape(measured, 2048, 4096) is None
    assert nearest_shape(measured, 4096, 8192) is None
    assert nearest_shape(set(), 4096, 4096) is None


@given(n=st.integers(1, 300_000), k=st.integers(1, 60_000))
def test_the_nearest_is_near_and_none_is_nearer(n: int, k: int) -> None:
    measured = {(rows, columns) for _, rows, columns in load_table(CARD)}
    near = nearest_shape(measured, n, k)
    within = {s for s in measured if 2**-0.5 <= s[0] / n <= 2**0.5 and 2**-0.5 <= s[1] / k <= 2**0.5}
    assert (near in within) if within else near is None

    def ratio(shape: tuple[int, int]) -> float:
        return max(shape[0] / n, n / shape[0]) * max(shape[1] / k, k / shape[1])

    assert near is None or all(ratio(near) <= ratio(shape) * (1 + 1e-9) for shape in within)


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 16, 33, 64])
def test_what_is_chosen_for_an_unmeasured_shape_serves_it(num_tokens: int) -> None:
    """Parts of at least two steps, and sums that fit the workspace every device has."""
    workspace = allocate_linear_workspace("meta")
    bucket = 1 << (num_tokens - 1).bit_length()
    for _, n, k in list(load_table(CARD)):
        for other in ((int(n * 1.3), int(k * 0.75)), (int(n * 0.8), int(k * 1.3))):
            tuning = choose_linear(CARD, bucket, *other)
            if isinstance(tuning, SkinnyTuning) and tuning.split_k > 1:
                assert -(-other[1] // tuning.block_k) >= 2 * tuning.split_k
                assert has_room(workspace, tuning, num_tokens, other[0])


def test_room_is_what_the_kernel_asks_for(device: str) -> None:
    x, weight, _ = operands(5, 40, 256, torch.float32, device)
    tuning = SkinnyTuning(block_n=32, block_k=64, split_k=2, num_stages=1)
    small, enough = (allocate_linear_workspace(device, partial_words=words) for words in (2047, 2048))
    assert not has_room(small, tuning, 5, 40) and has_room(enough, tuning, 5, 40)
    with pytest.raises(ValueError, match="allocate a larger workspace"):
        skinny_gemm(x, weight, None, small, tuning=tuning)
    skinny_gemm(x, weight, None, enough, tuning=tuning)
