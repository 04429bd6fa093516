from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from stepwire_kernels import reference_steps
from stepwire_kernels.philox import gumbel_of_tokens


@triton.jit
def _noise_kernel(out_ptr, seed_low, seed_high, sequence_index, position, count, BLOCK: tl.constexpr):
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = tl.full([], 0, tl.int32) + seed_low
    high = tl.full([], 0, tl.int32) + seed_high
    noise = gumbel_of_tokens(low, high, sequence_index, position, tokens)
    tl.store(out_ptr + tokens, noise, mask=tokens < count)


def test_words_match_the_published_vectors() -> None:
    # Known-answer tests of the Random123 distribution, philox4x32 with 10 rounds.
    zero = reference_steps.philox_words(0, np.zeros((1, 4), dtype=np.uint32))
    assert [hex(word) for word in zero[0]] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]
    ones = reference_steps.philox_words(2**64 - 1, np.full((1, 4), 0xFFFFFFFF, dtype=np.uint32))
    assert [hex(word) for word in ones[0]] == ["0x408f276d", "0x41c83b0e", "0xa20bc7c6", "0x6d5451fd"]


def test_kernel_noise_matches_twin(device: str) -> None:
    count = 9000
    out = torch.full((count,), float("nan"), device=device)
    seed = (123456789 << 32) | 0x7EDCBA98
    _noise_kernel[(triton.cdiv(count, 1024),)](out, seed & 0xFFFFFFFF, seed >> 32, 3, 77, count, BLOCK=1024)
    twin = torch.from_numpy(reference_steps.gumbel_noise(seed, 3, 77, count))
    assert torch.allclose(out.cpu(), twin, atol=2e-5, rtol=2e-6)


def test_noise_is_gumbel_and_differs_by_every_key() -> None:
    base = reference_steps.gumbel_noise(5, 0, 10, 50_000)
    # Mean is Euler's constant, variance pi^2 / 6.
    assert abs(base.mean() - 0.5772) < 0.03 and abs(base.var() - 1.6449) < 0.06
    for other in (
        reference_steps.gumbel_noise(6, 0, 10, 50_000),
        reference_steps.gumbel_noise(5 + 2**32, 0, 10, 50_000),
        reference_steps.gumbel_noise(5, 1, 10, 50_000),
        reference_steps.gumbel_noise(5, 0, 11, 50_000),
    ):
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.02
