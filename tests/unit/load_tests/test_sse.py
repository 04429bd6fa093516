"""SSE parsing: whatever the network cuts, the same events come out."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from load_tests.records import RequestRecord
from load_tests.rest_target import take_event
from load_tests.sse import SseParser

_STREAM = (
    b'data: {"a": 1}\n\n: keep-alive\n\ndata:{"b":2}\n\nevent: x\ndata: one\ndata: two\nid: 7\n\n\n\ndata: [DONE]\n\n'
)
_EVENTS = [b'{"a": 1}', b'{"b":2}', b"one\ntwo", b"[DONE]"]


def _cut(data: bytes, cuts: list[int]) -> list[bytes]:
    bounds = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[begin:end] for begin, end in pairwise(bounds)]


@given(cuts=st.lists(st.integers(0, 10_000), max_size=12), line_end=st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_events_do_not_depend_on_how_the_stream_is_cut(cuts: list[int], line_end: bytes) -> None:
    parser = SseParser()
    stream = _STREAM.replace(b"\n", line_end)
    found = [event for chunk in _cut(stream, cuts) for event in parser.feed(chunk)]
    # A lone CR at the very end may be half of a CRLF: the event ends with whatever follows.
    found += parser.feed(b": end" + line_end)
    assert found == _EVENTS


def test_an_event_without_its_end_is_not_given() -> None:
    parser = SseParser()
    assert parser.feed(b"data: half\n") == []
    assert parser.feed(b"\ndata: more") == [b"half"]


@pytest.mark.parametrize(
    ("event", "num_tokens"),
    [
        ({"choices": [{"text": "a", "finish_reason": None}]}, 1),
        ({"choices": [{"text": "", "finish_reason": None}]}, 1),  # its text is held back
        ({"choices": [{"text": "", "finish_reason": "length"}]}, 0),
        ({"choices": [{"text": "z", "finish_reason": "length"}]}, 1),  # vLLM: last text and reason together
        ({"choices": [{"text": "", "finish_reason": None, "token_ids": [4, 5, 6]}]}, 3),
        ({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 9}}, 0),
        ({"choices": [{"text": "a", "finish_reason": None}], "usage": None}, 1),
    ],
)
def test_tokens_of_an_event(event: dict[str, object], num_tokens: int) -> None:
    assert take_event(event, RequestRecord()) == num_tokens


def test_usage_has_the_last_word() -> None:
    record = RequestRecord()
    take_event({"choices": [{"text": "three tokens in one", "finish_reason": None}]}, record)
    assert record.num_tokens == 1
    assert record.num_cached_tokens is None
    usage = {"prompt_tokens": 12, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 8}}
    take_event({"choices": [], "usage": usage}, record)
    assert (record.num_prompt_tokens, record.num_tokens, record.num_cached_tokens) == (12, 3, 8)


def test_details_may_be_null() -> None:
    record = RequestRecord()
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "prompt_tokens_details": None}
    take_event({"choices": [], "usage": usage}, record)
    assert record.num_cached_tokens is None


def test_an_error_in_the_stream_is_the_requests_error() -> None:
    record = RequestRecord()
    take_event({"error": {"message": "the worker was lost", "type": "server_error"}}, record)
    assert record.error == "the worker was lost"
