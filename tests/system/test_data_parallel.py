"""`stepwire serve --data-parallel-size 2` as a person runs it: simulated, and with a real model on two CPU workers."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import openai
import pytest

from .launched import Launched, wait_until

MODEL = "SmolLM2-135M-Instruct"
FLAGS = ("--dtype=float32", f"--served-model-name={MODEL}", "--cpu-kv-cache-gib=0.25")
BEGINNINGS = (
    "The three primary colours are",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):",
    "In 1969, the first man on the moon",
)
PROMPTS = [f"{number}. {beginning}" for number in range(4) for beginning in BEGINNINGS]
NUM_TOKENS = 24


def test_a_worker_that_died_comes_back_while_the_other_serves(tmp_path: Path) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1_000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = ("--runner=simulated", "--served-model-name=sim", "--data-parallel-size=2")
    with Launched(tmp_path, *flags) as launched, openai.OpenAI(base_url=launched.base_url, api_key="none") as client:
        assert launched.metric("stepwire_worker_connected") == 2, "ready is when all groups are there"
        workers = launched.children_of("gpu_worker")
        assert len(workers) == 2
        workers[0].kill()
        for _ in range(5):
            answer = client.completions.create(
                model="sim", prompt=[1, 2, 3], max_tokens=8, extra_body={"ignore_eos": True}
            )
            assert answer.usage and answer.usage.completion_tokens == 8
        wait_until(lambda: launched.metric("stepwire_worker_connections_total") == 3, what="the worker's return")
        assert launched.metric("stepwire_worker_connected") == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_cpu_workers_say_what_one_says_and_outlive_the_death_of_one(smollm2_dir: Path) -> None:
    with Launched(smollm2_dir, *FLAGS) as alone:
        expected = asyncio.run(sixteen_streams(alone))
    with Launched(smollm2_dir, *FLAGS, "--data-parallel-size=2") as pair:
        assert asyncio.run(sixteen_streams(pair)) == expected
        shares = [pair.metric_of("stepwire_generation_tokens_total", group=str(group)) for group in (0, 1)]
        assert min(shares) >= 4 * NUM_TOKENS, "both have worked"
        assert asyncio.run(sixteen_streams(pair, kill_after=60)) == expected
        assert pair.metric("stepwire_worker_losses_total") == 1


async def sixteen_streams(launched: Launched, kill_after: int | None = None) -> list[str]:
    """Greedy texts of all prompts at once; `kill_after` so many tokens, one worker dies."""

    async def stream(client: openai.AsyncOpenAI, prompt: str) -> str:
        events = await client.completions.create(
            model=MODEL,
            prompt=prompt,
            max_tokens=NUM_TOKENS,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        return "".join([choice.text async for event in events for choice in event.choices])

    async with openai.AsyncOpenAI(base_url=launched.base_url, api_key="none", max_retries=0, timeout=170) as client:
        before = launched.metric("stepwire_generation_tokens_total")
        streams = [asyncio.create_task(stream(client, prompt)) for prompt in PROMPTS]
        if kill_after is not None:
            while launched.metric("stepwire_generation_tokens_total") < before + kill_after:
                await asyncio.sleep(0.02)
            launched.children_of("gpu_worker")[1].kill()
        return list(await asyncio.gather(*streams))
