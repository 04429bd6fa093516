"""The noise stream: Philox's published vectors, the kernels' stream, and its distribution."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.philox import gumbel_noise, gumbel_noise_all, philox4x32


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # Known answers of Random123's philox4x32-10 (kat_vectors).
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
            (0xFFFFFFFF, 0xFFFFFFFF),
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    words = philox4x32(key[0] | key[1] << 32, np.array([counter[0]], dtype=np.uint32), *counter[1:])
    assert tuple(int(word[0]) for word in words) == expected


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    sequence_index=st.integers(0, 2**32 - 1),
    position=st.integers(0, 2**32 - 1),
    vocab_size=st.integers(1, 10_000),
    data=st.data(),
)
def test_some_tokens_have_the_noise_that_all_have(
    seed: int, sequence_index: int, position: int, vocab_size: int, data: st.DataObject
) -> None:
    every = gumbel_noise_all(seed, sequence_index, position, vocab_size)
    assert every.shape == (vocab_size,) and every.dtype == np.float32
    assert np.isfinite(every).all()
    ids = np.array(data.draw(st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=20)))
    assert (gumbel_noise(seed, sequence_index, position, ids) == every[ids]).all()
    # A longer vocabulary goes on where the shorter one ends.
    assert (gumbel_noise_all(seed, sequence_index, position, vocab_size + 777)[:vocab_size] == every).all()


@pytest.mark.parametrize(
    ("seed", "sequence_index", "position"), [(0, 0, 0), (2**63 + 12345, 3, 8191), (7, 2**32 - 1, 1)]
)
def test_the_kernels_draw_the_same_stream(seed: int, sequence_index: int, position: int) -> None:
    reference_steps = pytest.importorskip("stepwire_kernels.reference_steps", reason="triton is not installed")
    expected = reference_steps.gumbel_noise(seed, sequence_index, position, 9000)
    np.testing.assert_allclose(gumbel_noise_all(seed, sequence_index, position, 9000), expected, rtol=1e-5, atol=2e-6)


def test_noise_has_the_gumbel_distribution() -> None:
    noise = np.sort(gumbel_noise_all(3, 0, 11, 200_000).astype(np.float64))
    empirical = (np.arange(len(noise)) + 0.5) / len(noise)
    # Kolmogorov-Smirnov: beyond 1.95 / sqrt(n) has a chance of 0.1 %.
    assert np.abs(np.exp(-np.exp(-noise)) - empirical).max() < 1.95 / np.sqrt(len(noise))


def test_the_largest_word_gives_a_finite_value() -> None:
    from gpu_worker.philox import _gumbel

    extremes = _gumbel(np.array([0, 1, 2**31, 2**32 - 2, 2**32 - 1], dtype=np.uint32))
    assert np.isfinite(extremes).all()
    assert (np.diff(extremes) <= 0).all()
