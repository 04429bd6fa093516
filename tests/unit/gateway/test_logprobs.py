"""Logprobs in both shapes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.logprobs import FLOOR, CompletionLogprobs, chat_content, floored, token_text
from gateway.mailbox import TokenLogprob, TopLogprob


def entry(token: bytes, logprob: float, *top: tuple[bytes, float]) -> TokenLogprob:
    return TokenLogprob(token, logprob, tuple(TopLogprob(*each) for each in top))


@pytest.mark.parametrize(
    ("logprob", "expected"), [(-1.5, -1.5), (0.0, 0.0), (-math.inf, FLOOR), (math.nan, FLOOR), (-1e9, FLOOR)]
)
def test_floor(logprob: float, expected: float) -> None:
    assert floored(logprob) == expected


def test_tokens_that_are_not_whole_characters_are_written_as_bytes() -> None:
    assert token_text("é".encode()) == "é"
    assert token_text(b"\xc3") == "bytes:\\xc3"


def test_chat_lists_fall_and_keep_the_sampled_token_outside_them() -> None:
    (content,) = chat_content([entry(b"c", -3.0, (b"b", -2.0), (b"a", -0.5), (b"z", -math.inf))], 2)
    assert content["token"] == "c"
    assert content["logprob"] == -3.0
    assert content["bytes"] == [99]
    assert [(top["token"], top["logprob"]) for top in content["top_logprobs"]] == [("a", -0.5), ("b", -2.0)]


def test_no_alternatives_is_an_empty_list() -> None:
    assert chat_content([entry(b"a", -1.0)], 0)[0]["top_logprobs"] == []


@pytest.mark.parametrize(("num_top", "expected"), [(0, {"c"}), (1, {"a", "c"}), (2, {"a", "b", "c"})])
def test_completion_top_holds_the_sampled_token(num_top: int, expected: set[str]) -> None:
    columns = CompletionLogprobs(num_top).columns([entry(b"c", -3.0, (b"a", -0.5), (b"b", -2.0))])
    assert set(columns["top_logprobs"][0]) == expected


def test_tokens_spelled_alike_keep_the_better_logprob() -> None:
    columns = CompletionLogprobs(2).columns([entry(b"a", -4.0, (b"a", -0.5), (b"a", -1.0))])
    assert columns["top_logprobs"] == [{"a": -0.5}]


@given(st.text(min_size=1), st.data())
def test_text_offsets_do_not_depend_on_how_bytes_were_cut(text: str, data: st.DataObject) -> None:
    """Cut a text's bytes anywhere into tokens, and the tokens anywhere into chunks."""
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, len(raw)), max_size=len(raw))) | {len(raw)})
    tokens = [raw[start:end] for start, end in zip([0, *cuts], cuts, strict=False)]
    entries = [entry(token, -1.0) for token in tokens]
    whole = CompletionLogprobs(0).columns(entries)["text_offset"]

    split = data.draw(st.integers(0, len(entries)))
    streamed = CompletionLogprobs(0)
    assert streamed.columns(entries[:split])["text_offset"] + streamed.columns(entries[split:])["text_offset"] == whole
    # A token that begins a character stands where that character stands.
    position = 0
    for token, offset in zip(tokens, whole, strict=True):
        before = raw[:position]
        assert offset == len(before.decode(errors="ignore"))
        position += len(token)


@pytest.mark.parametrize(
    ("tokens", "prompt", "offsets"),
    [
        # A token that begins every prompt is not in its text; nor is the blank before the first word.
        ([b"<s>", b" Once", b" upon"], "Once upon", [0, 0, 4]),
        ([b"Once", b"<|eot|>", b" upon"], "Once upon", [0, 4, 4]),
        # Parts of a character stand where it begins.
        (["é".encode()[:1], "é".encode()[1:], b"a"], "éa", [0, 0, 1]),
    ],
)
def test_offsets_of_an_echoed_prompt_are_those_of_its_text(
    tokens: list[bytes], prompt: str, offsets: list[int]
) -> None:
    columns = CompletionLogprobs(0)
    assert columns.echoed([entry(token, -1.0) for token in tokens], prompt)["text_offset"] == offsets
    after = columns.columns([entry(b" a", -1.0), entry(b"b", -1.0)])["text_offset"]
    assert after == [len(prompt), len(prompt) + 2]
