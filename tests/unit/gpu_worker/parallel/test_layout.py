"""How layers are split over stages, and what is refused."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.parallel.layout import GroupLayout, plan_layout, split_layers
from gpu_worker.parallel.shares import ParallelContext, ParallelError


@given(
    st.lists(st.integers(1, 9).map(float), min_size=1, max_size=9),
    st.integers(1, 5),
    st.integers(0, 20).map(float),
    st.integers(0, 20).map(float),
)
def test_no_other_split_has_a_cheaper_dearest_stage(
    costs: list[float], num_stages: int, first: float, last: float
) -> None:
    num_stages = min(num_stages, len(costs))

    def dearest(counts: tuple[int, ...]) -> float:
        stages, start = [], 0
        for count in counts:
            stages.append(sum(costs[start : start + count]))
            start += count
        stages[0] += first
        stages[-1] += last
        return max(stages)

    counts = split_layers(costs, num_stages, first, last)
    assert len(counts) == num_stages and sum(counts) == len(costs) and min(counts) >= 1
    ends = [(0, *cuts, len(costs)) for cuts in combinations(range(1, len(costs)), num_stages - 1)]
    every = [tuple(stop - start for start, stop in pairwise(cut)) for cut in ends]
    assert dearest(counts) == min(map(dearest, every))


def test_a_large_head_makes_the_last_stage_shorter() -> None:
    assert split_layers([1.0] * 32, 2, 0.0, 4.0) == (18, 14)
    assert split_layers([1.0] * 32, 2) == (16, 16)


@given(st.integers(1, 4), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_stages_tile_the_layers(size: int, stage_layers: list[int]) -> None:
    layout = GroupLayout(size, tuple(stage_layers))
    layers: list[int] = []
    for rank in range(0, layout.world_size, size):
        stage = ParallelContext(0, size, stage=layout.stage_of(rank), stage_layers=layout.stage_layers)
        layers += stage.layers(sum(stage_layers))
        assert stage.is_last_stage == (layout.sender_of_tokens(rank) == rank)
    assert layers == list(range(sum(stage_layers)))


@pytest.mark.parametrize(
    ("sizes", "changes", "words"),
    [
        ((1, 5), {}, "--pipeline-parallel-size 4 or less"),
        ((1, 2), {"stage_layers": (4,)}, "must be 2 numbers"),
        ((1, 2), {"stage_layers": (2, 3)}, "whose sum is the model's 4 layers"),
        ((3, 1), {"num_nodes": 2}, "3 ranks .* do not divide by num_nodes 2"),
    ],
)
def test_numbers_that_do_not_go_together(sizes: tuple[int, int], changes: dict[str, object], words: str) -> None:
    with pytest.raises(ParallelError, match=words):
        plan_layout(*sizes, layer_costs=[1.0] * 4, **changes)  # type: ignore[arg-type]
