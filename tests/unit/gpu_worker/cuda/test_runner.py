"""The CUDA runner against the CPU runner: the same tokens, faults and log-probabilities from the same steps."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.llama import LlamaConfig
from transformers.models.qwen3 import Qwen3Config

from gpu_worker.config import WorkerSettings
from gpu_worker.runner import TorchRunner
from gpu_worker.runner_api import RowFaultCode, StepResult, TokenMask
from load_tests.cpu_worker.step_driver import StepDriver, greedy, sampling
from tests.unit.gpu_worker.cuda.inline_runner import load_inline
from tests.unit.gpu_worker.models.tiny_checkpoints import save_tiny

VOCAB_SIZE = 300


def save_model(directory: Path, kind: str, *, num_heads: int = 4, num_layers: int = 2, mlp_bias: bool = False) -> None:
    """Heads of a size that the kernels take, two for each head of keys and values."""
    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads // 2,
        "head_dim": 64,
        "max_position_embeddings": 128,
        "initializer_range": 0.15,
        "tie_word_embeddings": kind == "qwen3",
    }
    torch.manual_seed(7)
    config = Qwen3Config(**fields) if kind == "qwen3" else LlamaConfig(**fields, mlp_bias=mlp_bias)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)


@pytest.fixture(scope="module", params=["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp(request.param)
    # The interpreter's time goes with the heads; the kernels' own tests have many.
    save_model(directory, request.param, num_heads=2 if request.param == "llama" else 4)
    return directory


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer: rows and steps are alike with more of them, which those of `model_dir` have."""
    directory = tmp_path_factory.mktemp("llama")
    save_model(directory, "llama", num_heads=2, num_layers=1)
    return directory


def on_cpu(directory: Path) -> StepDriver:
    settings = WorkerSettings(
        model=directory,
        device="cpu",
        dtype="float32",
        block_size=16,
        max_num_seqs=4,
        max_model_len=96,
        cpu_kv_cache_gib=0.01,
        num_threads=1,
    )
    return StepDriver(TorchRunner.load(settings))


def both(directory: Path, **changes: Any) -> tuple[StepDriver, StepDriver]:
    return StepDriver(load_inline(directory, **changes)), on_cpu(directory)


def prompt(seed: int, length: int) -> list[int]:
    generator = np.random.default_rng(seed)
    return [int(token) for token in generator.integers(0, VOCAB_SIZE, length)]


def assert_same(ours: StepResult, theirs: StepResult) -> None:
    assert ours.rows.tolist() == theirs.rows.tolist()
    assert ours.token_ids.tolist() == theirs.token_ids.tolist()
    assert ours.offsets.tolist() == theirs.offsets.tolist()
    assert sorted((f.row, f.code) for f in ours.faults) == sorted((f.row, f.code) for f in theirs.faults)


def test_chunked_prefill_beside_decodes_gives_the_same_tokens(model_dir: Path) -> None:
    ours, theirs = both(model_dir, with_graphs=True)
    steps: list[dict[int, int] | None] = [{0: 20, 2: 7}, {0: 13, 2: 1}, {2: 1, 1: 3, 0: 1}, None, None]
    for driver in (ours, theirs):
        driver.add(0, prompt(1, 33), greedy())
        driver.add(2, prompt(2, 7), sampling(temperature=0.8, top_p=0.9, seed=2**63 + 11))
        driver.add(1, prompt(3, 3), sampling(temperature=1.2, top_k=5, seed=3))
    for runs in steps:
        results = [driver.step(runs) for driver in (ours, theirs)]
        assert_same(*results)
    assert [row.tokens for row in ours.rows.values()] == [row.tokens for row in theirs.rows.values()]


def test_attention_in_chunks_gives_the_same_tokens(tmp_path: Path) -> None:
    """Prompts that begin and end in chunks of 9 tokens, decodes that come to the next one; a layer that sees all."""
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "num_hidden_layers": 2}
    chunks = {"attention_chunk_size": 9, "no_rope_layer_interval": 2, "interleave_moe_layer_step": 3}
    save_tiny("llama4-plain", tmp_path, **sizes, **chunks)
    ours, theirs = both(tmp_path)
    for driver in (ours, theirs):
        driver.add(0, prompt(1, 24), greedy())
        driver.add(2, prompt(2, 8), greedy())
    for runs in ({0: 7, 2: 8}, {0: 17, 2: 1}, None, None, None):
        assert_same(ours.step(runs), theirs.step(runs))


def test_blocks_grow_and_a_prefix_is_shared(llama_dir: Path) -> None:
    ours, theirs = both(llama_dir)
    shared = prompt(4, 32)
    for driver in (ours, theirs):
        driver.add(0, [*shared, *range(14)], greedy())
    assert_same(ours.step(), theirs.step())
    for driver in (ours, theirs):
        driver.add(3, [*shared, 9], greedy(), prefix_of=0, num_shared_tokens=32)
    for _ in range(4):
        assert_same(ours.step(), theirs.step())
    assert len(ours.rows[0].blocks) == 4


def test_a_dropped_row_comes_back_and_another_takes_its_place(llama_dir: Path) -> None:
    ours, theirs = both(llama_dir)
    params = sampling(temperature=0.9, seed=5, repetition_penalty=1.3, frequency_penalty=0.2, presence_penalty=0.1)
    for driver in (ours, theirs):
        driver.add(0, prompt(5, 9), params)
        driver.add(1, prompt(6, 4), greedy())
    for _ in range(3):
        assert_same(ours.step(), theirs.step())
    for driver in (ours, theirs):
        tokens = driver.drop(0)
        driver.add(0, prompt(7, 5), greedy())
        driver.add(2, tokens, params, num_prompt_tokens=9)
    for _ in range(4):
        assert_same(ours.step(), theirs.step())


def test_logprobs_bias_and_suppressed_tokens(llama_dir: Path) -> None:
    ours, theirs = both(llama_dir)
    for driver in (ours, theirs):
        driver.add(0, prompt(8, 6), greedy(num_logprobs=4))
        driver.add(1, prompt(9, 6), sampling(temperature=0, bias={17: 80.0, 3: -2.5}, min_tokens=2, suppressed=[17]))
        driver.add(2, prompt(10, 3), greedy())
        driver.add(3, prompt(11, 3), sampling(temperature=0, num_logprobs=0))
    for number in range(4):
        ours_result, theirs_result = ours.step(), theirs.step()
        assert_same(ours_result, theirs_result)
        # The bias wins as soon as the token is no longer suppressed.
        assert (ours_result.token_ids[1] == 17) == (number >= 2)
        for name in ("logprobs", "top_logprobs"):
            np.testing.assert_allclose(getattr(ours_result, name), getattr(theirs_result, name), atol=2e-4)
        assert ours_result.top_token_ids is not None and theirs_result.top_token_ids is not None
        assert ours_result.top_token_ids.tolist() == theirs_result.top_token_ids.tolist()


def test_masks_of_grammar_and_allowed_tokens(llama_dir: Path) -> None:
    ours, theirs = both(llama_dir)
    for driver in (ours, theirs):
        driver.add(0, prompt(12, 5), greedy())
        driver.add(1, prompt(13, 5), sampling(temperature=0, allowed=[40, 41, 250]))
        driver.add(2, prompt(14, 5), greedy())
    bitmask = np.zeros((2, 10), dtype=np.uint32)
    bitmask[0, 250 // 32] = 1 << (250 % 32)
    bitmask[1, 3] = 0xF0
    mask = TokenMask(np.array([1, 2], dtype=np.uint32), bitmask)
    results = [driver.step(mask=mask) for driver in (ours, theirs)]
    assert_same(*results)
    assert results[0].token_ids[1] == 250 and 100 <= results[0].token_ids[2] < 104
    assert_same(ours.step(), theirs.step())
    nothing = TokenMask(np.array([1], dtype=np.uint32), np.zeros((1, 10), dtype=np.uint32))
    results = [driver.step(mask=nothing) for driver in (ours, theirs)]
    assert_same(*results)
    assert [(fault.row, fault.code) for fault in results[0].faults] == [(1, RowFaultCode.UNSUPPORTED)]


def test_bad_rows_fail_alone(llama_dir: Path) -> None:
    ours, theirs = both(llama_dir)
    for driver in (ours, theirs):
        driver.add(0, prompt(15, 5), greedy())
        driver.add(1, [4, VOCAB_SIZE], greedy())
    assert_same(ours.step(), theirs.step())
    for driver in (ours, theirs):
        del driver.rows[1]
        driver.rows[0].num_computed -= 1
        driver.add(2, prompt(16, 3), greedy())
    results = [driver.step({0: 2, 2: 3}) for driver in (ours, theirs)]
    assert_same(*results)
    assert [fault.code for fault in results[0].faults] == [RowFaultCode.POSITION_MISMATCH]


def test_a_row_that_is_not_finite_fails_and_is_forgotten(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_model(tmp_path, "llama", num_heads=2)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"][299] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    driver = StepDriver(load_inline(tmp_path))
    driver.add(0, [1, 2, 3], greedy())
    driver.add(1, [5, 299, 6, 7, 8], greedy())
    result = driver.step()
    assert result.rows.tolist() == [0]
    assert [(fault.row, fault.code) for fault in result.faults] == [(1, RowFaultCode.NOT_FINITE)]
    # The next rows get the blocks that hold what is not finite.
    poisoned = driver.rows.pop(1).blocks
    driver._free += poisoned
    driver.add(2, [9, 10, 11, 12, 13], greedy())
    assert not driver.step().faults
    assert set(driver.rows[2].blocks) & set(poisoned)
    assert not driver.step().faults
    assert [fault.code for fault in driver_step_of_forgotten(driver)] == [RowFaultCode.UNKNOWN_ROW]


def driver_step_of_forgotten(driver: StepDriver) -> list[Any]:
    from load_tests.cpu_worker.step_driver import DrivenRow

    driver.rows[1] = DrivenRow([1], 1, 0, [])
    return driver.step({1: 1}).faults


def test_rows_that_only_run_and_steps_without_runs(llama_dir: Path) -> None:
    ours, theirs = both(llama_dir)
    for driver in (ours, theirs):
        driver.add(0, prompt(17, 20), greedy())
        driver.add(1, prompt(18, 2), greedy())
    for runs in ({}, {0: 9}, {0: 1, 1: 1}, {0: 10, 1: 1}, None):
        assert_same(ours.step(runs), theirs.step(runs))


def test_prompts_beyond_the_buffer_travel_in_parts(llama_dir: Path) -> None:
    ours, theirs = both(llama_dir, buffer_words=128)
    for driver in (ours, theirs):
        for row in range(4):
            driver.add(row, prompt(19 + row, 25), sampling(temperature=0.7, seed=row, repetition_penalty=1.1))
    assert_same(ours.step(), theirs.step())
    assert_same(ours.step(), theirs.step())


def test_an_fp8_cache_is_close(llama_dir: Path) -> None:
    exact, rounded = StepDriver(load_inline(llama_dir)), StepDriver(load_inline(llama_dir, kv_cache_dtype="fp8"))
    assert rounded.facts.kv_cache_dtype == "float8_e4m3fn" and rounded.facts.block_bytes * 4 == exact.facts.block_bytes
    tops = []
    for driver in (exact, rounded):
        driver.add(0, prompt(30, 30), greedy(num_logprobs=0))
        driver.step({0: 17})
        tops.append(driver.step({0: 13}).logprobs)
    np.testing.assert_allclose(tops[0], tops[1], atol=0.3)


@pytest.mark.slow
def test_an_fp8_cache_takes_the_scales_of_the_checkpoint(llama_dir: Path, tmp_path: Path) -> None:
    """Keys and values far outside float8's range fit with their scales, and do not without them."""

    def logprobs(scales: dict[str, float], kv_cache_dtype: str = "fp8") -> Any:
        directory = tmp_path / f"{len(scales)}-{kv_cache_dtype}"
        directory.mkdir()
        tensors = load_file(llama_dir / "model.safetensors")
        for name, tensor in tensors.items():
            if "v_proj" in name:  # values a million times larger, outputs as many times smaller
                tensors[name] = tensor * 1e6
            if "o_proj" in name:
                tensors[name] = tensor / 1e6
        for name, scale in scales.items():
            layers = {key.split(".")[2] for key in tensors if ".layers." in key}
            tensors |= {f"model.layers.{layer}.self_attn.{name}": torch.tensor([scale]) for layer in layers}
        save_file(tensors, directory / "model.safetensors")
        shutil.copy(llama_dir / "config.json", directory)
        driver = StepDriver(load_inline(directory, kv_cache_dtype=kv_cache_dtype))
        driver.add(0, prompt(30, 30), greedy(num_logprobs=0))
        driver.step({0: 17})
        return driver.step({0: 13}).logprobs

    exact = logprobs({}, "auto")
    with_scales, without = logprobs({"k_scale": 0.5, "v_scale": 1e4}), logprobs({})
    # Without scales all values are clamped to one magnitude: attention's output is noise.
    assert np.abs(with_scales - exact).max() < 0.4 * np.abs(without - exact).max(), (with_scales, without, exact)


def test_reset_forgets_rows(llama_dir: Path) -> None:
    driver = StepDriver(load_inline(llama_dir))
    driver.add(0, [1, 2], greedy())
    driver.step()
    driver.runner.reset()
    assert [fault.code for fault in driver.step().faults] == [RowFaultCode.UNKNOWN_ROW]


def test_warming_up_disturbs_nobody(llama_dir: Path) -> None:
    ours, theirs = both(llama_dir)
    ours.runner.warm_up(32, (32,))  # type: ignore[attr-defined]
    for driver in (ours, theirs):
        driver.add(0, prompt(40, 18), greedy())
    for _ in range(3):
        assert_same(ours.step(), theirs.step())


def test_prompts_are_told_of_beside_decodes(llama_dir: Path) -> None:
    """Such steps run without a graph, and the rows beside them go on as ever."""
    drivers = both(llama_dir, with_graphs=True)
    steps: list[dict[int, int]] = [{0: 6, 2: 2}, {0: 3, 2: 1, 1: 1}, {2: 1, 1: 1, 0: 1}]
    told = []
    for driver in drivers:
        driver.add(0, prompt(1, 9), sampling(temperature=0.0, num_prompt_logprobs=3))
        driver.add(2, prompt(2, 2), sampling(temperature=0.8, seed=5))
        driver.add(1, prompt(3, 2), sampling(temperature=0.0, num_prompt_logprobs=0, num_logprobs=2))
    for runs in steps:
        results = [driver.step(runs) for driver in drivers]
        assert_same(*results)
        ours, theirs = (sorted(result.prompt_logprobs, key=lambda part: part.row) for result in results)
        told += ours
        assert [(part.row, part.start_position) for part in ours] == [(p.row, p.start_position) for p in theirs]
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(mine.logprobs, other.logprobs, atol=1e-4)
            np.testing.assert_allclose(mine.top_logprobs, other.top_logprobs, atol=1e-4)
            assert (mine.top_token_ids == other.top_token_ids).all() and (mine.ranks == other.ranks).all()
    assert [(part.row, part.start_position, part.top_token_ids.shape) for part in told] == [
        (0, 1, (6, 3)),
        (0, 7, (2, 3)),
        (1, 1, (1, 0)),
    ]
