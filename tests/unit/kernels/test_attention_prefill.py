from __future__ import annotations

import pytest
import torch
from stepwire_kernels import work_list
from stepwire_kernels.attention_prefill import (
    PrefillTuning,
    default_prefill_tuning,
    prefill_attention,
    prefill_tile_tokens,
)

from tests.unit.kernels.checks import USUAL_DTYPES, assert_close, poison
from tests.unit.kernels.paged_case import PagedCase, make_case

SMALL = PrefillTuning(block_rows=32, tile_tokens=16, num_warps=4, num_stages=1)


def run_prefill(
    case: PagedCase, *, tuning: PrefillTuning | None = SMALL, min_queries: int = 1, **options: object
) -> torch.Tensor:
    device = str(case.q.device)
    num_heads, num_kv_heads, head_dim = case.q.shape[1], case.k_cache.shape[1], case.q.shape[2]
    used = tuning or default_prefill_tuning(head_dim, case.k_cache.dtype, case.q.device)
    tile_tokens = prefill_tile_tokens(num_heads, num_kv_heads, used)
    work = work_list.allocate_prefill_list(case.kv_lens.numel(), case.q.shape[0], tile_tokens, device)
    work_list.build_prefill_list(
        case.query_starts, case.kv_lens, case.run_rows, work, tile_tokens=tile_tokens, min_queries=min_queries
    )
    out = poison(*case.q.shape, dtype=case.q.dtype, device=device)
    return prefill_attention(
        case.q, case.k_cache, case.v_cache, case.block_tables, work, case.softmax_scale, out, tuning=tuning, **options
    )


RUNS = [(1, 0), (33, 0), (5, 60), (20, 13)]


@pytest.mark.parametrize("dtype", USUAL_DTYPES)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size"),
    [(4, 1, 64, 16), (4, 2, 80, 64), (7, 1, 96, 32), (2, 2, 128, 64), (2, 1, 256, 128)],
)
def test_matches_twin(
    device: str, dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int
) -> None:
    case = make_case(RUNS, num_heads, num_kv_heads, head_dim, block_size, dtype, device)
    assert_close(run_prefill(case), case.twin())


@pytest.mark.parametrize("dtype", USUAL_DTYPES)
def test_wide_heads_in_the_launch_shape_that_is_chosen(device: str, dtype: torch.dtype) -> None:
    case = make_case(RUNS, 8, 1, 512, 64, dtype, device)
    assert_close(run_prefill(case, tuning=None), case.twin())


@pytest.mark.parametrize("window", [1, 16, 40, *(pytest.param(window, marks=pytest.mark.slow) for window in (7, 500))])
def test_sliding_window(device: str, window: int) -> None:
    case = make_case([(33, 0), (5, 60), (40, 13)], 4, 2, 64, 16, torch.float32, device)
    assert_close(run_prefill(case, window=window), case.twin(window=window))


@pytest.mark.parametrize("window", [1, 24, 32, 45])
def test_windows_that_stand(device: str, window: int) -> None:
    case = make_case([(33, 0), (5, 60), (40, 13)], 4, 2, 64, 16, torch.float32, device)
    assert_close(run_prefill(case, window=window, aligned=True), case.twin(window=window, aligned=True))


def test_soft_cap_with_window(device: str) -> None:
    case = make_case([(33, 20)], 4, 2, 64, 32, torch.float32, device)
    case.q *= 20
    options = {"soft_cap": 5.0, "window": 30}
    assert_close(run_prefill(case, **options), case.twin(**options), factor=3)


def test_sinks(device: str) -> None:
    case = make_case([(33, 0), (3, 40)], 4, 2, 64, 32, torch.float32, device)
    sinks = torch.tensor([2.0, -1.0, 8.0, 0.0], device=device)
    assert_close(run_prefill(case, sinks=sinks), case.twin(sinks=sinks))


def test_float8_cache(device: str) -> None:
    case = make_case(RUNS, 4, 2, 128, 64, torch.bfloat16, device, cache_dtype=torch.float8_e4m3fn)
    options = {"k_scale": 0.75, "v_scale": 1.5}
    assert_close(run_prefill(case, **options), case.twin(**options))


def test_default_tuning_and_pages_smaller_than_tiles(device: str) -> None:
    for block_size in (16, 64):
        case = make_case([(70, 30), (2, 100)], 4, 1, 64, block_size, torch.bfloat16, device)
        assert_close(run_prefill(case, tuning=None), case.twin())


def test_runs_below_min_queries_and_padding_are_left_alone(device: str) -> None:
    case = make_case([(1, 9), (4, 4)], 2, 1, 64, 16, torch.float32, device, padding_tokens=2)
    out = run_prefill(case, min_queries=2)
    assert_close(out[1:5], case.twin()[1:5])
    assert out[0].isnan().all() and out[5:].isnan().all()


def test_chunked_prefill_equals_whole_prefill(device: str) -> None:
    whole = make_case([(48, 0)], 4, 2, 64, 16, torch.float32, device)
    expected = run_prefill(whole)
    for first in (0, 16, 32):
        chunk = PagedCase(
            whole.q[first : first + 16], whole.k_cache, whole.v_cache, whole.block_tables,
            torch.tensor([0, 16], dtype=torch.int32, device=device),
            torch.tensor([first + 16], dtype=torch.int32, device=device), whole.run_rows, whole.softmax_scale,
        )  # fmt: skip
        assert_close(run_prefill(chunk), expected[first : first + 16].double())


def test_empty_list_writes_nothing(device: str) -> None:
    case = make_case([(1, 9)], 2, 1, 64, 16, torch.float32, device)
    assert run_prefill(case, min_queries=2).isnan().all()
