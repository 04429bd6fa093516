from __future__ import annotations

import pytest
import torch
from stepwire_kernels import work_list
from stepwire_kernels.attention_decode import DecodeTuning, allocate_decode_workspace, decode_attention
from stepwire_kernels.decode_list import build_decode_list
from stepwire_kernels.work_list import SharePolicy

from tests.unit.kernels.checks import USUAL_DTYPES, assert_close, poison
from tests.unit.kernels.paged_case import PagedCase, make_case

# Pieces of 64 tokens, so that most runs have several.
FINE = SharePolicy(32, 64, 64)


def run_decode(
    case: PagedCase, *, policy: SharePolicy = FINE, tuning: DecodeTuning | None = None, **options: object
) -> torch.Tensor:
    device = str(case.q.device)
    num_runs = case.kv_lens.numel()
    num_heads, head_dim = case.q.shape[1], case.q.shape[2]
    work = work_list.allocate_decode_list(num_runs, case.q.shape[0], device, policy)
    reach = {name: options[name] for name in ("window", "aligned") if name in options}
    build_decode_list(case.query_starts, case.kv_lens, case.run_rows, work, **reach)
    workspace = allocate_decode_workspace(work, num_heads, head_dim)
    workspace.partial_out.fill_(float("nan"))
    workspace.partial_sums.fill_(float("nan"))
    out = poison(*case.q.shape, dtype=case.q.dtype, device=device)
    decode_attention(
        case.q, case.k_cache, case.v_cache, case.block_tables, work, workspace, case.softmax_scale, out,
        tuning=tuning, **options,
    )  # fmt: skip
    # A server has no room for partial results of padding.
    assert workspace.partial_out[int(work.num_records[1]) :].isnan().all()
    return out


LENS = [1, 64, 65, 140, 17]


@pytest.mark.parametrize("dtype", USUAL_DTYPES)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size"),
    [(4, 1, 64, 16), (4, 2, 80, 64), (7, 1, 96, 32), (2, 2, 128, 64), (2, 1, 256, 128), (8, 1, 512, 64)],
)
def test_matches_twin(
    device: str, dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int
) -> None:
    runs = [(1, length - 1) for length in LENS]
    case = make_case(runs, num_heads, num_kv_heads, head_dim, block_size, dtype, device)
    assert_close(run_decode(case), case.twin())


@pytest.mark.parametrize(
    "window", [1, 63, 130, *(pytest.param(window, marks=pytest.mark.slow) for window in (64, 1000))]
)
def test_sliding_window(device: str, window: int) -> None:
    case = make_case([(1, length - 1) for length in LENS], 4, 2, 64, 16, torch.float32, device)
    assert_close(run_decode(case, window=window), case.twin(window=window))


@pytest.mark.parametrize("window", [1, 20, 64, 140])
def test_windows_that_stand(device: str, window: int) -> None:
    case = make_case([(1, length - 1) for length in LENS], 4, 2, 64, 16, torch.float32, device)
    assert_close(run_decode(case, window=window, aligned=True), case.twin(window=window, aligned=True))


def test_soft_cap(device: str) -> None:
    case = make_case([(1, 199), (1, 30)], 4, 2, 64, 32, torch.float32, device)
    case.q *= 20
    assert_close(run_decode(case, soft_cap=5.0), case.twin(soft_cap=5.0), factor=3)


def test_sinks_join_one_and_many_chunks(device: str) -> None:
    case = make_case([(1, 199), (1, 30)], 4, 2, 64, 32, torch.float32, device)
    sinks = torch.tensor([2.0, -1.0, 8.0, 0.0], device=device)
    assert_close(run_decode(case, sinks=sinks), case.twin(sinks=sinks))


def test_padding_tokens_get_zeros_and_prefill_runs_are_left_alone(device: str) -> None:
    case = make_case([(1, 99), (6, 10), (1, 3)], 2, 1, 64, 16, torch.float32, device, padding_tokens=3)
    sinks = torch.zeros(2, device=device)
    out = run_decode(case, sinks=sinks)
    twin = case.twin(sinks=sinks)
    assert_close(out[[0, 7]], twin[[0, 7]])
    assert torch.equal(out[8:], torch.zeros_like(out[8:]))
    assert out[1:7].isnan().all()


def test_float8_cache(device: str) -> None:
    case = make_case(
        [(1, 149), (1, 20)], 4, 2, 128, 64, torch.bfloat16, device, cache_dtype=torch.float8_e4m3fn
    )  # fmt: skip
    options = {"k_scale": 0.75, "v_scale": 1.5}
    assert_close(run_decode(case, **options), case.twin(**options))


def test_the_same_pieces_give_bitwise_the_same_alone_and_in_a_batch(device: str) -> None:
    case = make_case([(1, 149), (1, 40), (1, 299)], 4, 2, 64, 32, torch.bfloat16, device)
    together = run_decode(case)
    for run in range(3):
        alone = PagedCase(
            case.q[run : run + 1], case.k_cache, case.v_cache, case.block_tables,
            case.query_starts[:2], case.kv_lens[run : run + 1], case.run_rows[run : run + 1], case.softmax_scale,
        )  # fmt: skip
        assert torch.equal(run_decode(alone)[0], together[run])


def test_more_cuts_than_shares(device: str) -> None:
    # 51 cuts of 16 tokens: some shares have two.
    case = make_case([(1, 699), (1, 100)], 2, 1, 64, 32, torch.float32, device)
    tuning = DecodeTuning(num_warps=1, num_stages=1)
    assert_close(run_decode(case, policy=SharePolicy(40, 16, 16), tuning=tuning), case.twin())


def test_unsupported_shapes_are_refused(device: str) -> None:
    case = make_case([(1, 5)], 2, 1, 48, 16, torch.float32, device)
    with pytest.raises(ValueError, match="head dimension 48 is not one of"):
        run_decode(case)
    case = make_case([(1, 5)], 2, 1, 64, 8, torch.float32, device)
    with pytest.raises(ValueError, match="block size 8 must be a power of two, 16 or more"):
        run_decode(case)


@pytest.mark.parametrize("num_shares", [1, 4, 30])
def test_shares_that_end_within_runs(device: str, num_shares: int) -> None:
    lens = [299, 1, 40, 150, 65, 512, 3]
    case = make_case([(1, length - 1) for length in lens], 4, 2, 64, 32, torch.float32, device)
    assert_close(run_decode(case, policy=SharePolicy(num_shares, short_share=0)), case.twin())
    assert_close(run_decode(case, policy=SharePolicy(num_shares, 16, 512, 0), window=100), case.twin(window=100))


def test_pieces_that_begin_within_a_tile(device: str) -> None:
    case = make_case([(1, 287)], 4, 2, 64, 64, torch.float32, device)
    # The second piece of 96 tokens: its first tile of 64 goes over the edge of a block.
    assert_close(run_decode(case, policy=SharePolicy(3), tuning=DecodeTuning(16, 4, 2)), case.twin())
