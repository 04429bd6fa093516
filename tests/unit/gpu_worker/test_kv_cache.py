"""The memory budget: what follows from it, and which number an error names."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.kv_cache import (
    FIRST_BLOCK_ID,
    GIB,
    KVCache,
    KVCacheShape,
    MemoryBudgetError,
    MemoryPlan,
    longest_sequence,
    plan_cpu_memory,
    plan_cuda_memory,
)

# Llama-3-8B in bfloat16: 128 KiB a token.
LLAMA_8B = KVCacheShape(num_layers=32, num_kv_heads=8, block_size=16, head_dim=128, dtype=torch.bfloat16)


def test_a_block_s_bytes_are_all_layers_keys_and_values() -> None:
    assert LLAMA_8B.block_bytes == 16 * 128 * 1024
    cache = KVCache(KVCacheShape(3, 2, 4, 8, torch.float32), num_blocks=5, device=torch.device("cpu"))
    held = sum(layer.numel() * layer.element_size() for layer in cache.layers)
    assert held == 5 * cache.shape.block_bytes
    assert not any(layer.any() for layer in cache.layers)


def cpu(kv_cache_gib: float, max_model_len: int = 8192, max_num_seqs: int = 64, available: int | None = None) -> int:
    return plan_cpu_memory(
        LLAMA_8B,
        kv_cache_gib=kv_cache_gib,
        weight_bytes=16 * GIB,
        activation_bytes=GIB // 2,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        available_bytes=available,
    ).num_blocks


def test_the_cpu_pool_is_what_was_asked_for_and_no_more_than_rows_can_fill() -> None:
    assert cpu(2.0) == 1024
    assert cpu(100.0, max_model_len=1000, max_num_seqs=2) == FIRST_BLOCK_ID + 2 * 63


def test_a_pool_below_one_sequence_names_both_settings_and_values_that_do() -> None:
    with pytest.raises(MemoryBudgetError) as error:
        cpu(0.5)
    message = str(error.value)
    assert "cpu_kv_cache_gib 0.5" in message and "max_model_len is 8192" in message
    enough = re.search(r"--cpu-kv-cache-gib ([\d.]+)", message)
    shorter = re.search(r"--max-model-len (\d+)", message)
    assert enough is not None and shorter is not None
    assert cpu(float(enough[1])) >= 513
    assert cpu(0.5, max_model_len=int(shorter[1])) == 256


def test_a_machine_with_too_little_memory_is_told_what_fits() -> None:
    with pytest.raises(MemoryBudgetError) as error:
        cpu(8.0, available=4 * GIB)
    fits = re.search(r"--cpu-kv-cache-gib ([\d.]+)", str(error.value))
    assert fits is not None and cpu(float(fits[1]), available=4 * GIB) > 0
    assert cpu(3.4, available=4 * GIB) == 1740


def cuda(utilization: float, weights: float = 15.0, max_model_len: int = 8192, total: float = 80.0) -> int:
    return plan_cuda_memory(
        LLAMA_8B,
        total_bytes=int(total * GIB),
        utilization=utilization,
        weight_bytes=int(weights * GIB),
        activation_bytes=GIB,
        max_model_len=max_model_len,
        max_num_seqs=256,
        device="cuda:0",
    ).num_blocks


def test_the_cuda_pool_is_what_weights_and_activations_leave() -> None:
    assert cuda(0.9) == int((80 * 0.9 - 16) * GIB) // LLAMA_8B.block_bytes


@pytest.mark.parametrize(("utilization", "weights"), [(0.1, 15.0), (0.25, 19.2), (0.2, 15.0)])
def test_a_cuda_budget_that_is_too_small_names_a_utilization_that_does(utilization: float, weights: float) -> None:
    with pytest.raises(MemoryBudgetError) as error:
        cuda(utilization, weights)
    named = re.search(r"--gpu-memory-utilization (?:above )?([\d.]+)", str(error.value))
    assert named is not None
    # Weights alone may be in the way; the second message then names the pool's part.
    better = float(named[1])
    if "above" in str(error.value):
        better += 0.05
    assert cuda(better, weights) > 0


def test_weights_larger_than_the_device_get_other_advice() -> None:
    with pytest.raises(MemoryBudgetError, match="tensor-parallel-size"):
        cuda(0.9, weights=140.0)


@settings(max_examples=100, deadline=None)
@given(st.floats(0.01, 20), st.integers(1, 100_000))
def test_the_longest_sequence_of_a_budget_fits_it_exactly(gib: float, extra: int) -> None:
    longest = longest_sequence(LLAMA_8B, int(gib * GIB))
    if longest <= 0:
        return
    assert cpu(gib, max_model_len=longest, max_num_seqs=1) == FIRST_BLOCK_ID + longest // 16
    with pytest.raises(MemoryBudgetError):
        cpu(gib, max_model_len=longest + extra)


def test_the_printed_table_adds_up() -> None:
    plan = plan_cuda_memory(
        LLAMA_8B,
        total_bytes=80 * GIB,
        utilization=0.9,
        weight_bytes=15 * GIB,
        activation_bytes=GIB,
        max_model_len=8192,
        max_num_seqs=256,
        device="cuda:0",
    )
    lines = plan.lines()
    sizes = {match[1].strip(): float(match[2]) for line in lines if (match := re.match(r"(.+?)\s+([\d.]+) GiB", line))}
    assert sizes["weights"] == 15 and sizes["activations"] == 1 and sizes["memory of cuda:0"] == 80
    assert sum(size for name, size in sizes.items() if name != "memory of cuda:0") == pytest.approx(80, abs=0.05)
    assert f"{plan.num_kv_tokens} tokens" in lines[-1] and plan.num_kv_tokens == (plan.num_blocks - 1) * 16


@pytest.mark.parametrize("num_spare", [0, 1])
@pytest.mark.parametrize("weights", [15.0, 15.2])
def test_states_of_rows_are_planned_beside_the_cache_and_too_many_name_how_many_fit(
    num_spare: int, weights: float
) -> None:
    def planned(max_num_seqs: int) -> MemoryPlan:
        return plan_cuda_memory(
            LLAMA_8B,
            total_bytes=80 * GIB,
            utilization=0.9,
            weight_bytes=int(weights * GIB),
            activation_bytes=GIB,
            max_model_len=8192,
            max_num_seqs=max_num_seqs,
            device="cuda:0",
            state_row_bytes=GIB // 4,
            num_state_rows=max_num_seqs + num_spare,
        )

    plan = planned(100 - num_spare)
    assert plan.kv_bytes <= 31 * GIB < plan.kv_bytes + plan.block_size * GIB
    assert any(re.match(r"states of rows +25\.00 GiB", line) for line in plan.lines())
    with pytest.raises(MemoryBudgetError, match=r"states of \d+ rows take 75\.00 GiB, .*--max-num-seqs (\d+)") as told:
        planned(300 - num_spare)
    fits = re.search(r"--max-num-seqs (\d+)", str(told.value))
    assert fits is not None and planned(int(fits[1])).num_blocks >= 513
    with pytest.raises(MemoryBudgetError):
        planned(int(fits[1]) + 1)


def cpu_with_states(kv_cache_gib: float, max_num_seqs: int, available_gib: float) -> MemoryPlan:
    return plan_cpu_memory(
        LLAMA_8B,
        kv_cache_gib=kv_cache_gib,
        weight_bytes=16 * GIB,
        activation_bytes=GIB // 2,
        max_model_len=8192,
        max_num_seqs=max_num_seqs,
        available_bytes=int(available_gib * GIB),
        state_row_bytes=GIB // 4,
        num_state_rows=max_num_seqs,
    )


def test_a_pool_that_leaves_no_room_for_states_is_told_one_that_does() -> None:
    with pytest.raises(MemoryBudgetError, match=r"2\.00 GiB of states of rows do not fit") as told:
        cpu_with_states(8.0, 8, available_gib=6)
    fits = re.search(r"--cpu-kv-cache-gib ([\d.]+)", str(told.value))
    assert fits is not None and cpu_with_states(float(fits[1]), 8, available_gib=6).num_blocks == 1792
    with pytest.raises(MemoryBudgetError, match="set a smaller --max-num-seqs and a smaller --cpu-kv-cache-gib"):
        cpu_with_states(8.0, 64, available_gib=6)
    with pytest.raises(MemoryBudgetError, match="--max-num-seqs 6 or less"):
        cpu_with_states(4.0, 8, available_gib=6)
    cpu_with_states(4.0, 6, available_gib=6)


def test_scrub_takes_out_what_is_not_finite_and_leaves_the_rest() -> None:
    cache = KVCache(KVCacheShape(2, 1, 2, 3, torch.bfloat16), num_blocks=4, device=torch.device("cpu"))
    for layer in cache.layers:
        layer.copy_(torch.randn_like(layer))
    before = [layer.clone() for layer in cache.layers]
    cache.layers[1][0, 2, 0, 1, 0] = float("nan")
    cache.layers[0][1, 3, 0, 0, 2] = float("inf")
    cache.scrub([2, 3])
    before[1][0, 2, 0, 1, 0] = 0
    before[0][1, 3, 0, 0, 2] = 0
    assert all(torch.equal(now, then) for now, then in zip(cache.layers, before, strict=True))


def test_keys_of_indexers_are_counted_and_scrubbed() -> None:
    shape = KVCacheShape(3, 1, 4, 8, torch.float32, 1, index_layers=(0, 2), index_dim=6)
    cache = KVCache(shape, num_blocks=5, device=torch.device("cpu"))
    held = [*cache.layers, *cache.index_keys.values()]
    assert sum(tensor.numel() * tensor.element_size() for tensor in held) == 5 * shape.block_bytes
    cache.index_keys[2][3, 1] = float("nan")
    cache.scrub([3])
    assert list(cache.index_keys) == [0, 2] and not cache.index_keys[2].any()
