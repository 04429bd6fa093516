"""The torch runner, driven with step batches: tokens equal transformers', and bad rows fail alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from gpu_worker.config import WorkerSettings
from gpu_worker.device import DeviceError
from gpu_worker.kv_cache import MemoryBudgetError
from gpu_worker.model_spec import ModelConfigError
from gpu_worker.runner import TorchRunner
from gpu_worker.runner_api import RowFaultCode, TokenMask
from load_tests.cpu_worker.step_driver import StepDriver, greedy, sampling
from tests.unit.gpu_worker.models.tiny_checkpoints import save_tiny

NUM_TOKENS = 32  # every sequence grows by two blocks


def load(directory: Path, **changes: Any) -> TorchRunner:
    values: dict[str, Any] = {"device": "cpu", "dtype": "float32", "cpu_kv_cache_gib": 0.5, "num_threads": 1}
    return TorchRunner.load(WorkerSettings(model=directory, **(values | changes)))


def prompts(vocab_size: int) -> list[list[int]]:
    """A dozen prompts of different lengths; half of them begin with the same 48 tokens: three blocks."""
    generator = torch.Generator().manual_seed(42)
    lengths = [1, 7, 16, 17, 33, 90, 5, 1, 16, 31, 64, 100]
    texts = [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]
    prefix = list(range(vocab_size // 3, vocab_size // 3 + 48))
    return [text if index < 6 else prefix + text for index, text in enumerate(texts)]


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny("llama", directory)
    return directory


@pytest.fixture(scope="module")
def sparse_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Queries attend to 8 tokens alone, by keys that are cached beside the others."""
    directory = tmp_path_factory.mktemp("sparse")
    # A token for padding is all zeros, and scores of zero tie.
    save_tiny("glm5-shared-choices", directory, pad_token_id=None)
    return directory


# How rows are laid out does not hang on the model's size. The default model's tokens are compared in every run:
# `test_the_default_model_says_what_transformers_would_say`.
@pytest.fixture(scope="module", params=["tiny", "sparse", pytest.param("smollm2", marks=pytest.mark.slow)])
def model_dir(request: pytest.FixtureRequest) -> Path:
    directory: Path = request.getfixturevalue(f"{request.param}_dir")
    return directory


class Served:
    """A model in our runner and in transformers, with what it says to each prompt, all of them run together."""

    def __init__(self, directory: Path, num_tokens: int = NUM_TOKENS, which: slice = slice(None)) -> None:
        self.runner = load(directory, max_model_len=256)
        self.reference: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.prompts = prompts(self.runner.describe().vocab_size)[which]
        driver = StepDriver(self.runner)
        for row, prompt in enumerate(self.prompts):
            driver.add(row, prompt, greedy())
        for _ in range(num_tokens):
            driver.step()
        self.greedy = [driver.rows[row].tokens for row in range(len(self.prompts))]

    def check_choices(self, num_tokens: int = NUM_TOKENS) -> None:
        """One forward pass of transformers over each finished sequence: its argmax at every place is our next token."""
        for sequence in self.greedy:
            first = len(sequence) - num_tokens
            with torch.inference_mode():
                logits = self.reference(torch.tensor([sequence])).logits[0, first - 1 : -1]
            assert logits.argmax(-1).tolist() == sequence[first:]


@pytest.fixture(scope="module")
def served(model_dir: Path) -> Served:
    return Served(model_dir)


def test_greedy_equals_transformers_choice_after_every_prefix(served: Served) -> None:
    assert len({tuple(sequence[-NUM_TOKENS:]) for sequence in served.greedy}) == len(served.prompts)
    served.check_choices()


def test_the_default_model_says_what_transformers_would_say(smollm2_dir: Path) -> None:
    Served(smollm2_dir, num_tokens=8, which=slice(1, None, 2)).check_choices(8)


@pytest.mark.parametrize("index", range(12))
def test_a_prompt_alone_gives_the_same_tokens(index: int, served: Served) -> None:
    driver = StepDriver(served.runner)
    driver.add(0, served.prompts[index], greedy())
    for _ in range(NUM_TOKENS):
        driver.step()
    assert driver.rows[0].tokens == served.greedy[index]


@pytest.mark.parametrize("index", range(12))
def test_greedy_equals_transformers_generate(index: int, served: Served) -> None:
    prompt = served.prompts[index]
    with torch.inference_mode():
        output = served.reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    assert served.greedy[index] == output[0].tolist()


def test_a_batch_of_16_with_shared_prefixes_gives_the_same_tokens(served: Served) -> None:
    driver = StepDriver(served.runner)
    batch = [*range(12), 6, 7, 8, 9]
    # The first prompt with the prefix computes it, the others take its three blocks.
    driver.add(6, served.prompts[6], greedy())
    driver.step()
    for row, index in enumerate(batch):
        if row != 6:
            shares = index >= 6
            driver.add(
                row,
                served.prompts[index],
                greedy(),
                prefix_of=6 if shares else None,
                num_shared_tokens=48 if shares else 0,
            )
    for _ in range(NUM_TOKENS):
        driver.step()
    for row, index in enumerate(batch):
        tokens = driver.rows[row].tokens[: len(served.greedy[index])]
        assert tokens == served.greedy[index], f"row {row}, prompt {index}"
    # The prefix was computed once and is in every table that needs it.
    assert all(driver.rows[row].blocks[:3] == driver.rows[6].blocks[:3] for row, i in enumerate(batch) if i >= 6)


@pytest.mark.parametrize("chunk", [1, 13, 16])
def test_chunked_prefill_in_mixed_steps_gives_the_same_tokens(chunk: int, served: Served) -> None:
    driver = StepDriver(served.runner)
    indices = [0, 5, 11] if chunk != 1 else [2, 4]
    for row, index in enumerate(indices):
        driver.add(row, served.prompts[index], greedy())
    while any(len(driver.rows[row].tokens) < len(served.greedy[index]) for row, index in enumerate(indices)):
        driver.step({row: min(chunk, driven.num_waiting) for row, driven in driver.rows.items()})
    for row, index in enumerate(indices):
        assert driver.rows[row].tokens[: len(served.greedy[index])] == served.greedy[index]


def test_forced_preemption_gives_the_same_tokens(served: Served) -> None:
    driver = StepDriver(served.runner)
    batch = list(range(12))
    for row in batch:
        driver.add(row, served.prompts[row], greedy())
    blocks_before: dict[int, list[int]] = {}
    for number in range(NUM_TOKENS + 40):
        if number and number % 8 == 0:
            # Every third row is thrown out, and comes back from its tokens on other blocks, in the same step.
            for row in [row for row in batch if (row + number // 8) % 3 == 0]:
                prompt_length = driver.rows[row].num_prompt_tokens
                blocks_before[row] = list(driver.rows[row].blocks)
                tokens = driver.drop(row)
                driver.add(row, tokens, greedy(), num_prompt_tokens=prompt_length)
        unfinished = {
            row: driven.num_waiting
            for row, driven in driver.rows.items()
            if len(driven.tokens) < len(served.greedy[row])
        }
        if not unfinished:
            break
        driver.step(unfinished)
    assert len(blocks_before) == 12
    for row in batch:
        assert driver.rows[row].tokens == served.greedy[row], f"prompt {row}"


def test_sampled_sequences_resume_as_they_would_have_gone_on(served: Served) -> None:
    """Seeded draws with penalties: alone, beside others, and preempted half way."""
    params = sampling(
        temperature=0.9, top_p=0.95, seed=2**63 + 5, sequence_index=1, repetition_penalty=1.2, frequency_penalty=0.1
    )
    prompt = served.prompts[4]
    expected = StepDriver(served.runner)
    expected.add(0, prompt, params)
    for _ in range(24):
        expected.step()
    other = StepDriver(served.runner)
    for row in range(4):
        other.add(row, served.prompts[row], sampling(seed=row))
    other.add(9, prompt, params)
    for number in range(24):
        if number == 11:
            tokens = other.drop(9)
            other.add(20, tokens, params, num_prompt_tokens=len(prompt))
        other.step()
    assert other.rows[20].tokens == expected.rows[0].tokens


@pytest.fixture
def tiny(tiny_dir: Path) -> StepDriver:
    return StepDriver(load(tiny_dir, cpu_kv_cache_gib=0.01, max_num_seqs=8, block_size=4))


def test_logprobs_equal_transformers(tiny: StepDriver, tiny_dir: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    tiny.add(0, [1, 2, 3], greedy(num_logprobs=5))
    tiny.add(1, [9, 8], greedy())
    result = tiny.step()
    with torch.inference_mode():
        expected = torch.log_softmax(reference(torch.tensor([[1, 2, 3]])).logits[0, -1], -1)
    top = expected.topk(5)
    assert result.logprobs is not None and result.top_logprobs is not None and result.top_token_ids is not None
    assert result.top_token_ids[0].tolist() == top.indices.tolist()
    np.testing.assert_allclose(result.top_logprobs[0], top.values, atol=1e-4)
    assert result.logprobs[0] == pytest.approx(float(top.values[0]), abs=1e-4)
    assert np.isnan(result.logprobs[1])
    assert result.offsets.tolist() == [0, 1, 2]


def test_a_token_mask_decides(tiny: StepDriver) -> None:
    tiny.add(0, [1, 2, 3], greedy())
    tiny.add(1, [4, 5], greedy())
    bitmask = np.zeros((1, 10), dtype=np.uint32)
    bitmask[0, 7] = 1 << 3
    result = tiny.step(mask=TokenMask(np.array([1], dtype=np.uint32), bitmask))
    assert result.rows.tolist() == [0, 1]
    assert result.token_ids[1] == 7 * 32 + 3


def test_rows_that_do_not_sample_give_nothing(tiny: StepDriver) -> None:
    tiny.add(0, list(range(20)), greedy())
    tiny.add(1, [7], greedy())
    result = tiny.step({0: 8, 1: 1})
    assert result.rows.tolist() == [1]
    only_chunk = tiny.step({0: 8})
    assert only_chunk.rows.tolist() == [] and only_chunk.offsets.tolist() == [0]
    assert only_chunk.forward_ns > 0


def test_a_bad_row_fails_and_its_neighbours_do_not_notice(tiny: StepDriver, tiny_dir: Path) -> None:
    undisturbed = StepDriver(load(tiny_dir, cpu_kv_cache_gib=0.01, max_num_seqs=8, block_size=4))
    for driver in (undisturbed, tiny):
        driver.add(0, [1, 2, 3], greedy())
    tiny.add(1, [4, 301], greedy())
    assert [(f.row, f.code) for f in tiny.step().faults] == [(1, RowFaultCode.BAD_TOKEN)]
    del tiny.rows[1]
    undisturbed.step()
    for _ in range(5):
        assert tiny.step().token_ids.tolist() == undisturbed.step().token_ids.tolist()


def test_weights_that_overflow_fail_the_row_by_name_and_leave_no_poison(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_tiny("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    # Token 300 is a bomb: whatever attends to it is not finite, everything else is sound.
    tensors["model.embed_tokens.weight"][300] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    driver = StepDriver(load(tmp_path, cpu_kv_cache_gib=0.01, max_num_seqs=4, block_size=4))
    driver.add(0, [1, 2, 3], greedy())
    driver.add(1, [5, 300, 6, 7, 8], greedy())
    result = driver.step()
    assert result.rows.tolist() == [0]
    assert [(fault.row, fault.code) for fault in result.faults] == [(1, RowFaultCode.NOT_FINITE)]
    assert "not finite" in result.faults[0].message
    # The blocks of the failed row go to the next one, whose last block is half empty.
    poisoned = driver.rows.pop(1).blocks
    driver._free += poisoned
    driver.add(2, [9, 10, 11, 12, 13], greedy())
    driver.step()
    assert set(driver.rows[2].blocks) & set(poisoned)
    for _ in range(6):
        assert not driver.step().faults


def test_reset_forgets_rows(tiny: StepDriver) -> None:
    tiny.add(0, [1, 2], greedy())
    tiny.step()
    tiny.runner.reset()
    assert [fault.code for fault in tiny.step().faults] == [RowFaultCode.UNKNOWN_ROW]


def test_an_indexer_that_would_choose_everything_is_left_out(sparse_dir: Path) -> None:
    """Where no sequence is longer than what it chooses."""
    save_tiny("glm5-shared-choices", sparse_dir.parent / "more", index_topk=64)
    dense = load(sparse_dir.parent / "more", max_model_len=64, cpu_kv_cache_gib=0.01)
    chosen = load(sparse_dir.parent / "more", max_model_len=65, cpu_kv_cache_gib=0.01)
    # Two of four layers keep a key of 18 numbers beside 32.
    assert [runner.describe().block_bytes for runner in (dense, chosen)] == [
        4 * 16 * 4 * 32,
        4 * 16 * (4 * 32 + 2 * 18),
    ]
    tokens = []
    for runner in (dense, chosen):
        driver = StepDriver(runner)
        driver.add(0, list(range(5, 38)), greedy())
        for _ in range(20):
            driver.step()
        tokens.append(driver.rows[0].tokens)
    assert tokens[0] == tokens[1]


def test_describe_says_what_was_loaded(tiny_dir: Path) -> None:
    facts = load(tiny_dir, cpu_kv_cache_gib=0.01, max_num_seqs=8, block_size=4, max_model_len=100).describe()
    assert facts.architecture == "LlamaForCausalLM"
    assert (facts.dtype, facts.kv_cache_dtype, facts.vocab_size) == ("float32", "float32", 301)
    assert (facts.max_model_len, facts.max_num_seqs, facts.block_size, facts.first_block_id) == (100, 8, 4, 1)
    # 3 layers, keys and values, 2 heads of 10, 4 tokens, float32.
    assert facts.block_bytes == 3 * 2 * 2 * 10 * 4 * 4
    assert facts.num_blocks == 1 + 8 * 25
    assert facts.buckets == () and facts.can_mask_tokens and facts.devices[0].startswith("cpu")


def test_a_length_nobody_asked_for_is_lowered_to_what_the_cache_holds(tiny_dir: Path) -> None:
    forty_blocks = 40 * (4 * 3 * 2 * 2 * 10 * 4) / (1 << 30)
    facts = load(tiny_dir, cpu_kv_cache_gib=forty_blocks, block_size=4, max_num_seqs=8).describe()
    assert (facts.num_blocks, facts.max_model_len) == (40, 39 * 4)


def test_settings_that_cannot_be_met_name_themselves(tiny_dir: Path) -> None:
    with pytest.raises(ModelConfigError, match=r"max_model_len 300.*256"):
        load(tiny_dir, max_model_len=300)
    with pytest.raises(MemoryBudgetError, match=r"cpu_kv_cache_gib.*max_model_len is 256"):
        load(tiny_dir, max_model_len=256, cpu_kv_cache_gib=1e-5)
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="--device cpu"):
            load(tiny_dir, device="cuda")


def test_dummy_weights_run_from_a_bare_config(tiny_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(json.loads((tiny_dir / "config.json").read_text())))
    driver = StepDriver(load(tmp_path, load_format="dummy", dtype="bfloat16", cpu_kv_cache_gib=0.01))
    driver.add(0, [1, 2, 3], sampling(seed=1))
    for _ in range(4):
        assert not driver.step().faults
    assert len(driver.rows[0].tokens) == 7


def test_a_kv_cache_of_another_type_is_close(tiny_dir: Path) -> None:
    results = []
    for kv_cache_dtype in ("float32", "bfloat16"):
        driver = StepDriver(load(tiny_dir, kv_cache_dtype=kv_cache_dtype, cpu_kv_cache_gib=0.01, max_num_seqs=8))
        assert driver.facts.kv_cache_dtype == kv_cache_dtype
        driver.add(0, list(range(1, 40)), greedy(num_logprobs=20))
        driver.step({0: 20})
        driver.step({0: 19})
        driver.rows[0].tokens[-1] = 5
        results.append(driver.step().top_logprobs)
    assert results[0] is not None and results[1] is not None
    assert not np.array_equal(results[0], results[1])
