"""The candidates of `load_tests.gpu.step_sweep`, which nobody looks at before a GPU is there."""

from __future__ import annotations

import pytest

from load_tests.gpu.step_sweep import FEW_TOKENS, MOST_HELD, held_candidates, tile_candidates
from load_tests.kernels.linears import MODELS

LAYERS = [
    (name, *shape)
    for model in ("qwen3-0.6b", "llama-3.2-1b", "llama-3.1-8b")
    for name, shape in MODELS[model].items()
    if name != "lm_head"
]


@pytest.mark.parametrize(("name", "n", "k"), LAYERS)
def test_what_few_tokens_try_fits_into_registers(name: str, n: int, k: int) -> None:
    num_rows = 2 if name == "gate_up" else 1
    found = list(held_candidates(n // num_rows, k, 2, num_rows))
    assert found and len(found) == len(set(found))
    for tuning in found:
        held = tuning.block_n * num_rows * tuning.block_k * tuning.ahead * 2 // (4 * 32 * tuning.num_warps)
        assert 0 < held <= MOST_HELD
        assert tuning.ahead * tuning.block_k < 2 * max(k, tuning.block_k)
    # Weights that fit into the device's registers are tried whole.
    if n * k <= 1 << 22 and name in ("o", "down"):
        assert any(tuning.ahead * tuning.block_k >= k for tuning in found)


@pytest.mark.parametrize(("name", "n", "k"), LAYERS)
@pytest.mark.parametrize("item_size", [1, 2])
@pytest.mark.parametrize("num_tokens", [8, 16, 32, 64, 128])
def test_tiles_have_all_their_tokens(name: str, n: int, k: int, item_size: int, num_tokens: int) -> None:
    found = list(tile_candidates(num_tokens, n, k, item_size))
    assert bool(found) == (num_tokens > 2 * FEW_TOKENS), name
    for tuning in found:
        assert tuning.is_filled_by(num_tokens)
        assert tuning.split_k == 1 or k // tuning.block_k >= 2 * tuning.split_k
