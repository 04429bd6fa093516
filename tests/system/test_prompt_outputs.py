"""What is asked for of a prompt: its logprobs in OpenAI's and in vLLM's shape, its text, its end cut off or filled in.

The simulated worker's numbers are a documented function of token and position, so that each one can be said beforehand.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import openai
import pytest
from openai import AsyncOpenAI
from tokenizers import Tokenizer

from gpu_worker import simulated_tokens
from tests.system.conftest import Stack, write_model_directory

TEXT = "The capital of France is Paris. Überblick über 日本語 😀"
MESSAGES: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="any", max_retries=0, timeout=120) as opened:
        yield opened


@pytest.fixture(scope="module")
def tokenizer(stack: Stack) -> Tokenizer:
    return Tokenizer.from_file(str(stack.model / "tokenizer.json"))


async def complete(client: AsyncOpenAI, **fields: Any) -> Any:
    return await client.completions.create(**{"model": "tiny", "prompt": TEXT, "seed": 7, "max_tokens": 4, **fields})


def expected(token_ids: list[int]) -> list[tuple[float, int]]:
    """(logprob, rank) of every token but the first."""
    positions = np.arange(1, len(token_ids), dtype=np.uint64)
    hashes = simulated_tokens.prompt_hash(np.array(token_ids[1:], dtype=np.uint32), positions)
    return [(-math.log(2) * (rank + 1), rank + 1) for rank in (hashes >> np.uint64(62)).tolist()]


def check_vllm(entries: list[Any], token_ids: list[int], num_top: int) -> None:
    assert entries[0] is None and len(entries) == len(token_ids)
    for entry, token_id, (logprob, rank) in zip(entries[1:], token_ids[1:], expected(token_ids), strict=True):
        assert next(iter(entry)) == str(token_id), "the prompt's own token comes first"
        own = entry[str(token_id)]
        assert own["logprob"] == pytest.approx(logprob) and own["rank"] == rank
        assert isinstance(own["decoded_token"], str)
        assert len(entry) == (num_top if rank <= num_top else num_top + 1)
        assert sorted(each["rank"] for each in entry.values()) == sorted({*range(1, num_top + 1), rank})


@pytest.mark.parametrize("num_top", [0, 1, 5])
async def test_prompt_logprobs_as_vllm_sends_them(client: AsyncOpenAI, tokenizer: Tokenizer, num_top: int) -> None:
    # What is cached is computed again: nothing else has its logprobs.
    prompts = [f"{num_top} " + TEXT * 3, "one more"]
    await complete(client, prompt=prompts[0])
    answer = await complete(client, prompt=prompts, n=2, extra_body={"prompt_logprobs": num_top})
    for index, choice in enumerate(answer.choices):
        check_vllm(choice.prompt_logprobs, tokenizer.encode(prompts[index // 2]).ids, num_top)
        assert choice.logprobs is None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    # And it may be used by the next.
    again = await complete(client, prompt=prompts[0])
    assert again.usage.prompt_tokens_details.cached_tokens >= 16


async def test_prompt_logprobs_of_a_chat(client: AsyncOpenAI) -> None:
    answer: Any = await client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=2,
        extra_body={"prompt_logprobs": 2, "return_token_ids": True},
    )
    check_vllm(answer.prompt_logprobs, answer.prompt_token_ids, 2)


def check_echo(logprobs: Any, text: str, token_ids: list[int], num_generated: int, num_top: int) -> None:
    num_prompt = len(token_ids)
    columns = [logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, logprobs.text_offset]
    assert {len(column) for column in columns} == {num_prompt + num_generated}
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    for index, (logprob, rank) in enumerate(expected(token_ids), 1):
        assert logprobs.token_logprobs[index] == pytest.approx(logprob)
        top = logprobs.top_logprobs[index]
        assert top[logprobs.tokens[index]] == pytest.approx(logprob)
        # Tokens that are written alike are one entry.
        assert len(top) <= (num_top if rank <= num_top else num_top + 1)
    assert logprobs.text_offset[0] == 0 and logprobs.text_offset == sorted(logprobs.text_offset)
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        if not token.startswith("bytes:"):
            assert text[offset:].startswith(token)


@pytest.mark.parametrize("as_ids", [False, True])
async def test_echo_with_logprobs(client: AsyncOpenAI, tokenizer: Tokenizer, as_ids: bool) -> None:
    ids = tokenizer.encode(TEXT).ids
    extra = {"allowed_token_ids": [tokenizer.token_to_id(character) for character in "abc"]}
    prompt = ids if as_ids else TEXT
    fields: dict[str, Any] = {"prompt": prompt, "echo": True, "logprobs": 3, "max_tokens": 5, "extra_body": extra}
    choice = (await complete(client, **fields)).choices[0]
    assert choice.text.startswith(TEXT) and len(choice.text) == len(TEXT) + 5
    check_echo(choice.logprobs, choice.text, ids, 5, 3)
    stream = await complete(client, **fields, stream=True)
    parts = [part.choices[0] async for part in stream]
    assert "".join(part.text for part in parts) == choice.text
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        streamed = [value for part in parts if part.logprobs is not None for value in getattr(part.logprobs, name)]
        assert streamed == getattr(choice.logprobs, name), name


async def test_echo_alone_generates_nothing(client: AsyncOpenAI, tokenizer: Tokenizer) -> None:
    answer = await complete(client, prompt=[TEXT, "x"], echo=True, logprobs=1, max_tokens=0)
    assert [choice.text for choice in answer.choices] == [TEXT, "x"]
    check_echo(answer.choices[0].logprobs, TEXT, tokenizer.encode(TEXT).ids, 0, 1)
    assert answer.choices[1].logprobs.token_logprobs == [None]
    assert answer.usage.completion_tokens == 0 and answer.choices[0].finish_reason == "length"


async def test_both_kinds_at_once_each_with_its_own_number(client: AsyncOpenAI, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT).ids
    answer = await complete(client, echo=True, logprobs=4, max_tokens=1, extra_body={"prompt_logprobs": 1})
    check_vllm(answer.choices[0].prompt_logprobs, ids, 1)
    assert max(len(top) for top in answer.choices[0].logprobs.top_logprobs if top) >= 4
    assert len(answer.choices[0].logprobs.tokens) == len(ids) + 1


async def test_too_many_are_refused_by_their_own_name(client: AsyncOpenAI) -> None:
    for fields, param in (
        ({"extra_body": {"prompt_logprobs": 21}}, "prompt_logprobs"),
        ({"echo": True, "logprobs": 21}, "logprobs"),
        ({"stream": True, "extra_body": {"prompt_logprobs": 1}}, "prompt_logprobs"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            await complete(client, **fields)
        assert caught.value.param == param


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Few blocks, short steps, and a worker that ends if a row reads what it must not."""
    marks = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
    model = write_model_directory(tmp_path_factory.mktemp("models") / "infilling", marks)
    flags = ["--sim-num-blocks=40", "--sim-max-num-batched-tokens=32", "--sim-strict", "--sim-max-model-len=512"]
    with Stack(model, worker_flags=flags) as running:
        yield running


async def test_preempted_prompts_are_told_of_once_and_whole(crowded: Stack) -> None:
    """More than the pool holds at a time, in chunks: what is computed again is not told again."""
    tokenizer = Tokenizer.from_file(str(crowded.model / "tokenizer.json"))
    prompts = [f"{number} " + TEXT * 2 for number in range(6)]
    before = crowded.control_plane_metric("stepwire_preemptions_total")
    async with AsyncOpenAI(base_url=f"{crowded.url}/v1", api_key="any", max_retries=0, timeout=120) as client:
        extra = {"prompt_logprobs": 2, "ignore_eos": True}
        with crowded.paused():  # until all of them are there
            asking = [
                asyncio.create_task(complete(client, prompt=prompt, max_tokens=160, extra_body=extra))
                for prompt in prompts
            ]
            await asyncio.to_thread(crowded.wait_open, len(prompts))
        answers = await asyncio.gather(*asking)
    for prompt, answer in zip(prompts, answers, strict=True):
        check_vllm(answer.choices[0].prompt_logprobs, tokenizer.encode(prompt).ids, 2)
        assert answer.usage.completion_tokens == 160
    assert crowded.control_plane_metric("stepwire_preemptions_total") > before


async def test_a_suffix_is_put_where_the_model_fills_in(crowded: Stack) -> None:
    tokenizer = Tokenizer.from_file(str(crowded.model / "tokenizer.json"))
    async with AsyncOpenAI(base_url=f"{crowded.url}/v1", api_key="any", max_retries=0, timeout=120) as client:
        answer = await complete(client, prompt="def f(", suffix="return x", extra_body={"return_token_ids": True})
        wanted = tokenizer.encode("<|fim_prefix|>def f(<|fim_suffix|>return x<|fim_middle|>").ids
        assert answer.choices[0].prompt_token_ids == wanted
        for fields in ({"prompt": [1, 2]}, {"echo": True}):
            with pytest.raises(openai.BadRequestError, match="suffix"):
                await complete(client, suffix="x", **fields)


async def test_a_model_without_marks_refuses_a_suffix(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="does not define how to fill in") as caught:
        await complete(client, suffix="x")
    assert caught.value.param == "suffix"


async def test_prompts_are_truncated_from_the_left(client: AsyncOpenAI, tokenizer: Tokenizer, stack: Stack) -> None:
    ids = tokenizer.encode(TEXT).ids
    extra = {"truncate_prompt_tokens": 5, "return_token_ids": True, "prompt_logprobs": 0}
    answer = await complete(client, echo=True, extra_body=extra)
    choice = answer.choices[0]
    assert choice.prompt_token_ids == ids[-5:] and answer.usage.prompt_tokens == 5
    # The text is that of what was kept.
    assert choice.text.startswith(tokenizer.decode(ids[-5:]))
    assert [list(entry) for entry in choice.prompt_logprobs[1:]] == [[str(token)] for token in ids[-4:]]
    chat: Any = await client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=1, extra_body={"truncate_prompt_tokens": 3}
    )
    assert chat.usage.prompt_tokens == 3
    # -1: what there is room for beside what is to be generated.
    long = await complete(client, prompt="word " * 6000, max_tokens=6, extra_body={"truncate_prompt_tokens": -1})
    assert long.usage.prompt_tokens == 4096 - 6
    with pytest.raises(openai.BadRequestError) as caught:
        await complete(client, extra_body={"truncate_prompt_tokens": 4097})
    assert caught.value.param == "truncate_prompt_tokens" and "4096" in caught.value.message


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chat_that_is_continued_may_be_echoed(client: AsyncOpenAI, stream: bool) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "The capital is"}]
    fields: dict[str, Any] = {"model": "tiny", "messages": messages, "max_tokens": 6, "seed": 3, "n": 2}
    texts: list[list[str]] = []
    for echo in (False, True):
        extra = {"echo": echo, "continue_final_message": True, "add_generation_prompt": False}
        answer: Any = await client.chat.completions.create(**fields, stream=stream, extra_body=extra)
        found = ["", ""]
        if stream:
            async for chunk in answer:
                for choice in chunk.choices:
                    found[choice.index] += choice.delta.content or ""
        else:
            found = [choice.message.content for choice in answer.choices]
        texts.append(found)
    assert texts[1] == ["The capital is" + text for text in texts[0]]


async def test_a_prompt_may_end_without_opening_the_answer(client: AsyncOpenAI, tokenizer: Tokenizer) -> None:
    prompts = []
    for opens in (True, False):
        answer: Any = await client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            max_tokens=1,
            extra_body={"return_token_ids": True, "add_generation_prompt": opens},
        )
        prompts.append(answer.prompt_token_ids)
    opening = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False).ids
    assert prompts[0] == prompts[1] + opening
