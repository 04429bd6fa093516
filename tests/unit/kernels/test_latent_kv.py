from __future__ import annotations

import pytest
import torch
from stepwire_kernels import reference
from stepwire_kernels.latent_kv import rotate_and_write_latent

from tests.unit.kernels.checks import USUAL_DTYPES, assert_close
from tests.unit.kernels.test_rope_kv import tables


@pytest.mark.parametrize("dtype", USUAL_DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "kv_rank", "rope_dim", "interleaved"),
    [(1, 4, 512, 64, True), (5, 3, 24, 8, False), (70, 2, 40, 16, True)],
)
def test_matches_twin(
    device: str, dtype: torch.dtype, num_tokens: int, num_heads: int, kv_rank: int, rope_dim: int, interleaved: bool
) -> None:
    dim = kv_rank + rope_dim
    query = torch.randn(num_tokens, num_heads, dim, device=device).to(dtype)
    # A part of something wider, as a projection's output may be.
    cached = torch.randn(num_tokens, dim + 5, device=device).to(dtype)[:, :dim]
    positions = torch.randint(0, 50, (num_tokens,), dtype=torch.int32, device=device)
    slots = torch.randperm(8 * 16, device=device)[:num_tokens].to(torch.int32)
    if num_tokens > 3:
        slots[1] = -1
    cos, sin = tables(50, rope_dim, device)
    twin_query, twin_cache = query.double(), torch.full((8, 1, 16, dim), 7.0, dtype=torch.float64, device=device)
    reference.rotate_and_write_latent(
        twin_query, cached.double(), twin_cache, positions, slots, cos.double(), sin.double(), interleaved=interleaved
    )
    cache = torch.full((8, 1, 16, dim), 7.0, dtype=dtype, device=device)
    before, cached_before = query.clone(), cached.clone()
    rotate_and_write_latent(query, cached, cache, positions, slots, cos, sin, interleaved=interleaved)
    assert_close(query, twin_query)
    assert_close(cache, twin_cache)
    assert torch.equal(query[..., :kv_rank], before[..., :kv_rank])
    assert torch.equal(cached, cached_before)


def test_float8_cache_scales_and_saturates(device: str) -> None:
    query = torch.randn(6, 2, 80, device=device).bfloat16()
    cached = torch.randn(6, 80, device=device).bfloat16()
    cached[0] *= 1e4
    positions = torch.arange(6, dtype=torch.int32, device=device)
    slots = positions + 20
    cos, sin = tables(16, 16, device)
    cache, twin = (torch.zeros(3, 1, 16, 80, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    twin_query = query.double()
    rotate_and_write_latent(query, cached, cache, positions, slots, cos, sin, scale=0.5)
    reference.rotate_and_write_latent(twin_query, cached.double(), twin, positions, slots, cos, sin, scale=0.5)
    assert torch.isfinite(cache.float()).all() and cache.float().abs().max() == 448.0
    assert_close(cache.float(), twin.float(), dtype=torch.float8_e4m3fn)


def test_mismatched_shapes_are_refused(device: str) -> None:
    cos, sin = tables(4, 8, device)
    ints = torch.zeros(2, dtype=torch.int32, device=device)
    query, cached = torch.zeros(2, 3, 40, device=device), torch.zeros(2, 40, device=device)
    with pytest.raises(ValueError, match=r"needs cached \(2, 40\)"):
        rotate_and_write_latent(query, cached, torch.zeros(1, 2, 16, 40, device=device), ints, ints, cos, sin)
    with pytest.raises(ValueError, match="contiguous"):
        rotate_and_write_latent(
            query.transpose(0, 1).contiguous().transpose(0, 1), cached, torch.zeros(1, 1, 16, 40, device=device),
            ints, ints, cos, sin,
        )  # fmt: skip
