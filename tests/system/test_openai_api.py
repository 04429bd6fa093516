"""The official client against the real stack: what it sends is understood, what it gets is what its types say.

The simulated worker draws tokens by a hash, so that a seed fixes every text, and allowed tokens or a bias choose which.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessageParam
from tokenizers import Tokenizer

from tests.system.conftest import MAX_MODEL_LEN, Stack

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="any", max_retries=0, timeout=120) as opened:
        yield opened


@pytest.fixture(scope="module")
def tokenizer(stack: Stack) -> Tokenizer:
    return Tokenizer.from_file(str(stack.model / "tokenizer.json"))


def ids_of(tokenizer: Tokenizer, characters: str) -> list[int]:
    """Token ids of single characters (byte-level: a space is spelled Ġ)."""
    return [tokenizer.token_to_id(character.replace(" ", "Ġ")) for character in characters]


async def chat(client: AsyncOpenAI, **fields: Any) -> ChatCompletion:
    fields = {"model": "tiny", "messages": MESSAGES, "max_tokens": 16, "seed": 7, **fields}
    answer = await client.chat.completions.create(**fields)
    return ChatCompletion.model_validate(answer.to_dict(), strict=True)


async def chat_chunks(client: AsyncOpenAI, **fields: Any) -> list[ChatCompletionChunk]:
    fields = {"model": "tiny", "messages": MESSAGES, "max_tokens": 16, "seed": 7, **fields}
    stream = await client.chat.completions.create(stream=True, **fields)
    chunks = [chunk async for chunk in stream]
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    return chunks


def joined(chunks: Sequence[ChatCompletionChunk], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


async def complete(client: AsyncOpenAI, **fields: Any) -> Completion:
    fields = {"model": "tiny", "prompt": "The capital", "seed": 7, **fields}
    return await client.completions.create(**fields)


async def test_chat(client: AsyncOpenAI, stack: Stack) -> None:
    answer = await chat(client)
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", "tiny")
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.message.role) == (0, "length", "assistant")
    assert choice.message.content and choice.message.tool_calls is None and choice.logprobs is None
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 16
    assert answer.usage.prompt_tokens > 10


async def test_the_requested_name_comes_back(client: AsyncOpenAI) -> None:
    assert (await chat(client, model="alias/tiny")).model == "alias/tiny"


async def test_a_stream_says_what_the_whole_answer_says(client: AsyncOpenAI) -> None:
    whole = await chat(client, max_tokens=64)
    chunks = await chat_chunks(client, max_tokens=64)
    assert joined(chunks) == whole.choices[0].message.content
    assert all(chunk.usage is None for chunk in chunks)


async def test_order_of_a_chat_stream(client: AsyncOpenAI) -> None:
    chunks = await chat_chunks(client, n=3, stream_options={"include_usage": True})
    *rest, last = chunks
    assert last.choices == [] and last.usage is not None and last.usage.completion_tokens == 48
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in rest)
    for index in range(3):
        own = [chunk.choices[0] for chunk in rest if chunk.choices[0].index == index]
        assert own[0].delta.role == "assistant" and own[0].finish_reason is None
        assert all(choice.delta.role is None for choice in own[1:])
        assert [choice.finish_reason for choice in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == "length"


async def test_continuous_usage(client: AsyncOpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await chat_chunks(client, stream_options=options)
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage is not None]
    assert len(counts) == len(chunks)
    assert counts == sorted(counts) and counts[-1] == 16


async def test_seeds_fix_the_text(client: AsyncOpenAI) -> None:
    texts = [(await chat(client, seed=seed)).choices[0].message.content for seed in (1, 1, -(2**63), 2**63 - 1)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


async def test_n_at_temperature_0_is_allowed_and_ordered(client: AsyncOpenAI, tokenizer: Tokenizer) -> None:
    (token,) = ids_of(tokenizer, "x")
    answer = await chat(client, n=3, temperature=0, logit_bias={str(token): 100})
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.message.content for choice in answer.choices] == ["x" * 16] * 3
    assert answer.usage is not None and answer.usage.completion_tokens == 48


async def test_max_completion_tokens(client: AsyncOpenAI) -> None:
    answer = await chat(client, max_tokens=9, max_completion_tokens=3)
    assert answer.usage is not None and answer.usage.completion_tokens == 3


async def test_content_parts_render_like_a_string(client: AsyncOpenAI) -> None:
    parts = [{"role": "critic", "content": [{"type": "text", "text": "hello"}]}]
    string = [{"role": "critic", "content": "hello"}]
    one, two = await chat(client, messages=parts), await chat(client, messages=string)
    assert one.usage is not None and two.usage is not None
    assert one.usage.prompt_tokens == two.usage.prompt_tokens
    assert one.choices[0].message.content == two.choices[0].message.content


@pytest.mark.parametrize("include", [False, True])
async def test_stop_strings_across_tokens(client: AsyncOpenAI, tokenizer: Tokenizer, include: bool) -> None:
    """Texts of a, b and c, one character a token: the stop string always straddles tokens."""
    extra = {"allowed_token_ids": ids_of(tokenizer, "abc")}
    full = (await chat(client, max_tokens=200, extra_body=extra)).choices[0].message.content or ""
    stop = full[100:104]
    end = full.index(stop) + (len(stop) if include else 0)
    extra = {**extra, "include_stop_str_in_output": include}
    whole = await chat(client, max_tokens=200, stop=[stop, "zz"], extra_body=extra)
    assert whole.choices[0].message.content == full[:end]
    assert whole.choices[0].finish_reason == "stop"
    assert whole.choices[0].model_extra == {"stop_reason": stop}
    chunks = await chat_chunks(client, max_tokens=200, stop=stop, extra_body=extra)
    assert joined(chunks) == full[:end]
    if not include:
        # No part of a stop string was ever sent: every prefix is a prefix of what stays.
        sent = list(itertools.accumulate(chunk.choices[0].delta.content or "" for chunk in chunks))
        assert all(full[:end].startswith(text) for text in sent)
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_characters_are_never_split(client: AsyncOpenAI, tokenizer: Tokenizer) -> None:
    """Lead and continuation bytes are single tokens, drawn at random: many characters straddle two tokens."""
    # How a byte-level vocabulary spells 0xD0, 0xB8 and 0xBE, which make two Cyrillic letters.
    letters = ["\u00d0", "\u00b8", "\u00be"]
    extra = {"allowed_token_ids": [tokenizer.token_to_id(letter) for letter in letters], "return_token_ids": True}
    chunks = await chat_chunks(client, max_tokens=200, extra_body=extra)
    text = joined(chunks)
    token_ids = [
        token_id
        for chunk in chunks
        for choice in chunk.choices
        for token_id in (choice.model_extra or {}).get("token_ids", [])
    ]
    assert len(token_ids) == 200
    assert text == tokenizer.decode(token_ids)
    assert text.count("\u0438") > 5 and text.count("\u043e") > 5
    whole = await chat(client, max_tokens=200, extra_body=extra)
    assert whole.choices[0].message.content == text


async def test_stop_token_ids_and_ignore_eos(client: AsyncOpenAI, tokenizer: Tokenizer) -> None:
    a, b = ids_of(tokenizer, "ab")
    extra = {"allowed_token_ids": [a, b], "stop_token_ids": [b]}
    answer = await chat(client, max_tokens=500, extra_body=extra)
    assert set(answer.choices[0].message.content or "") <= {"a"}
    assert (answer.choices[0].finish_reason, answer.choices[0].model_extra) == ("stop", {"stop_reason": b})
    end = tokenizer.token_to_id("<|im_end|>")
    ended = await chat(client, logit_bias={str(end): 100})
    assert (ended.choices[0].finish_reason, ended.choices[0].message.content) == ("stop", "")
    assert ended.choices[0].model_extra == {"stop_reason": None}
    shown = await chat(
        client, logit_bias={str(end): 100}, max_tokens=2, extra_body={"ignore_eos": True, "skip_special_tokens": False}
    )
    assert (shown.choices[0].finish_reason, shown.choices[0].message.content) == ("length", "<|im_end|>" * 2)


async def test_min_tokens(client: AsyncOpenAI, tokenizer: Tokenizer) -> None:
    a, b = ids_of(tokenizer, "ab")
    extra = {"allowed_token_ids": [a, b], "stop_token_ids": [b], "min_tokens": 30}
    answer = await chat(client, max_tokens=500, extra_body=extra)
    assert (answer.choices[0].message.content or "").startswith("a" * 30)


async def test_continue_final_message(client: AsyncOpenAI) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "The capital"}]
    extra = {"continue_final_message": True, "add_generation_prompt": False, "return_token_ids": True}
    answer = await chat(client, messages=messages, extra_body=extra)
    again = await chat(client, messages=messages, extra_body={"return_token_ids": True})
    prompts = [(each.model_extra or {})["prompt_token_ids"] for each in (answer, again)]
    assert answer.usage is not None and answer.usage.prompt_tokens == len(prompts[0]) < len(prompts[1])


async def test_chat_logprobs(client: AsyncOpenAI, tokenizer: Tokenizer) -> None:
    extra = {"allowed_token_ids": ids_of(tokenizer, "abc")}
    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": 3, "extra_body": extra}
    whole = (await chat(client, **fields)).choices[0]
    assert whole.logprobs is not None and whole.logprobs.content is not None
    content = whole.logprobs.content
    assert len(content) == 16
    assert "".join(entry.token for entry in content) == whole.message.content
    assert b"".join(bytes(entry.bytes or []) for entry in content).decode() == whole.message.content
    for entry in content:
        values = [top.logprob for top in entry.top_logprobs]
        assert len(values) == 3 and values == sorted(values, reverse=True)
        assert -9999.0 <= entry.logprob <= 0
    streamed = [
        entry
        for chunk in await chat_chunks(client, **fields)
        for choice in chunk.choices
        if choice.logprobs is not None
        for entry in choice.logprobs.content or []
    ]
    assert [entry.to_dict() for entry in streamed] == [entry.to_dict() for entry in content]


async def test_chat_logprobs_without_alternatives(client: AsyncOpenAI) -> None:
    for extra in ({}, {"top_logprobs": 0}):
        choice = (await chat(client, logprobs=True, **extra)).choices[0]
        assert choice.logprobs is not None and choice.logprobs.content is not None
        assert all(entry.top_logprobs == [] for entry in choice.logprobs.content)
    assert (await chat(client, logprobs=False)).choices[0].logprobs is None


async def test_completion_defaults(client: AsyncOpenAI) -> None:
    answer = await complete(client)
    assert answer.id.startswith("cmpl-") and answer.object == "text_completion"
    assert answer.usage is not None and answer.usage.completion_tokens == 16
    assert (answer.choices[0].finish_reason, answer.choices[0].logprobs) == ("length", None)


async def test_batches_are_ordered_by_prompt_and_sample(client: AsyncOpenAI, tokenizer: Tokenizer) -> None:
    texts = ["first prompt", "second", "and a third one"]
    ids = [tokenizer.encode(text).ids for text in texts]
    batch = await complete(client, prompt=texts, n=2, echo=True)
    assert [choice.index for choice in batch.choices] == list(range(6))
    assert [choice.text.startswith(texts[choice.index // 2]) for choice in batch.choices] == [True] * 6
    single = await complete(client, prompt=texts[1], n=2)
    assert [choice.text for choice in batch.choices[2:4]] == [texts[1] + choice.text for choice in single.choices]
    by_ids = await complete(client, prompt=ids, n=2, echo=True)
    assert [choice.text for choice in by_ids.choices] == [choice.text for choice in batch.choices]
    one_by_ids = await complete(client, prompt=ids[1], n=2)
    assert [choice.text for choice in one_by_ids.choices] == [choice.text for choice in single.choices]
    assert batch.usage is not None
    assert batch.usage.prompt_tokens == sum(map(len, ids))
    assert batch.usage.completion_tokens == 6 * 16


async def test_a_streamed_batch(client: AsyncOpenAI) -> None:
    fields: dict[str, Any] = {"prompt": ["first", "second"], "n": 2, "echo": True}
    whole = await complete(client, **fields)
    stream = await client.completions.create(
        model="tiny", seed=7, stream=True, stream_options={"include_usage": True}, **fields
    )
    chunks = [chunk async for chunk in stream]
    assert all(len(chunk.choices) == 1 for chunk in chunks[:-1])
    for choice in whole.choices:
        own = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == choice.index]
        assert "".join(each.text for each in own) == choice.text
        assert [each.finish_reason for each in own] == [None] * (len(own) - 1) + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert whole.usage is not None and chunks[-1].usage.total_tokens == whole.usage.total_tokens


@pytest.mark.parametrize("num_top", [0, 1, 5])
async def test_completion_logprobs(client: AsyncOpenAI, tokenizer: Tokenizer, num_top: int) -> None:
    extra = {"allowed_token_ids": ids_of(tokenizer, "abc")}
    choice = (await complete(client, logprobs=num_top, extra_body=extra)).choices[0]
    logprobs = choice.logprobs
    assert logprobs is not None and logprobs.tokens and logprobs.top_logprobs and logprobs.text_offset
    assert "".join(logprobs.tokens) == choice.text
    assert len(logprobs.tokens) == len(logprobs.token_logprobs or []) == len(logprobs.top_logprobs) == 16
    assert logprobs.text_offset == list(range(16))
    for token, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=True):
        assert token in top
        assert max(num_top, 1) <= len(top) <= num_top + 1


async def test_streamed_completion_logprobs_agree(client: AsyncOpenAI, tokenizer: Tokenizer) -> None:
    """Offsets are the same although text lags behind tokens while a stop string might be forming."""
    fields: dict[str, Any] = {
        "logprobs": 2,
        "stop": ["aaaaaaaaa"],
        "max_tokens": 60,
        "extra_body": {"allowed_token_ids": ids_of(tokenizer, "ab")},
    }
    whole = (await complete(client, **fields)).choices[0]
    stream = await client.completions.create(model="tiny", prompt="The capital", seed=7, stream=True, **fields)
    parts = [chunk.choices[0].logprobs async for chunk in stream]
    assert whole.logprobs is not None
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        streamed = [value for part in parts if part is not None for value in getattr(part, name)]
        assert streamed == getattr(whole.logprobs, name), name


async def test_return_token_ids(client: AsyncOpenAI, tokenizer: Tokenizer) -> None:
    answer = await complete(client, prompt=["one", "two"], extra_body={"return_token_ids": True})
    for choice, text in zip(answer.choices, ("one", "two"), strict=True):
        extra = choice.model_extra or {}
        assert extra["prompt_token_ids"] == tokenizer.encode(text).ids
        assert tokenizer.decode(extra["token_ids"]) == choice.text


async def test_models(client: AsyncOpenAI) -> None:
    listed = [model async for model in client.models.list()]
    assert [model.id for model in listed] == ["tiny", "alias/tiny"]
    assert all(model.object == "model" and model.created > 1_600_000_000 for model in listed)
    for model in listed:
        assert (await client.models.retrieve(model.id)) == model
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        await client.models.retrieve("org/other")


@pytest.mark.parametrize(
    ("fields", "error_class", "param", "needles"),
    [
        ({"model": "other"}, openai.NotFoundError, "model", ["does not exist"]),
        ({"temperature": 2.5}, openai.BadRequestError, "temperature", ["2.5"]),
        ({"temperature": -0.1}, openai.BadRequestError, "temperature", []),
        ({"top_p": 0}, openai.BadRequestError, "top_p", []),
        ({"top_p": 1.01}, openai.BadRequestError, "top_p", []),
        ({"presence_penalty": 3}, openai.BadRequestError, "presence_penalty", []),
        ({"frequency_penalty": -3}, openai.BadRequestError, "frequency_penalty", []),
        ({"extra_body": {"min_p": 2}}, openai.BadRequestError, "min_p", []),
        ({"extra_body": {"repetition_penalty": 0}}, openai.BadRequestError, "repetition_penalty", []),
        ({"n": 0}, openai.BadRequestError, "n", []),
        ({"n": 100_000}, openai.BadRequestError, "n", ["100000"]),
        ({"stop": ""}, openai.BadRequestError, "stop[0]", ["empty"]),
        ({"logit_bias": {"99999": 1}}, openai.BadRequestError, "logit_bias[99999]", ["99999", "vocabulary"]),
        ({"logit_bias": {"5": 1e300}}, openai.BadRequestError, "logit_bias[5]", []),
        ({"extra_body": {"stop_token_ids": [99999]}}, openai.BadRequestError, "stop_token_ids[0]", ["99999"]),
        ({"max_tokens": MAX_MODEL_LEN}, openai.BadRequestError, "max_tokens", [str(MAX_MODEL_LEN)]),
        ({"max_completion_tokens": 5000}, openai.BadRequestError, "max_completion_tokens", ["5000"]),
        ({"messages": [{"role": "forbidden", "content": "x"}]}, openai.BadRequestError, "messages", ["forbidden"]),
        (
            {"messages": [{"role": "user", "content": "word " * 6000}]},
            openai.BadRequestError,
            "messages",
            [str(MAX_MODEL_LEN)],
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_refusals_are_plain_http_and_leave_the_server_usable(
    client: AsyncOpenAI,
    fields: dict[str, Any],
    error_class: type[openai.APIStatusError],
    param: str,
    needles: list[str],
    stream: bool,
) -> None:
    with pytest.raises(error_class) as caught:
        await client.chat.completions.create(
            **{"model": "tiny", "messages": MESSAGES, "max_tokens": 4, "stream": stream, **fields}  # type: ignore[arg-type]
        )
    error = caught.value
    assert error.param == param
    assert error.type == "invalid_request_error"
    assert error.request_id
    for needle in needles:
        assert needle in error.message
    if fields.get("model") == "other":
        assert error.code == "model_not_found"
    if any(str(MAX_MODEL_LEN) in needle or "5000" in needle for needle in needles):
        assert error.code == "context_length_exceeded"
    assert (await chat(client, max_tokens=1)).choices


async def test_ids_outside_the_vocabulary(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="vocabulary") as caught:
        await complete(client, prompt=[1, 99999])
    assert caught.value.param == "prompt[1]"
    with pytest.raises(openai.BadRequestError, match="vocabulary") as caught:
        await complete(client, prompt=[[1, 2], [3, 99999]])
    assert caught.value.param == "prompt[1][1]"


async def test_an_over_long_batch_is_refused_and_cancelled_as_a_whole(client: AsyncOpenAI, stack: Stack) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await complete(client, prompt=["fine", "word " * 6000], max_tokens=4000)
    assert caught.value.param == "prompt[1]"
    await asyncio.to_thread(stack.wait_idle)


async def test_many_streams_at_once(client: AsyncOpenAI) -> None:
    """Sixty-four streams of one session do not mix: each says what it says alone."""
    alone = [(await chat(client, seed=seed, max_tokens=40)).choices[0].message.content for seed in range(8)]
    together = await asyncio.gather(*(chat_chunks(client, seed=seed % 8, max_tokens=40) for seed in range(64)))
    assert [joined(chunks) for chunks in together] == [alone[seed % 8] for seed in range(64)]
