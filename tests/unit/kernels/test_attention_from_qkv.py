from __future__ import annotations

import pytest
import torch
from stepwire_kernels import reference, work_list
from stepwire_kernels.attention_decode import allocate_decode_workspace
from stepwire_kernels.attention_from_qkv import FromQkvTuning, HeadNorms, attention_from_qkv
from stepwire_kernels.work_list import ChunkPolicy

from tests.unit.kernels.checks import USUAL_DTYPES, assert_close
from tests.unit.kernels.paged_case import PagedCase, make_case
from tests.unit.kernels.test_rope_kv import tables

FINE = ChunkPolicy(64, 8)
LENS = [1, 64, 65, 140, 17]


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
        for run, length in enumerate(lens):
            last = length - 1
            block = int(case.block_tables[int(case.run_rows[run]), last // block_size])
            self.positions[run], self.slots[run] = last, block * block_size + last % block_size
            for cache in (case.k_cache, case.v_cache):
                cache.view(torch.uint8)[block, :, last % block_size] = 0xFF  # NaN in every dtype
        self.cos, self.sin = tables(max(lens), rotary_dim or head_dim, device)
        self.norms: HeadNorms | None = None
        if norm_offset is not None:
            self.norms = HeadNorms(
                *(torch.randn(head_dim, device=device).to(dtype) for _ in range(2)), 1e-6, norm_offset
            )

    def run(
        self, *, policy: ChunkPolicy = FINE, tuning: FromQkvTuning | None = None, **options: object
    ) -> torch.Tensor:
        case = self.case
        device = str(self.qkv.device)
        work = work_list.allocate_decode_list(case.kv_lens.numel(), case.q.shape[0], device, policy=policy)
        reach = {name: options[name] for name in ("window", "aligned") if name in options}
        work_list.build_decode_list(case.query_starts, case.kv_lens, case.run_rows, work, **reach)
        workspace = allocate_decode_workspace(work, self.num_heads, case.q.shape[2])
        workspace.partial_out.fill_(float("nan"))
        workspace.partial_sums.fill_(float("nan"))
        before = self.qkv.clone()
        out = attention_from_qkv(
            self.qkv, case.k_cache, case.v_cache, case.block_tables, self.positions, self.slots, self.cos, self.sin,
            work, workspace, case.softmax_scale, self.num_heads, norms=self.norms, interleaved=self.interleaved,
            tuning=tuning, **options,
        )  # fmt: skip
        assert torch.equal(self.qkv, before)
        return out

    def check(self, *, factor: float = 1.0, tuning: FromQkvTuning | None = None, **options: object) -> None:
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
        out = self.run(tuning=tuning, **options)
        runs = int((case.kv_lens > 0).sum())
        assert_close(out[:runs], twin[:runs], factor=factor)
        assert torch.equal(out[runs:], torch.zeros_like(out[runs:]))
        for cache, expected in zip((case.k_cache, case.v_cache), caches, strict=True):
            written = cache.float().nan_to_num(nan=77.0)
            assert_close(written, expected.double().nan_to_num(nan=77.0), dtype=cache.dtype)


@pytest.mark.parametrize("dtype", USUAL_DTYPES)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size", "rotary_dim", "interleaved", "norm_offset"),
    [
        (4, 1, 64, 16, 64, False, None),
        (4, 2, 80, 64, 32, False, None),
        (7, 1, 96, 32, 96, True, None),
        (2, 2, 128, 64, 128, False, 0.0),
        (2, 1, 128, 128, 64, True, 1.0),
        (2, 1, 64, 64, 2, False, None),
    ],
)
def test_matches_twins(
    device: str,
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    rotary_dim: int,
    interleaved: bool,
    norm_offset: float | None,
) -> None:
    Step(
        LENS, num_heads, num_kv_heads, head_dim, block_size, dtype, device,
        rotary_dim=rotary_dim, interleaved=interleaved, norm_offset=norm_offset,
    ).check()  # fmt: skip


@pytest.mark.parametrize(("window", "aligned"), [(1, False), (63, False), (130, False), (64, True), (20, True)])
def test_windows(device: str, window: int, aligned: bool) -> None:
    Step(LENS, 4, 2, 64, 16, torch.float32, device).check(window=window, aligned=aligned)


def test_soft_cap(device: str) -> None:
    step = Step([200, 31], 4, 2, 64, 32, torch.float32, device)
    step.qkv *= 4
    step.check(soft_cap=5.0, factor=3)


def test_sinks_join_one_and_many_chunks(device: str) -> None:
    sinks = torch.tensor([2.0, -1.0, 8.0, 0.0], device=device)
    Step([200, 31], 4, 2, 64, 32, torch.float32, device).check(sinks=sinks)


def test_padding_gets_zeros_and_write_nothing(device: str) -> None:
    step = Step([100, 4], 2, 1, 64, 16, torch.float32, device, padding_tokens=1)
    step.check(sinks=torch.zeros(2, device=device))


def test_float8_cache(device: str) -> None:
    step = Step([150, 21], 4, 2, 128, 64, torch.bfloat16, device, cache_dtype=torch.float8_e4m3fn)
    step.check(k_scale=0.75, v_scale=1.5)


@pytest.mark.parametrize("warps", [1, 4])
def test_chunks_of_several_tiles(device: str, warps: int) -> None:
    tuning = FromQkvTuning(num_warps=warps)
    step = Step([299, 40, 150], 4, 2, 64, 32, torch.float32, device, norm_offset=0.0)
    step.check(tuning=tuning)
    few = step.run(policy=ChunkPolicy(128, 4), tuning=tuning)
    assert_close(few, step.run(policy=FINE))


def test_chunks_that_begin_within_a_tile(device: str) -> None:
    step = Step([288], 2, 1, 64, 64, torch.float32, device)
    even = step.run(policy=ChunkPolicy(64, 8), tuning=FromQkvTuning(warp_tokens=64))
    # Three chunks of 96 tokens: the second's first tile of 64 goes over the edge of a block.
    odd = step.run(policy=ChunkPolicy(32, 8, 3), tuning=FromQkvTuning(warp_tokens=64))
    assert_close(odd, even)


def test_what_does_not_fit_is_refused(device: str) -> None:
    step = Step([5], 2, 1, 64, 16, torch.float32, device)
    step.num_heads = 3
    with pytest.raises(ValueError, match="qkv has 256 columns"):
        step.run()
    step = Step([5], 2, 1, 48, 16, torch.float32, device)
    with pytest.raises(ValueError, match="head dimension 48 is not one of"):
        step.run()
