"""Events are legal, in OpenAI's order, and what the official client's own types read."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk

from gateway.errors import control_plane_lost
from gateway.mailbox import PromptOutput, SequenceUpdate, TokenLogprob, TopLogprob, UsageTotals
from gateway.sse import DONE, ChatChunks, CompletionChunks, StreamShape, error_event

USAGE = UsageTotals(num_prompt_tokens=5, num_completion_tokens=3, num_cached_tokens=2)


def shape(**fields: Any) -> StreamShape:
    return StreamShape(**{"id": "chatcmpl-1", "created": 123, "model": 'org/"m"', **fields})


def update(index: int = 0, text: str = "", **fields: Any) -> SequenceUpdate:
    return SequenceUpdate(index, text_parts=[text] if text else [], **fields)


def events(raw: bytes) -> list[dict[str, Any]]:
    """The JSON objects of a stream's bytes; every event is one data line and a blank line."""
    assert raw.endswith(b"\n\n") or not raw
    parsed = []
    for event in raw.decode().split("\n\n")[:-1]:
        assert event.startswith("data: ") and "\n" not in event
        if event != "data: [DONE]":
            parsed.append(json.loads(event.removeprefix("data: ")))
    return parsed


def test_chat_order() -> None:
    chunks = ChatChunks(shape())
    raw = chunks.render([update(text="he"), update(1, "x")])
    raw += chunks.render(
        [update(text="llo", finish_reason="stop", stop_reason="END"), update(1, finish_reason="length")]
    )
    raw += chunks.end(USAGE)
    assert raw.endswith(DONE) and raw.count(b"[DONE]") == 1
    parsed = events(raw)
    seen = [
        (each["choices"][0]["index"], each["choices"][0]["delta"], each["choices"][0]["finish_reason"])
        for each in parsed
    ]
    assert seen == [
        (0, {"role": "assistant", "content": ""}, None),
        (0, {"content": "he"}, None),
        (1, {"role": "assistant", "content": ""}, None),
        (1, {"content": "x"}, None),
        (0, {"content": "llo"}, None),
        (0, {}, "stop"),
        (1, {}, "length"),
    ]
    for each in parsed:
        assert (each["id"], each["created"], each["model"]) == ("chatcmpl-1", 123, 'org/"m"')
        assert each["object"] == "chat.completion.chunk"
        assert each.get("usage") is None and "error" not in each
        assert len(each["choices"]) == 1
        ChatCompletionChunk.model_validate(each, strict=True)
    assert [each["choices"][0].get("stop_reason") for each in parsed[-2:]] == ["END", None]
    assert chunks.num_events == len(parsed) + 1


def test_completion_order() -> None:
    chunks = CompletionChunks(shape(id="cmpl-1"), num_samples=1)
    raw = chunks.render([update(text="a", finish_reason="length")]) + chunks.end(USAGE)
    parsed = events(raw)
    assert [(each["choices"][0]["text"], each["choices"][0]["finish_reason"]) for each in parsed] == [
        ("a", None),
        ("", "length"),
    ]
    assert all(each["object"] == "text_completion" for each in parsed)


@pytest.mark.parametrize(
    "fields", [{}, {"include_usage": True}, {"include_usage": True, "continuous_usage": True}, {"num_top_logprobs": 1}]
)
@pytest.mark.parametrize("kind", [ChatChunks, lambda shape: CompletionChunks(shape, 1)])
def test_text_alone_is_written_as_an_update_of_it_is(kind: Any, fields: dict[str, Any]) -> None:
    short, long = kind(shape(**fields)), kind(shape(**fields))
    for text in ("a", 'é"\n', "b"):
        assert short.render_text(text, 2) == long.render([update(text=text, num_tokens=2)])
    assert short.render([update(finish_reason="stop")]) == long.render([update(finish_reason="stop")])
    assert short.num_events == long.num_events


def test_usage_comes_last_alone_and_is_null_before() -> None:
    for chunks in (ChatChunks(shape(include_usage=True)), CompletionChunks(shape(include_usage=True), 1)):
        parsed = events(chunks.render([update(text="a", finish_reason="stop")]) + chunks.end(USAGE))
        assert all(each["usage"] is None for each in parsed[:-1])
        assert parsed[-1]["choices"] == []
        assert parsed[-1]["usage"] == {
            "prompt_tokens": 5,
            "completion_tokens": 3,
            "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 2},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }


@pytest.mark.parametrize("kind", [ChatChunks, lambda shape: CompletionChunks(shape, 1)])
def test_continuous_usage_grows_to_the_total(kind: Any) -> None:
    chunks = kind(shape(include_usage=True, continuous_usage=True, num_prompt_tokens=5))
    raw = chunks.render([update(text="a", num_tokens=2)])
    raw += chunks.render([update(num_tokens=1, finish_reason="stop")])
    parsed = events(raw + chunks.end(USAGE))
    counts = [each["usage"]["completion_tokens"] for each in parsed]
    assert counts == sorted(counts) and counts[-1] == counts[-2] == 3
    assert all(each["usage"]["prompt_tokens"] == 5 for each in parsed)
    assert all(each["usage"]["total_tokens"] == 5 + each["usage"]["completion_tokens"] for each in parsed)


def test_updates_with_nothing_to_show_make_no_event() -> None:
    chunks = CompletionChunks(shape(), 1)
    assert chunks.render([update(num_tokens=1)]) == b""
    assert chunks.render([]) == b""
    # The role is due with a chat's first update, whatever it holds.
    assert len(events(ChatChunks(shape()).render([update(num_tokens=1)]))) == 1


@given(st.lists(st.tuples(st.integers(0, 2), st.text(min_size=1))))
def test_any_text_survives(script: list[tuple[int, str]]) -> None:
    chunks = ChatChunks(shape())
    parsed = events(b"".join(chunks.render([update(index, text)]) for index, text in script))
    for index in range(3):
        got = "".join(each["choices"][0]["delta"]["content"] for each in parsed if each["choices"][0]["index"] == index)
        assert got == "".join(text for where, text in script if where == index)


ENTRIES = [
    TokenLogprob(b"a", -0.5, (TopLogprob(b"a", -0.5), TopLogprob(b"b", -1.0))),
    TokenLogprob(b"\xc3", float("-inf"), ()),
]


def test_chat_logprobs_ride_with_their_tokens() -> None:
    chunks = ChatChunks(shape(num_top_logprobs=1))
    parsed = events(chunks.render([update(text="a", logprobs=ENTRIES)]) + chunks.render([update(finish_reason="stop")]))
    content = parsed[1]["choices"][0]["logprobs"]["content"]
    assert [(each["token"], each["logprob"], each["bytes"], len(each["top_logprobs"])) for each in content] == [
        ("a", -0.5, [97], 1),
        ("bytes:\\xc3", -9999.0, [0xC3], 0),
    ]
    assert parsed[2]["choices"][0]["logprobs"] is None
    for each in parsed:
        ChatCompletionChunk.model_validate(each, strict=True)


def test_logprobs_without_text_yet_are_sent() -> None:
    chunks = CompletionChunks(shape(num_top_logprobs=0), 1)
    (first,) = events(chunks.render([update(logprobs=ENTRIES[:1])]))
    (second,) = events(chunks.render([update(text="ab", logprobs=ENTRIES[:1])]))
    assert first["choices"][0]["text"] == ""
    assert [each["choices"][0]["logprobs"]["text_offset"] for each in (first, second)] == [[0], [1]]
    Completion.model_validate({**second, "choices": [{**second["choices"][0], "finish_reason": "stop"}]}, strict=True)


def test_token_ids_and_prompt_ids() -> None:
    chunks = ChatChunks(shape(return_token_ids=True), prompts=[PromptOutput("", [9, 8], [])])
    parsed = events(chunks.render([update(text="a", token_ids=[1]), update(1, token_ids=[2])]))
    assert [each.get("prompt_token_ids") for each in parsed] == [[9, 8], None, None, None]
    assert [each["choices"][0].get("token_ids") for each in parsed] == [None, [1], None, [2]]


def test_echo_and_prompt_ids_of_a_batch() -> None:
    chunks = CompletionChunks(
        shape(return_token_ids=True, echo=True), 2, prompts=[PromptOutput("P", [1], []), PromptOutput("Q", [2], [])]
    )
    parsed = events(chunks.render([update(1, "x", token_ids=[7]), update(2, "y", token_ids=[8])]))
    assert [(each["choices"][0]["index"], each["choices"][0]["text"]) for each in parsed] == [
        (1, "P"),
        (1, "x"),
        (2, "Q"),
        (2, "y"),
    ]
    assert [each["choices"][0].get("prompt_token_ids") for each in parsed] == [[1], None, [2], None]


def test_an_error_is_one_event_that_the_client_takes_for_one() -> None:
    (event,) = events(error_event(control_plane_lost()))
    assert event["error"]["code"] == "control_plane_lost"
    assert set(event) == {"error"}
