"""Deltas grow together until they are taken; a request ends exactly once."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stepwire.v1 import inference_pb2 as pb

from gateway.errors import ApiError, control_plane_lost
from gateway.mailbox import Mailbox


def delta(
    index: int, text: str, *, finish: pb.FinishReason = pb.FINISH_REASON_UNSPECIFIED, **fields: object
) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        deltas=[pb.SequenceDelta(index=index, text=text, num_tokens=1, finish_reason=finish, **fields)]
    )


def usage(prompt: int = 3, completion: int = 2, cached: int = 1) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        usage=pb.Usage(num_prompt_tokens=prompt, num_completion_tokens=completion, num_cached_tokens=cached)
    )


ACCEPTED = pb.GenerateResponse(accepted=pb.Accepted(request_id="r", model="m", num_prompt_tokens=3))


async def test_updates_of_a_sequence_are_merged_until_taken() -> None:
    mailbox = Mailbox(1, 2, stream=True)
    for response in (delta(0, "a"), delta(1, "x"), delta(0, "b"), delta(0, "", finish=pb.FINISH_REASON_LENGTH)):
        assert not mailbox.put(0, response)
    first, second = mailbox.take_updates()
    assert (first.index, first.text, first.num_tokens, first.finish_reason) == (0, "ab", 3, "length")
    assert (second.index, second.text, second.num_tokens, second.finish_reason) == (1, "x", 1, None)
    mailbox.put(0, delta(1, "y"))
    (update,) = mailbox.take_updates()
    assert (update.index, update.text) == (1, "y")


Script = list[tuple[int, str, bool, str]]


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.text(max_size=3), st.booleans(), st.sampled_from(["", "text", "updates"])),
        max_size=30,
    ),
    st.booleans(),
)
def test_no_text_is_lost_or_reordered_however_it_comes_and_is_taken(script: Script, stream: bool) -> None:
    async def run() -> None:
        mailbox = Mailbox(1, 3, stream=stream)
        expected, got = ["", "", ""], ["", "", ""]
        num_tokens = 0

        def take_updates() -> None:
            nonlocal num_tokens
            for update in mailbox.take_updates():
                got[update.index] += update.text
                num_tokens += update.num_tokens

        for index, text, alone, taken in script:
            expected[index] += text
            if alone and text and not index:
                mailbox.put_text(0, text, 1)
            else:
                mailbox.put(0, delta(index, text))
            if taken == "text":
                part, count = mailbox.take_text()
                got[0] += part
                num_tokens += count
            if taken == "updates":
                take_updates()
        assert mailbox.put(0, usage())
        take_updates()
        assert got == expected
        assert num_tokens == len(script)
        assert mailbox.ended and mailbox.take_text() == ("", 0)

    asyncio.run(run())


async def test_choices_are_numbered_over_the_batch() -> None:
    mailbox = Mailbox(2, 3, stream=False)
    mailbox.put(1, delta(2, "z", finish=pb.FINISH_REASON_STOP))
    mailbox.put(0, delta(1, "b", finish=pb.FINISH_REASON_STOP))
    mailbox.put(0, usage())
    assert not mailbox.ended
    mailbox.put(1, usage())
    assert [(update.index, update.text) for update in await mailbox.take_all()] == [(1, "b"), (5, "z")]
    assert (mailbox.usage.num_prompt_tokens, mailbox.usage.num_completion_tokens, mailbox.usage.num_cached_tokens) == (
        6,
        4,
        2,
    )


async def test_stop_reasons_and_logprobs_are_copied() -> None:
    logprob = pb.TokenLogprob(token_id=1, logprob=-0.5, token=b"a", top=[pb.TopLogprob(token=b"b", logprob=-1.5)])
    mailbox = Mailbox(1, 1, stream=True)
    mailbox.put(0, delta(0, "a", token_ids=[7], logprobs=[logprob]))
    mailbox.put(0, delta(0, "", token_ids=[8], finish=pb.FINISH_REASON_STOP, stop_string="END"))
    (update,) = mailbox.take_updates()
    assert update.token_ids == [7, 8]
    assert (update.logprobs[0].token, update.logprobs[0].top[0].token) == (b"a", b"b")
    assert update.stop_reason == "END"
    mailbox.put(0, delta(0, "", finish=pb.FINISH_REASON_STOP, stop_token_id=0))
    assert mailbox.take_updates()[0].stop_reason == 0


async def test_accepted_waits_for_every_prompt() -> None:
    mailbox = Mailbox(2, 1, stream=True)
    waiting = asyncio.ensure_future(mailbox.accepted())
    mailbox.put(1, ACCEPTED)
    await asyncio.sleep(0)
    assert not waiting.done()
    mailbox.put(0, ACCEPTED)
    assert [each.num_prompt_tokens for each in await waiting] == [3, 3]


async def test_an_error_before_acceptance_is_raised_and_the_first_one_counts() -> None:
    mailbox = Mailbox(2, 1, stream=True)
    waiting = asyncio.ensure_future(mailbox.accepted())
    await asyncio.sleep(0)
    mailbox.fail(ApiError(400, "first"))
    mailbox.fail(control_plane_lost())
    with pytest.raises(ApiError, match="first"):
        await waiting


async def test_a_streams_error_comes_after_the_text_before_it() -> None:
    mailbox = Mailbox(1, 1, stream=True)
    mailbox.put(0, ACCEPTED)
    mailbox.put(0, delta(0, "a"))
    mailbox.fail(control_plane_lost())
    assert [update.text for update in mailbox.take_updates()] == ["a"]
    assert mailbox.ended and mailbox.error is not None
    assert mailbox.take_updates() == []


async def test_a_whole_answer_raises_its_error() -> None:
    mailbox = Mailbox(1, 1, stream=False)
    waiting = asyncio.ensure_future(mailbox.take_all())
    await asyncio.sleep(0)
    mailbox.put(0, delta(0, "a"))
    mailbox.fail(control_plane_lost())
    with pytest.raises(ApiError, match="lost"):
        await waiting


@pytest.mark.parametrize("method", ["accepted", "take_all"])
async def test_a_client_that_leaves_wakes_whoever_waits(method: str) -> None:
    mailbox = Mailbox(1, 1, stream=method != "take_all")
    waiting = asyncio.ensure_future(getattr(mailbox, method)())
    await asyncio.sleep(0)
    mailbox.disconnect()
    assert not await waiting
    assert mailbox.ended and mailbox.disconnected


async def test_a_stream_is_told_of_news_and_takes_them_together() -> None:
    mailbox = Mailbox(2, 2, stream=True)
    told: list[bool] = []
    mailbox.on_news = lambda: told.append(mailbox.ended)
    mailbox.put_text(1, "a", 1)
    mailbox.put(1, delta(0, "b"))
    mailbox.put_text(1, "c", 2)
    assert told == [False] * 3
    (update,) = mailbox.take_updates()
    assert (update.index, update.text, update.num_tokens) == (2, "abc", 4)
    assert mailbox.put(0, usage()) and mailbox.put(1, usage())
    assert told[-1]


async def test_nobody_is_told_of_the_pieces_of_a_whole_answer() -> None:
    mailbox = Mailbox(1, 1, stream=False)
    told: list[None] = []
    mailbox.on_news = lambda: told.append(None)
    mailbox.put_text(0, "a", 1)
    assert not told
    mailbox.put(0, usage())
    assert told


async def test_token_ids_that_come_packed_are_deltas_like_others() -> None:
    mailbox = Mailbox(2, 2, stream=True)
    told: list[None] = []
    mailbox.on_news = lambda: told.append(None)
    mailbox.put_text(0, "a", 1)
    mailbox.put_token_ids(0, "b", [7, 8])
    mailbox.put_token_ids(1, "", [9])
    assert len(told) == 3
    assert mailbox.take_text() == ("", 0)
    first, second = mailbox.take_updates()
    assert (first.index, first.text, first.token_ids, first.num_tokens) == (0, "ab", [7, 8], 3)
    assert (second.index, second.text, second.token_ids, second.num_tokens) == (2, "", [9], 1)


async def test_a_long_text_that_nobody_takes_is_whole() -> None:
    mailbox = Mailbox(1, 1, stream=True)
    for _ in range(2):
        for index in range(5000):
            mailbox.put_text(0, f"{index},", 1)
        expected = "".join(f"{index}," for index in range(5000))
        assert mailbox.take_text() == (expected, 5000)
    mailbox.put_text(0, "x" * 5000, 1)
    (update,) = mailbox.take_updates()
    assert (update.text, update.num_tokens) == ("x" * 5000, 1)
