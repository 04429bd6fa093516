from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from stepwire_kernels import reference
from stepwire_kernels.attention_fused import (
    FusedAttentionTuning,
    FusedAttentionWorkspace,
    HeadNorms,
    allocate_fused_attention_workspace,
    fused_decode_attention,
)

from tests.unit.kernels.checks import USUAL_DTYPES, assert_close, poison
from tests.unit.kernels.paged_case import PagedCase, make_case
from tests.unit.kernels.test_rope_kv import tables

MAX_POSITION = 1024
SMALL = FusedAttentionTuning(num_warps=2, num_stages=1, splits=4)


@dataclass
class Step:
    """A paged batch whose last tokens are in the packed projection and not in the caches."""

    case: PagedCase
    qkv: torch.Tensor  # [num_runs, (num_heads + 2 * num_kv_heads) * D]
    cos: torch.Tensor
    sin: torch.Tensor
    norms: HeadNorms | None
    workspace: FusedAttentionWorkspace

    @property
    def num_heads(self) -> int:
        return self.case.q.shape[1]

    def run(self, *, tuning: FusedAttentionTuning = SMALL, **options: object) -> torch.Tensor:
        case = self.case
        for part in (self.workspace.partial_out, self.workspace.partial_sums):
            part.fill_(float("nan"))
        out = poison(*case.q.shape, dtype=self.qkv.dtype, device=str(self.qkv.device))
        fused_decode_attention(
            self.qkv, case.k_cache, case.v_cache, case.kv_lens, case.run_rows, case.block_tables, self.cos, self.sin,
            self.workspace, case.softmax_scale, norms=self.norms, out=out, tuning=tuning, **options,
        )  # fmt: skip
        assert not self.workspace.counters.any()
        return out

    def twin(self, *, interleaved: bool = False, **options: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output and both caches: float64, or float8 caches as the twin fills them."""
        case = self.case
        caches = [c.clone() if c.dtype == torch.float8_e4m3fn else c.double() for c in (case.k_cache, case.v_cache)]
        positions = (case.kv_lens - 1).clamp(min=0)
        blocks = case.block_tables[case.run_rows.long()].gather(1, (positions // caches[0].shape[2]).long()[:, None])
        slots = blocks[:, 0] * caches[0].shape[2] + positions % caches[0].shape[2]
        slots[case.kv_lens == 0] = -1
        scales = {name: value for name, value in options.items() if name in ("k_scale", "v_scale")}
        norms = {}
        if self.norms is not None:
            norms = {"q_norm": self.norms.query.double(), "k_norm": self.norms.key.double(),
                     "norm_eps": self.norms.eps, "norm_offset": self.norms.weight_offset}  # fmt: skip
        queries = reference.rope_and_write_kv(
            self.qkv.double(), *caches, positions, slots, self.cos.double(), self.sin.double(), self.num_heads,
            interleaved=interleaved, **norms, **scales,
        )  # fmt: skip
        whole = PagedCase(
            queries, *caches, case.block_tables, case.query_starts, case.kv_lens, case.run_rows, case.softmax_scale
        )
        return whole.twin(**options), *caches


def make_step(
    lens: list[int],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    device: str,
    *,
    rotary_dim: int | None = None,
    has_norm: bool = False,
    cache_dtype: torch.dtype | None = None,
    padding_tokens: int = 0,
) -> Step:
    case = make_case(
        [(1, length - 1) for length in lens], num_heads, num_kv_heads, head_dim, block_size, dtype, device,
        cache_dtype=cache_dtype, padding_tokens=padding_tokens,
    )  # fmt: skip
    # The newest tokens' places hold nothing yet.
    for run, length in enumerate(lens):
        block = case.block_tables[case.run_rows[run], (length - 1) // block_size]
        for cache in (case.k_cache, case.v_cache):
            cache[block, :, (length - 1) % block_size] = float("nan")
    qkv = torch.randn(case.q.shape[0], (num_heads + 2 * num_kv_heads) * head_dim, device=device).to(dtype)
    cos, sin = tables(MAX_POSITION, rotary_dim or head_dim, device)
    norms = None
    if has_norm:
        norms = HeadNorms(*(torch.randn(head_dim, device=device).to(dtype) for _ in range(2)), 1e-6, 1.0)
    workspace = allocate_fused_attention_workspace(len(lens) + 1, num_heads, num_kv_heads, head_dim, device)
    return Step(case, qkv, cos, sin, norms, workspace)


LENS = [1, 64, 65, 200]
CASES = [
    # heads, kv heads, head dim, rotary dim, block size, interleaved, norm
    (4, 1, 64, 64, 16, False, False),
    (4, 2, 128, 128, 64, False, True),
    (2, 2, 80, 32, 64, False, False),
    (7, 1, 96, 96, 32, True, False),
    (2, 1, 256, 64, 128, False, True),
]


@pytest.mark.parametrize("dtype", USUAL_DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_matches_twin(device: str, dtype: torch.dtype, case: tuple) -> None:
    num_heads, num_kv_heads, head_dim, rotary_dim, block_size, interleaved, has_norm = case
    step = make_step(
        LENS, num_heads, num_kv_heads, head_dim, block_size, dtype, device, rotary_dim=rotary_dim, has_norm=has_norm
    )
    before = step.qkv.clone()
    twin, k_cache, v_cache = step.twin(interleaved=interleaved)
    out = step.run(interleaved=interleaved)
    assert_close(out, twin)
    for cache, expected in ((step.case.k_cache, k_cache), (step.case.v_cache, v_cache)):
        known = ~expected.isnan()
        assert torch.equal(cache.isnan(), ~known)
        assert_close(cache[known], expected[known])
    assert torch.equal(step.qkv, before)


@pytest.mark.parametrize("window", [1, 63, 64, 130])
def test_sliding_window(device: str, window: int) -> None:
    step = make_step(LENS, 4, 2, 64, 16, torch.float32, device)
    twin = step.twin(window=window)[0]
    assert_close(step.run(window=window), twin)


def test_soft_cap_and_sinks(device: str) -> None:
    step = make_step([200, 30], 4, 2, 64, 32, torch.float32, device)
    step.qkv *= 4
    options = {"soft_cap": 5.0, "sinks": torch.tensor([2.0, -1.0, 8.0, 0.0], device=device)}
    twin = step.twin(**options)[0]
    assert_close(step.run(**options), twin, factor=3)


def test_padding_gets_zeros_and_writes_nothing(device: str) -> None:
    step = make_step([100, 4], 2, 1, 64, 16, torch.float32, device, padding_tokens=1)
    scratch = step.case.k_cache[0].clone()
    twin = step.twin()[0]
    out = step.run()
    assert_close(out[:2], twin[:2])
    assert torch.equal(out[2:], torch.zeros_like(out[2:]))
    assert torch.equal(step.case.k_cache[0], scratch) or scratch.isnan().all()


def test_float8_cache(device: str) -> None:
    step = make_step([150, 21], 4, 2, 128, 64, torch.bfloat16, device, cache_dtype=torch.float8_e4m3fn)
    options = {"k_scale": 0.75, "v_scale": 1.5}
    twin = step.twin(**options)[0]
    assert_close(step.run(**options), twin, factor=2)


def test_result_is_the_same_again(device: str) -> None:
    step = make_step([300, 40], 4, 2, 64, 32, torch.bfloat16, device)
    first = step.run()
    assert torch.equal(step.run(), first)
    assert_close(step.run(tuning=FusedAttentionTuning(num_warps=2, num_stages=1, splits=32)), first, factor=2)


def test_misfits_are_refused(device: str) -> None:
    step = make_step([5], 2, 1, 64, 16, torch.float32, device)
    step.qkv = step.qkv[:, :100]
    with pytest.raises(ValueError, match="qkv must be"):
        step.run()
    step = make_step([5], 2, 1, 48, 16, torch.float32, device)
    with pytest.raises(ValueError, match="head dimension 48 is not one of"):
        step.run()
