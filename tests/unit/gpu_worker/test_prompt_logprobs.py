"""Log-probabilities of prompts: against float64 and against transformers, whole and in pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from gpu_worker.config import WorkerSettings
from gpu_worker.layers.decoder import HiddenStates
from gpu_worker.prompt_logprobs import describe_run
from gpu_worker.row_table import PromptRun
from gpu_worker.runner import TorchRunner
from gpu_worker.runner_api import PromptLogprobs, RowFaultCode
from load_tests.cpu_worker.step_driver import StepDriver, greedy, sampling
from tests.unit.gpu_worker.models.tiny_checkpoints import save_tiny

NUM_TOP = 4


@pytest.mark.parametrize("max_rows", [1, 3, 100])
def test_numbers_against_float64(max_rows: int) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(9, 33, generator=generator)
    hidden[4] = hidden[4].round()  # has equals: a rank counts what is larger alone
    targets = torch.randint(0, 33, (6,), generator=generator).numpy()
    run = PromptRun(row=2, first_token=2, start_position=5, targets=targets, num_top=3)
    states = HiddenStates(hidden.clone(), torch.zeros(9, 33))
    told = describe_run(run, states, lambda each: each.output, max_rows).result()
    assert torch.equal(states.output, hidden)

    exact = torch.log_softmax(hidden[2:8].double(), dim=-1)
    own = exact.gather(1, torch.from_numpy(targets)[:, None])
    np.testing.assert_allclose(told.logprobs, own[:, 0].numpy(), atol=1e-5)
    assert told.ranks.tolist() == ((exact > own).sum(-1) + 1).tolist()
    top = exact.topk(3).values
    np.testing.assert_allclose(told.top_logprobs, top.numpy(), atol=1e-5)
    at_top = exact.gather(1, torch.from_numpy(told.top_token_ids.astype(np.int64)))
    np.testing.assert_allclose(at_top.numpy(), top.numpy(), atol=1e-12)
    assert (told.row, told.start_position) == (2, 5)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("llama")
    save_tiny("llama", directory)
    return directory


def load(directory: Path, **changes: Any) -> StepDriver:
    values: dict[str, Any] = {"device": "cpu", "dtype": "float32", "cpu_kv_cache_gib": 0.02, "num_threads": 1}
    return StepDriver(TorchRunner.load(WorkerSettings(model=directory, **(values | changes))))


def prompt_of(length: int, vocab_size: int, seed: int = 3) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, vocab_size, length)]


def told_in_pieces(driver: StepDriver, prompt: list[int], pieces: list[int], row: int = 1) -> list[PromptLogprobs]:
    """Another row decodes beside it, so that the prompt's tokens are not the step's first."""
    driver.add(0, prompt[:5], greedy())
    driver.add(row, prompt, sampling(temperature=0, num_prompt_logprobs=NUM_TOP))
    driver.step({0: 5})
    parts: list[PromptLogprobs] = []
    for count in pieces:
        result = driver.step({row: count, 0: 1})
        assert not result.faults
        parts += result.prompt_logprobs
    assert driver.rows[row].num_computed == len(prompt)
    assert not driver.step({row: 1}).prompt_logprobs
    return parts


def joined(parts: list[PromptLogprobs]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    position = 1
    for part in parts:
        assert part.start_position == position and len(part.logprobs) > 0
        position += len(part.logprobs)
    fields = ("logprobs", "ranks", "top_token_ids", "top_logprobs")
    logprobs, ranks, top_ids, top = (np.concatenate([getattr(part, name) for part in parts]) for name in fields)
    return logprobs, ranks, top_ids, top


def check_against(reference: Any, prompt: list[int], told: tuple[np.ndarray, ...], tolerance: float) -> None:
    with torch.inference_mode():
        exact = reference(torch.tensor([prompt])).logits[0, :-1].double().log_softmax(-1)
    targets = torch.tensor(prompt[1:])[:, None]
    logprobs, ranks, top_ids, top = told
    assert len(logprobs) == len(prompt) - 1 and top.shape == (len(prompt) - 1, NUM_TOP)
    own = exact.gather(1, targets)
    np.testing.assert_allclose(logprobs, own[:, 0].numpy(), atol=tolerance)
    np.testing.assert_allclose(top, exact.topk(NUM_TOP).values.numpy(), atol=tolerance)
    np.testing.assert_allclose(exact.gather(1, torch.from_numpy(top_ids.astype(np.int64))).numpy(), top, atol=tolerance)
    # Neighbours that are nearly as likely may change places.
    fewest, most = (exact > own + tolerance).sum(-1) + 1, (exact >= own - tolerance).sum(-1)
    assert (torch.from_numpy(ranks.astype(np.int64)) >= fewest).all()
    assert (torch.from_numpy(ranks.astype(np.int64)) <= most).all()


def test_whole_and_in_pieces_are_transformers_numbers(model_dir: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    driver = load(model_dir)
    prompt = prompt_of(41, driver.facts.vocab_size)
    whole = joined(told_in_pieces(driver, prompt, [41]))
    check_against(reference, prompt, whole, 1e-4)
    for pieces in ([1, 1, 16, 20, 2, 1], [40, 1], [13, 28]):
        in_pieces = joined(told_in_pieces(load(model_dir), prompt, pieces))
        np.testing.assert_allclose(in_pieces[0], whole[0], atol=1e-5)
        np.testing.assert_allclose(in_pieces[3], whole[3], atol=1e-5)
        assert (in_pieces[1] == whole[1]).all() and (in_pieces[2] == whole[2]).all()


def test_smollm2_says_what_transformers_says(smollm2_dir: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()
    driver = load(smollm2_dir, max_model_len=128, max_num_seqs=2)
    prompt = prompt_of(48, 49_000)
    check_against(reference, prompt, joined(told_in_pieces(driver, prompt, [30, 18])), 1e-3)


def test_generated_tokens_are_worth_the_same_as_a_prompt(model_dir: Path) -> None:
    """To the bit with --deterministic, however the prompt is cut."""
    driver = load(model_dir, deterministic=True)
    prompt = prompt_of(20, driver.facts.vocab_size)
    driver.add(0, prompt, greedy(num_logprobs=2))
    results = [driver.step() for _ in range(12)]
    generated = np.concatenate([result.logprobs for result in results if result.logprobs is not None])
    sequence = driver.drop(0)
    told = joined(told_in_pieces(driver, sequence, [7, 11, len(sequence) - 18]))
    assert told[0][19:].tolist() == generated.tolist()


def test_a_row_that_was_recomputed_tells_of_its_prompt_alone(model_dir: Path) -> None:
    driver = load(model_dir)
    prompt = prompt_of(30, driver.facts.vocab_size)
    wanted = sampling(temperature=0, num_prompt_logprobs=1)
    driver.add(0, prompt, wanted, num_prompt_tokens=20)
    first, second = driver.step({0: 15}), driver.step({0: 15})
    assert [part.start_position for part in (*first.prompt_logprobs, *second.prompt_logprobs)] == [1, 16]
    assert len(second.prompt_logprobs[0].logprobs) == 4


def test_what_cannot_be_told_is_refused_by_row(model_dir: Path) -> None:
    driver = load(model_dir)
    prompt = prompt_of(20, driver.facts.vocab_size)
    driver.add(0, prompt, greedy())
    driver.step()
    driver.add(1, prompt, sampling(num_prompt_logprobs=0), prefix_of=0, num_shared_tokens=16)
    driver.add(2, prompt, sampling(num_prompt_logprobs=driver.facts.max_num_logprobs + 1))
    result = driver.step()
    assert [(fault.row, fault.code) for fault in result.faults] == [
        (1, RowFaultCode.UNSUPPORTED),
        (2, RowFaultCode.UNSUPPORTED),
    ]
    assert "it must be none" in result.faults[0].message and "above max_num_logprobs" in result.faults[1].message
    assert result.rows.tolist() == [0]
