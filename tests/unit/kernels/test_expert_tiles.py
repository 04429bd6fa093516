from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stepwire_kernels import reference_experts
from stepwire_kernels.expert_tiles import ExpertTiles, build_expert_tiles


def check(experts: torch.Tensor, num_held: int, tile_rows: int, first_expert: int = 0) -> ExpertTiles:
    tiles = build_expert_tiles(experts, num_held, tile_rows, first_expert=first_expert)
    order, records = reference_experts.expert_tiles(experts, num_held, tile_rows, first_expert=first_expert)
    assert tiles.order[: len(order)].tolist() == order
    found = tiles.records.tolist()
    assert [tuple(record[:3]) for record in found if record[2] > 0] == records
    # Every record was written, used or not.
    assert all(0 <= record[0] < num_held and 0 <= record[2] <= tile_rows and record[3] == 0 for record in found)
    return tiles


@pytest.mark.parametrize("tile_rows", [16, 64])
@pytest.mark.parametrize(("num_tokens", "num_chosen", "num_experts"), [(1, 1, 1), (7, 3, 5), (40, 8, 60), (200, 4, 10)])
def test_matches_twin(device: str, num_tokens: int, num_chosen: int, num_experts: int, tile_rows: int) -> None:
    scores = torch.rand(num_tokens, num_experts, device=device)
    check(scores.topk(num_chosen, dim=-1).indices.int(), num_experts, tile_rows)


def test_all_tokens_to_one_expert_and_many_to_none(device: str) -> None:
    for number in (0, 3, 9):
        check(torch.full((100, 1), number, dtype=torch.int32, device=device), 10, 16)


def test_a_token_may_have_one_expert_twice(device: str) -> None:
    check(torch.tensor([[2, 2], [1, 2]], dtype=torch.int32, device=device), 3, 16)


def test_experts_that_are_held_elsewhere_have_no_place(device: str) -> None:
    experts = torch.randint(0, 24, (50, 4), dtype=torch.int32, device=device)
    for first in (0, 8, 16):
        check(experts, 8, 16, first)
    tiles = build_expert_tiles(experts, 3, 16, first_expert=100)
    assert not tiles.records[:, 2].any()


def test_more_pairs_than_one_program_reads_at_once(device: str) -> None:
    generator = torch.Generator().manual_seed(3)
    experts = torch.randint(0, 6, (1100, 8), dtype=torch.int32, generator=generator).to(device)
    check(experts, 2, 128, 3)
    check(experts[:519], 6, 16)  # the last chunk has a few pairs


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.sampled_from([1, 2, 16]))
def test_tiles_never_overlap(numbers: list[int], tile_rows: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check(torch.tensor(numbers, dtype=torch.int32, device=device)[:, None], 5, tile_rows, 1)


def test_misfits_are_refused(device: str) -> None:
    with pytest.raises(ValueError, match="contiguous int32 experts"):
        build_expert_tiles(torch.zeros(2, 2, dtype=torch.int64, device=device), 4, 16)
