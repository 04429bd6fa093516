from __future__ import annotations

import dataclasses

import pytest
import torch
from stepwire_kernels import reference, work_list
from stepwire_kernels.attention_decode import DecodeWorkspace, allocate_decode_workspace
from stepwire_kernels.attention_from_qkv import (
    MANY_WANTED_PROGRAMS,
    MOST_HEADS,
    FromQkvTuning,
    HeadNorms,
    attention_from_qkv,
    default_from_qkv_tuning,
    from_qkv_policy,
    is_few,
    takes_from_qkv,
)
from stepwire_kernels.decode_list import build_decode_list
from stepwire_kernels.work_list import SharePolicy, WorkList

from tests.unit.kernels.checks import USUAL_DTYPES, assert_close
from tests.unit.kernels.paged_case import PagedCase, make_case
from tests.unit.kernels.test_rope_kv import tables

# Pieces of 64 tokens, so that most runs have several.
FINE = SharePolicy(32, 64, 64)
FEW_LENS = [1, 65, 140, 64]
MANY_LENS = [*FEW_LENS, 17, 128]
LENS = pytest.mark.parametrize("lens", [FEW_LENS, MANY_LENS], ids=["few", "many"])


class Step:
    """One token a run, whose key and value are not in the cache yet."""

    def __init__(
        self,
        lens: list[int],
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype,
        device: str,
        *,
        rotary_dim: int = 0,
        interleaved: bool = False,
        norm_offset: float | None = None,
        cache_dtype: torch.dtype | None = None,
        padding_tokens: int = 0,
    ) -> None:
        self.case = make_case(
            [(1, length - 1) for length in lens], num_heads, num_kv_heads, head_dim, block_size, dtype, device,
            cache_dtype=cache_dtype, padding_tokens=padding_tokens,
        )  # fmt: skip
        case = self.case
        num_tokens = case.q.shape[0]
        self.num_heads, self.interleaved = num_heads, interleaved
        self.qkv = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, device=device).to(dtype)
        self.positions = torch.zeros(num_tokens, dtype=torch.int32, device=device)
        self.slots = torch.full((num_tokens,), -1, dtype=torch.int32, device=device)
        self.place(lens)
        self.cos, self.sin = tables(max(lens), rotary_dim or head_dim, device)
        self.norms: HeadNorms | None = None
        if norm_offset is not None:
            self.norms = HeadNorms(
                *(torch.randn(head_dim, device=device).to(dtype) for _ in range(2)), 1e-6, norm_offset
            )

    def place(self, lens: list[int]) -> None:
        """The tokens stand at the ends of `lens`, which are no longer than those that the cache was made for."""
        case = self.case
        block_size = case.k_cache.shape[2]
        for run, length in enumerate(lens):
            last = length - 1
            block = int(case.block_tables[int(case.run_rows[run]), last // block_size])
            case.kv_lens[run], self.positions[run] = length, last
            self.slots[run] = block * block_size + last % block_size
            for cache in (case.k_cache, case.v_cache):
                cache.view(torch.uint8)[block, :, last % block_size] = 0xFF  # NaN in every dtype

    def plan(self, policy: SharePolicy, reach: dict[str, object]) -> tuple[WorkList, DecodeWorkspace]:
        case = self.case
        work = work_list.allocate_decode_list(case.kv_lens.numel(), case.q.shape[0], str(self.qkv.device), policy)
        build_decode_list(case.query_starts, case.kv_lens, case.run_rows, work, **reach)
        return work, allocate_decode_workspace(work, self.num_heads, case.q.shape[2])

    def launch(
        self, work: WorkList, workspace: DecodeWorkspace, *, tuning: FromQkvTuning | None = None, **options: object
    ) -> torch.Tensor:
        case = self.case
        return attention_from_qkv(
            self.qkv, case.k_cache, case.v_cache, case.block_tables, self.positions, self.slots, self.cos, self.sin,
            work, workspace, case.softmax_scale, self.num_heads, norms=self.norms, interleaved=self.interleaved,
            tuning=tuning, **options,
        )  # fmt: skip

    def run(self, *, policy: SharePolicy = FINE, **options: object) -> torch.Tensor:
        reach = {name: options[name] for name in ("window", "aligned") if name in options}
        work, workspace = self.plan(policy, reach)
        workspace.partial_out.fill_(float("nan"))
        workspace.partial_sums.fill_(float("nan"))
        before = self.qkv.clone()
        out = self.launch(work, workspace, **options)
        assert torch.equal(self.qkv.view(torch.uint8), before.view(torch.uint8))
        assert not workspace.counters.any()
        # A server has no room for partial results of padding beside those of so many runs.
        assert workspace.partial_out[policy.most_records(self.case.kv_lens.numel()) :].isnan().all()
        return out

    def check(
        self,
        *,
        factor: float = 1.0,
        policy: SharePolicy = FINE,
        tuning: FromQkvTuning | None = None,
        **options: object,
    ) -> None:
        """Attention and both caches against the float64 twins of the kernels that this one stands for."""
        case = self.case
        is_fp8 = case.k_cache.dtype == torch.float8_e4m3fn
        caches = [cache.clone() if is_fp8 else cache.double() for cache in (case.k_cache, case.v_cache)]
        scales = {name: options[name] for name in ("k_scale", "v_scale") if name in options}
        norms = {}
        if self.norms is not None:
            norms = {
                "q_norm": self.norms.query.double(),
                "k_norm": self.norms.key.double(),
                "norm_eps": self.norms.eps,
                "norm_offset": self.norms.offset,
            }
        q = reference.rope_and_write_kv(
            self.qkv.double(), *caches, self.positions, self.slots, self.cos.double(), self.sin.double(),
            self.num_heads, interleaved=self.interleaved, **norms, **scales,
        )  # fmt: skip
        twin = PagedCase(
            q, *caches, case.block_tables, case.query_starts, case.kv_lens, case.run_rows, case.softmax_scale
        ).twin(**options)
        out = self.run(policy=policy, tuning=tuning, **options)
        runs = int((case.kv_lens > 0).sum())
        assert_close(out[:runs], twin[:runs], factor=factor)
        assert torch.equal(out[runs:], torch.zeros_like(out[runs:]))
        for cache, expected in zip((case.k_cache, case.v_cache), caches, strict=True):
            written = cache.float().nan_to_num(nan=77.0)
            assert_close(written, expected.double().nan_to_num(nan=77.0), dtype=cache.dtype)


@LENS
@pytest.mark.parametrize("dtype", USUAL_DTYPES)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size", "rotary_dim", "interleaved", "norm_offset"),
    [
        (4, 1, 64, 16, 64, False, None),
        (4, 2, 80, 64, 32, False, None),
        (7, 1, 96, 32, 96, True, None),
        (8, 1, 64, 32, 64, False, 0.0),  # two programs for a group of few rows
        (16, 2, 128, 64, 128, True, 1.0),
        (2, 2, 128, 64, 128, False, 0.0),
        (2, 1, 128, 128, 64, True, 1.0),
        (2, 1, 64, 64, 2, False, None),
    ],
)
def test_matches_twins(
    device: str,
    dtype: torch.dtype,
    lens: list[int],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    rotary_dim: int,
    interleaved: bool,
    norm_offset: float | None,
) -> None:
    Step(
        lens, num_heads, num_kv_heads, head_dim, block_size, dtype, device,
        rotary_dim=rotary_dim, interleaved=interleaved, norm_offset=norm_offset,
    ).check()  # fmt: skip


@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn], ids=["", "fp8"])
@pytest.mark.parametrize(
    ("num_runs", "num_heads", "num_kv_heads", "head_dim"),
    [
        (5, 8, 1, 128),
        (12, 4, 4, 64),
        *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((33, 8, 8, 128), (40, 7, 1, 64))),
    ],
)
def test_many_runs_as_a_step_plans_them(
    device: str, num_runs: int, num_heads: int, num_kv_heads: int, head_dim: int, cache_dtype: torch.dtype | None
) -> None:
    lens = [1 + 37 * run % 230 for run in range(num_runs)]
    step = Step(
        lens, num_heads, num_kv_heads, head_dim, 64, torch.bfloat16, device,
        cache_dtype=cache_dtype, padding_tokens=1,
    )  # fmt: skip
    scales = {"k_scale": 0.75, "v_scale": 1.5} if cache_dtype else {}
    policy = from_qkv_policy(num_runs + 1, num_heads, num_kv_heads, head_dim)
    step.check(policy=policy, window=150, sinks=torch.randn(num_heads, device=device), **scales)


@LENS
@pytest.mark.parametrize(("window", "aligned"), [(1, False), (63, False), (130, False), (64, True), (20, True)])
def test_windows(device: str, lens: list[int], window: int, aligned: bool) -> None:
    Step(lens, 4, 2, 64, 16, torch.float32, device).check(window=window, aligned=aligned)


@LENS
def test_soft_cap(device: str, lens: list[int]) -> None:
    step = Step(lens, 4, 2, 64, 32, torch.float32, device)
    step.qkv *= 4
    step.check(soft_cap=5.0, factor=3)


@LENS
def test_sinks_join_one_and_many_chunks(device: str, lens: list[int]) -> None:
    sinks = torch.tensor([2.0, -1.0, 8.0, 0.0], device=device)
    Step(lens, 4, 2, 64, 32, torch.float32, device).check(sinks=sinks)


@pytest.mark.parametrize(("lens", "padding_tokens"), [([100, 4], 1), ([100, 4, 31, 70, 9], 3)], ids=["few", "many"])
def test_padding_gets_zeros_and_writes_nothing(device: str, lens: list[int], padding_tokens: int) -> None:
    step = Step(lens, 2, 1, 64, 16, torch.float32, device, padding_tokens=padding_tokens)
    # What layers before made of padding may be anything.
    step.qkv[len(lens) :] = float("nan")
    step.check(sinks=torch.zeros(2, device=device))


@LENS
def test_float8_cache(device: str, lens: list[int]) -> None:
    step = Step(lens, 4, 2, 128, 64, torch.bfloat16, device, cache_dtype=torch.float8_e4m3fn)
    step.check(k_scale=0.75, v_scale=1.5)


@pytest.mark.parametrize("lens", [[299, 40, 150], [299, 40, 150, 1, 64]], ids=["few", "many"])
@pytest.mark.parametrize("warps", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_chunks_of_several_tiles(device: str, lens: list[int], warps: int) -> None:
    tuning = FromQkvTuning(num_warps=warps)
    step = Step(lens, 4, 2, 64, 32, torch.float32, device, norm_offset=0.0)
    step.check(tuning=tuning)
    few = step.run(policy=SharePolicy(32, 128, 128), tuning=tuning)
    assert_close(few, step.run(policy=FINE))


ADDS_UP = FromQkvTuning(warp_tokens=16, num_warps=4, adds_up=True)


@pytest.mark.parametrize(
    ("shape", "lens", "padding_tokens", "options"),
    [
        ((4, 2, 64, 32), FEW_LENS, 0, {"sinks": True}),
        ((2, 1, 64, 16), [100, 4], 3, {"sinks": True}),
        ((6, 2, 128, 64), [700, 1, 63], 1, {}),  # three heads, chunks of several tiles, more than PARTS of them
        ((8, 1, 80, 32), [300, 65], 0, {"soft_cap": 20.0}),  # two programs a group
        ((4, 4, 64, 32), [299, 40, 150], 0, {"window": 100}),
    ],
)
def test_few_rows_that_add_up_themselves(
    device: str, shape: tuple[int, int, int, int], lens: list[int], padding_tokens: int, options: dict[str, object]
) -> None:
    dtype = torch.bfloat16 if shape[2] == 128 else torch.float32
    step = Step(lens, *shape, dtype, device, padding_tokens=padding_tokens, norm_offset=0.0)
    assert is_few(len(lens), *shape[:2])
    if "sinks" in options:
        options = {"sinks": torch.linspace(-2.0, 8.0, shape[0], device=device)}
    policies = [FINE]
    if shape == (4, 2, 64, 32):
        policies += [SharePolicy(64, 16, 32), SharePolicy(3, 64, 64, short_share=0)]
    for policy in policies:
        step.check(policy=policy, tuning=ADDS_UP, **options)


@pytest.mark.parametrize("num_runs", [1, 5])
def test_chunks_that_begin_within_a_tile(device: str, num_runs: int) -> None:
    step = Step([288] * num_runs, 2, 1, 64, 64, torch.float32, device)
    even = step.run(policy=FINE, tuning=FromQkvTuning(warp_tokens=64))
    # Three pieces of 96 tokens a run: the second's first tile of 64 goes over the edge of a block.
    odd = step.run(policy=SharePolicy(3 * num_runs, 32, 96), tuning=FromQkvTuning(warp_tokens=64))
    assert_close(odd, even)


@pytest.mark.parametrize("warps", [1, 2])
@pytest.mark.parametrize("num_shares", [1, 5, 40])
def test_shares_that_end_within_runs(device: str, num_shares: int, warps: int) -> None:
    step = Step([299, 40, 150, 65, 512, 3], 4, 2, 64, 32, torch.bfloat16, device, norm_offset=0.0)
    step.check(policy=SharePolicy(num_shares, short_share=0), tuning=FromQkvTuning(16, warps))
    # Shares of which most hold nothing.
    step.check(policy=SharePolicy(num_shares, min_share=512, short_share=0), window=100)


@pytest.mark.parametrize("num_late", [1, pytest.param(4, marks=pytest.mark.slow), 14])
def test_which_piece_finishes_makes_no_difference(device: str, num_late: int) -> None:
    step = Step([299, 40, 150, 65, 512, 3], 4, 2, 64, 32, torch.bfloat16, device)
    policy = SharePolicy(36, 32, 32)
    expected = step.run(policy=policy)
    work, workspace = step.plan(policy, {})
    # Under the interpreter a run's last piece is computed last. So the first shares are left empty, and made up for
    # afterwards, when the others are.
    places = torch.arange(len(work.shares), device=work.shares.device)
    shares, edge = work.shares.clone(), work.shares[num_late].clone()
    work.shares.copy_(torch.where(places < num_late, edge, shares))
    step.launch(work, workspace)
    assert workspace.counters.any()
    work.shares.copy_(torch.where(places < num_late, shares, edge))
    work.num_records[0] = work.num_records[1]  # padding has been
    late = step.launch(work, workspace)
    assert not workspace.counters.any()
    runs_of_late = {record[0] for record in work.records[: int(edge)].tolist()}
    for run in runs_of_late:
        assert torch.equal(late[run], expected[run])


def test_layers_and_steps_share_the_counters(device: str) -> None:
    steps = [
        Step(lens, 4, 2, 64, 32, torch.float32, device) for lens in ([170, 40, 97, 65, 130], [70, 140, 9, 1, 33, 100])
    ]
    policy = SharePolicy(40, 32, 32)
    alone = [step.run(policy=policy) for step in steps]
    _, workspace = steps[0].plan(policy, {})
    works = [step.plan(policy, {})[0] for step in steps]
    for _ in range(2):
        for step, work, expected in zip(steps, works, alone, strict=True):
            for _ in range(2):
                assert torch.equal(step.launch(work, workspace), expected)
    assert not workspace.counters.any()


@pytest.mark.parametrize(
    ("shape", "takes", "few"),
    [
        ((1, 32, 8, 128), True, True),
        ((4, 32, 8, 128), True, True),
        ((4, 8, 8, 80), True, True),
        ((4, 40, 10, 128), True, False),
        ((4, 28, 4, 128), True, False),
        ((4, 32, 4, 128), True, True),
        ((1, 8, 1, 128), True, True),
        ((5, 32, 8, 128), True, False),
        ((256, 64, 8, 64), True, False),
        ((257, 64, 8, 64), False, False),
        ((2048, 8, 1, 128), True, False),
        ((2049, 8, 1, 128), False, False),
        ((16, 16, 1, 128), False, False),
        ((16, 32, 8, 256), False, False),
    ],
)
def test_what_it_is_for(shape: tuple[int, int, int, int], takes: bool, few: bool) -> None:
    assert takes_from_qkv(*shape) is takes
    assert is_few(*shape[:3]) is few


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 8, 32])
def test_pieces_hold_whole_tiles_and_need_bounded_room(num_kv_heads: int, group: int, head_dim: int) -> None:
    for num_runs in range(1, MOST_HEADS // num_kv_heads + 1):
        shape = (num_runs, num_kv_heads * group, num_kv_heads, head_dim)
        policy, tuning = from_qkv_policy(*shape), default_from_qkv_tuning(*shape)
        assert policy.cut % tuning.tile == 0
        assert policy.most_records(num_runs) * num_kv_heads <= MOST_HEADS + MANY_WANTED_PROGRAMS


def test_what_does_not_fit_is_refused(device: str) -> None:
    step = Step([5], 2, 1, 64, 16, torch.float32, device)
    step.num_heads = 3
    with pytest.raises(ValueError, match="qkv has 256 columns"):
        step.run()
    step = Step([5], 2, 1, 48, 16, torch.float32, device)
    with pytest.raises(ValueError, match="head dimension 48 is not one of"):
        step.run()
    step = Step([3] * 10, 2, 2, 64, 16, torch.float32, device)
    work, workspace = step.plan(FINE, {})
    cramped = dataclasses.replace(workspace, counters=workspace.counters[:19])
    with pytest.raises(ValueError, match="10 runs of 2 KV heads are more than the 19"):
        step.launch(work, cramped)
