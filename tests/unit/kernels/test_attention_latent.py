from __future__ import annotations

import pytest
import torch
from stepwire_kernels import reference, work_list
from stepwire_kernels.attention_decode import allocate_decode_workspace
from stepwire_kernels.attention_latent import (
    LatentTuning,
    default_latent_decode_tuning,
    default_latent_prefill_tuning,
    latent_decode_attention,
    latent_policy,
    latent_prefill_attention,
    latent_tile_tokens,
)
from stepwire_kernels.decode_list import build_decode_list
from stepwire_kernels.work_list import SharePolicy

from tests.unit.kernels.checks import USUAL_DTYPES, assert_close, poison
from tests.unit.kernels.paged_case import PagedCase, make_case

FINE = SharePolicy(32, 64, 64)


def make(
    runs: list[tuple[int, int]],
    heads: int,
    dim: int,
    block_size: int,
    dtype: torch.dtype,
    device: str,
    **options: object,
) -> PagedCase:
    return make_case(runs, heads, 1, dim, block_size, dtype, device, **options)  # type: ignore[arg-type]


def twin(case: PagedCase, kv_rank: int, **options: float) -> torch.Tensor:
    cache = case.k_cache if case.k_cache.dtype == torch.float8_e4m3fn else case.k_cache.double()
    return reference.latent_attention(
        case.q.double(), cache, case.block_tables, case.query_starts, case.kv_lens, case.run_rows,
        case.softmax_scale, kv_rank, **options,
    )  # fmt: skip


def run_decode(
    case: PagedCase, kv_rank: int, *, policy: SharePolicy = FINE, tuning: LatentTuning | None = None, **options: float
) -> torch.Tensor:
    device, (num_tokens, num_heads, _) = str(case.q.device), case.q.shape
    work = work_list.allocate_decode_list(case.kv_lens.numel(), num_tokens, device, policy)
    build_decode_list(case.query_starts, case.kv_lens, case.run_rows, work)
    workspace = allocate_decode_workspace(work, num_heads, kv_rank)
    workspace.partial_out.fill_(float("nan"))
    workspace.partial_sums.fill_(float("nan"))
    out = poison(num_tokens, num_heads, kv_rank, dtype=case.q.dtype, device=device)
    latent_decode_attention(
        case.q, case.k_cache, case.block_tables, work, workspace, case.softmax_scale, out, tuning=tuning, **options
    )
    # A server has no room for partial results of padding.
    assert workspace.partial_out[int(work.num_records[1]) :].isnan().all()
    return out


def run_prefill(
    case: PagedCase, kv_rank: int, *, tuning: LatentTuning | None = None, min_queries: int = 1, **options: float
) -> torch.Tensor:
    device, (num_tokens, num_heads, _) = str(case.q.device), case.q.shape
    tuning = tuning or default_latent_prefill_tuning(case.q.dtype, case.q.device)
    tile_tokens = latent_tile_tokens(num_heads, tuning)
    work = work_list.allocate_prefill_list(case.kv_lens.numel(), num_tokens, tile_tokens, device)
    work_list.build_prefill_list(
        case.query_starts, case.kv_lens, case.run_rows, work, tile_tokens=tile_tokens, min_queries=min_queries
    )
    out = poison(num_tokens, num_heads, kv_rank, dtype=case.q.dtype, device=device)
    latent_prefill_attention(
        case.q, case.k_cache, case.block_tables, work, case.softmax_scale, out, tuning=tuning, **options
    )
    return out


SIZES = [
    # heads, kv rank, rope dim, block size
    (16, 512, 64, 64),
    (6, 24, 8, 16),
    (3, 100, 32, 32),
]


@pytest.mark.parametrize("dtype", USUAL_DTYPES)
@pytest.mark.parametrize(("heads", "kv_rank", "rope_dim", "block_size"), SIZES)
def test_decode_matches_twin(
    device: str, dtype: torch.dtype, heads: int, kv_rank: int, rope_dim: int, block_size: int
) -> None:
    case = make([(1, length - 1) for length in (1, 65, 130, 17)], heads, kv_rank + rope_dim, block_size, dtype, device)
    assert_close(run_decode(case, kv_rank), twin(case, kv_rank))


@pytest.mark.parametrize("dtype", USUAL_DTYPES)
@pytest.mark.parametrize(("heads", "kv_rank", "rope_dim", "block_size"), SIZES)
def test_prefill_matches_twin(
    device: str, dtype: torch.dtype, heads: int, kv_rank: int, rope_dim: int, block_size: int
) -> None:
    case = make([(7, 0), (1, 40), (5, 63), (2, 31)], heads, kv_rank + rope_dim, block_size, dtype, device)
    assert_close(run_prefill(case, kv_rank), twin(case, kv_rank))


@pytest.mark.parametrize("rows", [16, 64])
def test_more_heads_than_a_tile_has_rows(device: str, rows: int) -> None:
    case = make([(1, 69), (1, 5)], 70, 40, 32, torch.float32, device)
    tuning = LatentTuning(rows, 32, 4, 1, 1)
    assert_close(run_decode(case, 32, tuning=tuning), twin(case, 32))
    case = make([(3, 20), (2, 0)], 70, 40, 32, torch.float32, device)
    assert_close(run_prefill(case, 32, tuning=tuning), twin(case, 32))


def test_a_tile_longer_than_a_block(device: str) -> None:
    case = make([(1, 99), (4, 50)], 4, 40, 16, torch.float32, device)
    tuning = LatentTuning(16, 64, 4, 1, 1)
    expected = twin(case, 32)
    assert_close(run_decode(case, 32, tuning=tuning)[:1], expected[:1])
    assert_close(run_prefill(case, 32, tuning=tuning), expected)


def test_padding_tokens_get_zeros_and_each_kernel_leaves_the_other_s_runs_alone(device: str) -> None:
    case = make([(1, 99), (6, 10), (1, 3)], 2, 40, 16, torch.float32, device, padding_tokens=3)
    expected = twin(case, 32)
    out = run_decode(case, 32)
    assert_close(out[[0, 7]], expected[[0, 7]])
    assert torch.equal(out[8:], torch.zeros_like(out[8:]))
    assert out[1:7].isnan().all()
    out = run_prefill(case, 32, min_queries=2)
    assert_close(out[1:7], expected[1:7])
    assert out[[0, 7, 8, 9, 10]].isnan().all()


def test_float8_cache(device: str) -> None:
    case = make([(1, 149), (4, 20)], 4, 80, 64, torch.bfloat16, device, cache_dtype=torch.float8_e4m3fn)
    expected = twin(case, 64, cache_scale=0.75)
    assert_close(run_decode(case, 64, cache_scale=0.75)[:1], expected[:1])
    assert_close(run_prefill(case, 64, cache_scale=0.75), expected)


def test_the_same_pieces_give_bitwise_the_same_alone_and_in_a_batch(device: str) -> None:
    case = make([(1, 299), (1, 40)], 4, 80, 64, torch.bfloat16, device)
    together = run_decode(case, 64)
    for run in range(2):
        alone = PagedCase(
            case.q[run : run + 1], case.k_cache, case.v_cache, case.block_tables,
            case.query_starts[:2], case.kv_lens[run : run + 1], case.run_rows[run : run + 1], case.softmax_scale,
        )  # fmt: skip
        assert torch.equal(run_decode(alone, 64)[0], together[run])


def test_unsupported_sizes_are_refused(device: str) -> None:
    case = make([(1, 5)], 2, 600, 16, torch.float32, device)
    with pytest.raises(ValueError, match=r"latent vectors of 590 \+ 10 numbers"):
        run_decode(case, 590)
    case = make([(2, 5)], 2, 40, 8, torch.float32, device)
    with pytest.raises(ValueError, match="block_size 8 is not a power of two"):
        run_prefill(case, 32)


@pytest.mark.parametrize("num_shares", [1, 4, 30])
def test_shares_that_end_within_runs(device: str, num_shares: int) -> None:
    case = make([(1, length - 1) for length in (299, 1, 40, 150, 65, 512, 3)], 4, 80, 64, torch.float32, device)
    assert_close(run_decode(case, 64, policy=SharePolicy(num_shares, short_share=0)), twin(case, 64))


def test_pieces_that_begin_within_a_tile(device: str) -> None:
    case = make([(1, 287)], 4, 80, 64, torch.float32, device)
    # The second piece of 96 tokens: its first tile of 64 goes over the edge of a block.
    assert_close(run_decode(case, 64, policy=SharePolicy(3), tuning=LatentTuning(16, 64, 4, 1)), twin(case, 64))


# Of 128 heads two blocks read the same share.
@pytest.mark.parametrize(("num_heads", "num_shares"), [(16, 264), (64, 132), (128, 66)])
def test_shares_fill_the_device_and_no_more(num_heads: int, num_shares: int) -> None:
    tuning = default_latent_decode_tuning(num_heads, torch.bfloat16, torch.device("cpu"))
    assert latent_policy(num_heads, tuning).num_shares == num_shares
