"""`stepwire serve` with several ranks on CPUs: the tokens of one rank, and what happens when one is killed."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from gpu_worker.config import WorkerSettings
from gpu_worker.runner import TorchRunner
from load_tests.cpu_worker.step_driver import StepDriver, sampling
from tests.unit.gpu_worker.models.tiny_checkpoints import save_tiny

from .launched import Launched, wait_until
from .test_launcher import stream

RANK_MODULE = "gpu_worker.parallel.rank_process"
# Small steps, so that prompts come in chunks beside decodes; a pool that 16 streams do not fit into.
# Ranks that import torch all at once on a busy machine wait long for one another.
PLACE = ("--group-timeout-s=240", "--dtype=float32", "--device=cpu", "--num-threads=1", "--served-model-name=tiny")
FLAGS = (*PLACE, "--max-num-batched-tokens=48")


NUM_TOKENS = 40


def pool(num_blocks: int, block_bytes: int) -> str:
    return f"--cpu-kv-cache-gib={num_blocks * block_bytes / (1 << 30):.9f}"


def prompts(vocab_size: int = 300) -> list[list[int]]:
    """Half of them begin with the same 48 tokens."""
    shared = [(7 * position) % vocab_size for position in range(48)]
    return [[*(shared if number % 2 else []), *range(3 + number, 3 + 3 * number + 2)] for number in range(16)]


def num_choices(number: int) -> int:
    """One has two."""
    return 1 + (number == 5)


async def sixteen_streams(launched: Launched, max_tokens: int, *, vocab_size: int = 300) -> list[dict[int, list]]:
    return await asyncio.gather(
        *(
            stream(launched.base_url, "tiny", prompt, max_tokens, seed=number, n=num_choices(number))
            for number, prompt in enumerate(prompts(vocab_size))
        )
    )


def ranks_of(launched: Launched) -> list[psutil.Process]:
    return [process for process in launched.children() if RANK_MODULE in " ".join(process.cmdline())]


def entries(launched: Launched) -> list[dict[str, Any]]:
    """Of its log, as JSON."""
    return [json.loads(line) for line in launched.read().splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def tiny_mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "mixture"
    save_tiny("mixtral", directory, num_local_experts=4, sliding_window=None)
    return directory


@pytest.fixture(scope="module")
def tokens_of_one_rank(tiny_mixture: Path) -> list[dict[int, list]]:
    return tokens_alone(tiny_mixture)


def tokens_alone(directory: Path) -> list[dict[int, list]]:
    """Every choice alone in the runner: nothing is shared, and nothing thrown out."""
    settings = WorkerSettings(model=directory, device="cpu", dtype="float32", num_threads=1, cpu_kv_cache_gib=0.01)
    runner = TorchRunner.load(settings)

    def alone(prompt: list[int], seed: int, index: int) -> list[int]:
        driver = StepDriver(runner)
        driver.add(0, prompt, sampling(temperature=0.8, seed=seed, sequence_index=index))
        for _ in range(NUM_TOKENS):
            driver.step()
        return driver.rows[0].tokens[len(prompt) :]

    return [
        {index: alone(prompt, number, index) for index in range(num_choices(number))}
        for number, prompt in enumerate(prompts())
    ]


@pytest.mark.slow
def test_one_rank_gives_the_tokens_of_its_runner(tiny_mixture: Path, tokens_of_one_rank: list[dict[int, list]]) -> None:
    with Launched(tiny_mixture, *FLAGS, pool(40, 7680)) as launched:
        assert asyncio.run(sixteen_streams(launched, NUM_TOKENS)) == tokens_of_one_rank
        assert launched.metric("stepwire_preemptions_total") > 0
        assert launched.metric("stepwire_prefix_cache_hits_total") > 0


def test_two_by_two_ranks_give_the_tokens_of_one_and_survive_the_loss_of_one(
    tiny_mixture: Path, tokens_of_one_rank: list[dict[int, list]]
) -> None:
    """Two stages of two ranks that hold different experts. In the middle of 16 streams all four are told to end, and in
    the middle of 16 others the last rank gets a kill -9."""
    parallel = ("--tensor-parallel-size=2", "--pipeline-parallel-size=2", "--enable-expert-parallel")
    with Launched(tiny_mixture, *FLAGS, *parallel, pool(40, 7680), "--log-format=json") as launched:

        async def disturbed(disturb: Callable[[], None]) -> list[dict[int, list]]:
            before = launched.metric("stepwire_generation_tokens_total")
            streams = asyncio.create_task(sixteen_streams(launched, NUM_TOKENS))
            while launched.metric("stepwire_generation_tokens_total") < before + 200:
                assert not streams.done(), "over before the rank was lost"
                await asyncio.sleep(0.05)
            disturb()
            return await streams

        left = [launched.child("gpu_worker"), *ranks_of(launched)]
        assert len(left) == 4
        num_before = len(entries(launched))
        # As a service manager does: everybody at once, the first process last.
        assert asyncio.run(disturbed(lambda: [process.terminate() for process in reversed(left)])) == tokens_of_one_rank
        assert launched.metric("stepwire_worker_losses_total") == 0
        assert launched.metric("stepwire_worker_departures_total") == 1
        wait_until(lambda: not any(process.is_running() for process in left), what="the end of the group that left")
        loud = [entry for entry in entries(launched)[num_before:] if entry["level"] != "info"]
        assert not loud, loud

        first_group = ranks_of(launched)
        assert len(first_group) == 3
        assert asyncio.run(disturbed(first_group[-1].kill)) == tokens_of_one_rank
        assert launched.metric("stepwire_preemptions_total") > 0
        assert launched.metric("stepwire_prefix_cache_hits_total") > 0
        wait_until(lambda: launched.metric("stepwire_worker_losses_total") == 1, what="the loss to be counted")
        assert launched.metric("stepwire_kv_blocks_in_use") == 0
        wait_until(lambda: not any(process.is_running() for process in first_group), what="the end of the first group")
        assert len(ranks_of(launched)) == 3
        assert "rank 3 (stage 1 of 2, tensor-parallel rank 1 of 2)" in launched.read()
        assert "SIGKILL" in launched.read()
        felt = [entry for entry in entries(launched) if entry["event"] == "this rank ends"]
        assert not any("exception" in entry for entry in felt), "the first rank knows why, and says it"
        left = ranks_of(launched)
        assert launched.stop(signal.SIGTERM) == 0
    assert not any(process.is_running() for process in left)


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel",
    [
        ("--tensor-parallel-size=2",),
        ("--tensor-parallel-size=2", "--enable-expert-parallel"),
        ("--pipeline-parallel-size=2",),
        ("--pipeline-parallel-size=3", "--pipeline-parallel-layers=1,1,1"),
        ("--tensor-parallel-size=2", "--pipeline-parallel-size=2", "--enable-expert-parallel"),
    ],
    ids=lambda flags: " ".join(flags),
)
def test_every_layout_gives_the_tokens_of_one_rank(
    tiny_mixture: Path, tokens_of_one_rank: list[dict[int, list]], parallel: tuple[str, ...]
) -> None:
    with Launched(tiny_mixture, *FLAGS, *parallel, pool(40, 7680)) as launched:
        assert asyncio.run(sixteen_streams(launched, NUM_TOKENS)) == tokens_of_one_rank
        assert launched.metric("stepwire_preemptions_total") > 0


@pytest.mark.slow
def test_prompts_are_told_of_by_ranks_and_stages(tiny_mixture: Path) -> None:
    """Every rank has a share of the logits; of stages the last one has them, and the first one answers."""
    body = {"model": "tiny", "prompt": [*range(3, 90)], "max_tokens": 2, "temperature": 0, "prompt_logprobs": 3}
    told = []
    stages = "--pipeline-parallel-size=2"
    for parallel in ((), ("--tensor-parallel-size=2",), (stages,), ("--tensor-parallel-size=2", stages)):
        with Launched(tiny_mixture, *FLAGS, *parallel, pool(40, 7680)) as launched:
            answer = httpx.post(f"{launched.base_url}/completions", json=body, timeout=120)
            assert answer.status_code == 200, answer.text
            told.append(answer.json()["choices"][0]["prompt_logprobs"])
    assert len(told[0]) == 87 and told[0][0] is None
    for of_group in told[1:]:
        for one, other in zip(told[0][1:], of_group[1:], strict=True):
            assert one.keys() == other.keys()
            for token, entry in one.items():
                assert entry["logprob"] == pytest.approx(other[token]["logprob"], abs=1e-4)
                assert entry["rank"] == other[token]["rank"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_default_model_split_in_every_way(smollm2_dir: Path) -> None:
    """SmolLM2 has 9 heads and 3 KV heads: 3 ranks a stage."""
    flags = (*PLACE, "--cpu-kv-cache-gib=0.2")

    def tokens(*parallel: str) -> list[dict[int, list]]:
        with Launched(smollm2_dir, *flags, "--max-model-len=512", *parallel, ready_timeout_s=300) as launched:
            return asyncio.run(sixteen_streams(launched, 24, vocab_size=49_000))

    one = tokens()
    assert tokens("--tensor-parallel-size=3") == one
    assert tokens("--pipeline-parallel-size=2") == one
    assert tokens("--tensor-parallel-size=3", "--pipeline-parallel-size=2") == one
