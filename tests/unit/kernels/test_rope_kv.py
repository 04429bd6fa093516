from __future__ import annotations

import pytest
import torch
from stepwire_kernels import reference
from stepwire_kernels.rope_kv import rope_and_write_kv

from tests.unit.kernels.checks import USUAL_DTYPES, assert_close, poison


def tables(max_position: int, rotary_dim: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    inverse = 10000.0 ** -(torch.arange(0, rotary_dim, 2, device=device) / rotary_dim)
    angles = torch.arange(max_position, device=device)[:, None] * inverse[None, :]
    return angles.cos().contiguous(), angles.sin().contiguous()


CASES = [
    # tokens, heads, kv heads, head dim, rotary dim, interleaved, norm, norm offset
    (1, 4, 2, 64, 64, False, False, 0.0),
    (7, 3, 1, 128, 128, False, True, 0.0),
    (5, 2, 2, 80, 32, False, False, 0.0),
    (5, 2, 1, 96, 96, True, False, 0.0),
    (70, 2, 1, 64, 32, True, True, 0.0),
    (3, 2, 1, 256, 256, False, True, 1.0),
    (3, 2, 1, 80, 20, False, True, 0.0),
]


@pytest.mark.parametrize("dtype", USUAL_DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_matches_twin(device: str, dtype: torch.dtype, case: tuple) -> None:
    num_tokens, num_heads, num_kv_heads, head_dim, rotary_dim, interleaved, has_norm, norm_offset = case
    block_size, num_blocks = 16, 8
    qkv = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, device=device).to(dtype)
    positions = torch.randint(0, 50, (num_tokens,), dtype=torch.int32, device=device)
    slots = torch.randperm(num_blocks * block_size, device=device)[:num_tokens].to(torch.int32)
    if num_tokens > 3:
        slots[1] = -1
    cos, sin = tables(50, rotary_dim, device)
    norms = {}
    if has_norm:
        norms = {
            "q_norm": torch.randn(head_dim, device=device).to(dtype),
            "k_norm": torch.randn(head_dim, device=device).to(dtype),
            "norm_offset": norm_offset,
        }
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    twin_k = torch.full(shape, 7.0, dtype=torch.float64, device=device)
    twin_v = twin_k.clone()
    wide_norms = {name: value.double() if torch.is_tensor(value) else value for name, value in norms.items()}
    twin_q = reference.rope_and_write_kv(
        qkv.double(), twin_k, twin_v, positions, slots, cos.double(), sin.double(), num_heads,
        interleaved=interleaved, **wide_norms,
    )  # fmt: skip

    k_cache, v_cache = (torch.full(shape, 7.0, dtype=dtype, device=device) for _ in range(2))
    q_out = poison(num_tokens, num_heads, head_dim, dtype=dtype, device=device)
    before = qkv.clone()
    rope_and_write_kv(
        qkv, k_cache, v_cache, positions, slots, cos, sin, num_heads, interleaved=interleaved, q_out=q_out, **norms
    )
    assert_close(q_out, twin_q)
    assert_close(k_cache, twin_k)
    assert_close(v_cache, twin_v)
    assert torch.equal(qkv, before)

    # In place: the same numbers, and k and v of the packed projection stay as they were.
    in_place = rope_and_write_kv(
        qkv, k_cache, v_cache, positions, slots, cos, sin, num_heads, interleaved=interleaved, **norms
    )
    assert torch.equal(in_place, q_out)
    assert torch.equal(qkv[:, num_heads * head_dim :], before[:, num_heads * head_dim :])


PROJECTIONS = [{"keys_are_values": True}, {"norms_values": True}, {"keys_are_values": True, "norms_values": True}]


@pytest.mark.parametrize("dtype", USUAL_DTYPES)
@pytest.mark.parametrize("options", PROJECTIONS)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 32), (512, 512)])
def test_values_that_are_keys_or_normed(
    device: str, dtype: torch.dtype, options: dict[str, bool], head_dim: int, rotary_dim: int
) -> None:
    num_tokens, num_heads, num_kv_heads = 5, 3, 2
    num_projected = num_heads + (1 if "keys_are_values" in options else 2) * num_kv_heads
    qkv = torch.randn(num_tokens, num_projected * head_dim, device=device).to(dtype)
    positions = torch.randint(0, 50, (num_tokens,), dtype=torch.int32, device=device)
    slots = torch.tensor([3, 40, -1, 17, 0], dtype=torch.int32, device=device)
    cos, sin = tables(50, rotary_dim, device)
    q_norm, k_norm = (torch.randn(head_dim, device=device).to(dtype) for _ in range(2))
    shape = (3, num_kv_heads, 16, head_dim)
    twins = [torch.full(shape, 7.0, dtype=torch.float64, device=device) for _ in range(2)]
    twin_q = reference.rope_and_write_kv(
        qkv.double(), *twins, positions, slots, cos.double(), sin.double(), num_heads,
        q_norm=q_norm.double(), k_norm=k_norm.double(), **options,
    )  # fmt: skip
    caches = [torch.full(shape, 7.0, dtype=dtype, device=device) for _ in range(2)]
    q = rope_and_write_kv(qkv, *caches, positions, slots, cos, sin, num_heads, q_norm=q_norm, k_norm=k_norm, **options)
    assert_close(q, twin_q)
    for cache, twin in zip(caches, twins, strict=True):
        assert_close(cache, twin)


def test_queries_alone_touch_no_cache(device: str) -> None:
    num_tokens, num_heads, head_dim = 5, 4, 64
    qkv = torch.randn(num_tokens, num_heads * head_dim, device=device)
    positions = torch.randint(0, 50, (num_tokens,), dtype=torch.int32, device=device)
    slots = torch.arange(num_tokens, dtype=torch.int32, device=device)
    cos, sin = tables(50, head_dim, device)
    caches = [torch.full((2, 2, 16, head_dim), 7.0, device=device) for _ in range(2)]
    q_norm = torch.randn(head_dim, device=device)
    twin = reference.rope_and_write_kv(
        qkv.double(), *caches, positions, slots, cos.double(), sin.double(), num_heads,
        q_norm=q_norm.double(), only_queries=True,
    )  # fmt: skip
    q = rope_and_write_kv(qkv, *caches, positions, slots, cos, sin, num_heads, q_norm=q_norm, only_queries=True)
    assert_close(q, twin)
    assert all(torch.equal(cache, torch.full_like(cache, 7.0)) for cache in caches)


def test_float8_cache_scales_and_saturates(device: str) -> None:
    num_tokens, num_heads, num_kv_heads, head_dim = 6, 2, 2, 64
    qkv = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, device=device).to(torch.bfloat16)
    qkv[0] *= 1e4
    positions = torch.arange(num_tokens, dtype=torch.int32, device=device)
    slots = torch.arange(20, 20 + num_tokens, dtype=torch.int32, device=device)
    cos, sin = tables(16, head_dim, device)
    shape = (3, num_kv_heads, 16, head_dim)
    caches = [torch.zeros(shape, device=device).to(torch.float8_e4m3fn) for _ in range(4)]
    rope_and_write_kv(qkv.clone(), *caches[:2], positions, slots, cos, sin, num_heads, k_scale=0.5, v_scale=0.02)
    reference.rope_and_write_kv(
        qkv.double(), *caches[2:], positions, slots, cos, sin, num_heads, k_scale=0.5, v_scale=0.02
    )
    for cache, twin in ((caches[0], caches[2]), (caches[1], caches[3])):
        assert torch.isfinite(cache.float()).all()
        # The twin rounds from float64: a rare value on a rounding edge may fall one step to the other side.
        assert (cache.view(torch.uint8) != twin.view(torch.uint8)).float().mean() < 2e-3
        assert_close(cache.float(), twin.float(), dtype=torch.float8_e4m3fn)
    assert caches[0].float().abs().max() == 448.0


def test_mismatched_shapes_are_refused(device: str) -> None:
    cache = torch.zeros(1, 2, 16, 64, device=device)
    cos, sin = tables(4, 64, device)
    ints = torch.zeros(1, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="qkv has 100 columns"):
        rope_and_write_kv(torch.zeros(1, 100, device=device), cache, cache, ints, ints, cos, sin, 4)
    with pytest.raises(ValueError, match="both q_norm and k_norm"):
        rope_and_write_kv(
            torch.zeros(1, 512, device=device), cache, cache, ints, ints, cos, sin, 4, q_norm=torch.ones(64)
        )
