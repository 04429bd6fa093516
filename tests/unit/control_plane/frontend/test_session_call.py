"""Session on the real gRPC server over a scripted core: what a session's client sees."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio
import pytest
from stepwire.v1 import inference_pb2 as pb

from control_plane.core.request import CoreRequest, FinishReason, OutputSink, RequestFault
from control_plane.frontend.output_stream import RequestOutput
from control_plane.frontend.served_model import ServedModel
from tests.unit.control_plane.frontend.running_server import (
    Running,
    ids,
    open_session,
    serving,
    token_request,
    until,
)
from tests.unit.control_plane.frontend.scripted_engine import ScriptedEngine


class WritingEngine(ScriptedEngine):
    """Writes a step as the core does: planned in the next turn of the loop, written by a task that this wakes."""

    def __init__(self, order: list[str]) -> None:
        super().__init__()
        self.order = order

    def submit(self, request: CoreRequest, sink: OutputSink) -> None:
        super().submit(request, sink)
        loop = asyncio.get_running_loop()
        loop.call_soon(loop.call_soon, self.order.append, "step")


@pytest.mark.parametrize("way", ["Generate", "Session"])
async def test_the_step_of_a_request_is_written_before_its_acceptance(
    model: ServedModel, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    take = RequestOutput.take

    def noted(self: RequestOutput, response: pb.GenerateResponse, now_s: float) -> None:
        order.append("acceptance")
        take(self, response, now_s)

    monkeypatch.setattr(RequestOutput, "take", noted)
    async with serving(model, engine=WritingEngine(order)) as running:
        if way == "Generate":
            await running.stub.Generate(token_request()).read()
        else:
            await open_session(running, [1])
    assert order == ["step", "acceptance"]


async def test_a_session_sends_a_step_in_one_message(model: ServedModel) -> None:
    async with serving(model) as running:
        session, request_ids = await open_session(running, range(20))
        for request_id in request_ids.values():
            running.engine.output(ids("hello"), request_id=request_id)
        message = await session.read()
        assert {tagged.tag for tagged in message.responses} == set(range(20))
        assert {tagged.response.deltas[0].text for tagged in message.responses} == {"hello"}


async def packed_session(running: Running, tags: Sequence[int]) -> tuple[Any, dict[int, str]]:
    """A session of packed texts, one message at a time; everything is accepted and receipted."""
    session = running.stub.Session()
    options = pb.SessionOptions(packed_texts=True, max_outstanding_messages=1)
    await session.write(pb.SessionRequest(options=options))
    request_ids: dict[int, str] = {}
    for tag in tags:
        await session.write(pb.SessionRequest(tag=tag, generate=pb.SessionGenerate(request=token_request())))
    while len(request_ids) < len(tags):
        for tagged in (await session.read()).responses:
            request_ids[tagged.tag] = tagged.response.accepted.request_id
        await session.write(RECEIPT)
    return session, request_ids


RECEIPT = pb.SessionRequest(receipt=pb.SessionReceipt())


async def test_texts_are_packed_where_a_session_asks_for_it(model: ServedModel) -> None:
    async with serving(model) as running:
        session, request_ids = await packed_session(running, [1, 2, 3])
        for tag, text in ((1, "a"), (2, "hello"), (3, "b")):
            running.engine.output(ids(text), request_id=request_ids[tag])
        running.engine.output([], request_id=request_ids[3], finish=FinishReason.LENGTH)
        message = await session.read()
        packed = message.texts
        assert dict(zip(packed.tags, packed.texts, strict=True)) == {1: "a", 2: "hello"}
        assert list(packed.num_tokens) == [len(ids("a")), len(ids("hello"))]
        # What says more than text says all of it at once.
        [tagged] = message.responses
        delta = tagged.response.deltas[0]
        assert (tagged.tag, delta.text, delta.finish_reason) == (3, "b", pb.FINISH_REASON_LENGTH)


async def test_what_comes_before_a_receipt_grows_together(model: ServedModel) -> None:
    async with serving(model) as running:
        session, request_ids = await packed_session(running, [1, 2])

        async def say(texts: str) -> None:
            for text in texts:
                for request_id in request_ids.values():
                    running.engine.output(ids(text), request_id=request_id)
                await asyncio.sleep(0)

        await say("a")
        first = await session.read()
        await say("bcdef")
        reading = asyncio.ensure_future(session.read())
        done, _ = await asyncio.wait([reading], timeout=0.2)
        assert not done, "the first one is still in the client's hands"
        await session.write(RECEIPT)
        second = await reading
        assert (list(first.texts.texts), list(first.texts.num_tokens)) == (["a", "a"], [1, 1])
        assert (list(second.texts.texts), list(second.texts.num_tokens)) == (["bcdef", "bcdef"], [5, 5])
        # A cancelled request is not spoken of any more, whatever is still to be said.
        running.engine.output(ids("x"), request_id=request_ids[2])
        await session.write(pb.SessionRequest(tag=2, cancel=pb.SessionCancel()))
        await until(lambda: running.engine.cancelled == [request_ids[2]])


async def test_ending_a_session_cancels_what_runs(model: ServedModel) -> None:
    async with serving(model) as running:
        session, request_ids = await open_session(running, [1, 2, 3])
        running.engine.end(request_id=request_ids[2], fault=RequestFault("INTERNAL", "x", retryable=False))
        await session.read()
        await session.done_writing()
        assert await session.read() is grpc.aio.EOF
        assert set(running.engine.cancelled) == {request_ids[1], request_ids[3]}
        assert await session.code() == grpc.StatusCode.OK


async def test_a_client_that_goes_away_frees_its_requests(model: ServedModel) -> None:
    async with serving(model) as running:
        session, request_ids = await open_session(running, [1, 2])
        session.cancel()
        await until(lambda: set(running.engine.cancelled) == set(request_ids.values()))


async def test_cancel_ends_one_request_without_a_word(model: ServedModel) -> None:
    async with serving(model) as running:
        session, request_ids = await open_session(running, [1, 2])
        running.engine.output(ids("a"), request_id=request_ids[1])
        await session.read()
        await session.write(pb.SessionRequest(tag=1, cancel=pb.SessionCancel()))
        await session.write(pb.SessionRequest(tag=9, cancel=pb.SessionCancel()))
        await until(lambda: running.engine.cancelled == [request_ids[1]])
        running.engine.output(ids("b"), request_id=request_ids[2])
        assert [tagged.tag for tagged in (await session.read()).responses] == [2]
        # Its tag is free again.
        await session.write(pb.SessionRequest(tag=1, generate=pb.SessionGenerate(request=token_request())))
        assert (await session.read()).responses[0].response.HasField("accepted")


async def test_a_tag_in_use(model: ServedModel) -> None:
    async with serving(model) as running:
        session, request_ids = await open_session(running, [1, 2])
        await session.write(pb.SessionRequest(tag=1, generate=pb.SessionGenerate(request=token_request())))
        [tagged] = (await session.read()).responses
        assert tagged.tag == 1 and tagged.response.error.violations[0].field == "tag"
        assert running.engine.cancelled == [request_ids[1]]
        running.engine.output(ids("b"), request_id=request_ids[2])
        assert [tagged.tag for tagged in (await session.read()).responses] == [2], "the others go on"


async def test_timeouts_of_a_session(model: ServedModel) -> None:
    async with serving(model) as running:
        generate = pb.SessionGenerate(request=token_request())
        generate.timeout.FromMilliseconds(1500)
        session, request_ids = await open_session(running, [1], timeout=generate.timeout)
        error = (await session.read()).responses[0].response.error
        assert (error.code, error.reason) == (4, "deadline_exceeded")
        assert running.engine.cancelled == [request_ids[1]]

        generate.timeout.FromMilliseconds(-5)
        await session.write(pb.SessionRequest(tag=2, generate=generate))
        error = (await session.read()).responses[0].response.error
        assert error.violations[0].field == "timeout"


async def test_the_timeout_of_an_ended_request_is_not_the_next_ones(model: ServedModel) -> None:
    async with serving(model) as running:
        session = running.stub.Session()
        wrong = pb.SessionGenerate(request=token_request(n=0))
        wrong.timeout.FromMilliseconds(150)
        await session.write(pb.SessionRequest(tag=1, generate=wrong))
        assert (await session.read()).responses[0].response.error.violations[0].field == "n"

        await session.write(pb.SessionRequest(tag=1, generate=pb.SessionGenerate(request=token_request())))
        assert (await session.read()).responses[0].response.HasField("accepted")
        await asyncio.sleep(0.25)
        assert running.engine.cancelled == []
        running.engine.output(ids("still here"))
        assert (await session.read()).responses[0].response.deltas[0].text == "still here"


async def test_errors_of_a_session_leave_it_usable(model: ServedModel) -> None:
    async with serving(model) as running:
        session = running.stub.Session()
        wrong = pb.SessionGenerate(request=token_request(n=0))
        await session.write(pb.SessionRequest(tag=1, generate=wrong))
        await session.write(pb.SessionRequest(tag=2))
        errors: dict[int, pb.RequestError] = {}
        while len(errors) < 2:
            errors |= {tagged.tag: tagged.response.error for tagged in (await session.read()).responses}
        assert errors[1].violations[0].field == "n" and errors[2].violations[0].field == "action"
        await session.write(pb.SessionRequest(tag=1, generate=pb.SessionGenerate(request=token_request())))
        assert (await session.read()).responses[0].response.HasField("accepted")


async def test_a_slow_reader_gets_fewer_larger_messages(model: ServedModel) -> None:
    """The core never waits, and what the reader missed comes joined."""
    async with serving(model) as running:
        session, request_ids = await open_session(running, [1])
        num_outputs = 3000
        chunk = ids("the lazy dog ") * 40
        for _ in range(num_outputs):
            running.engine.output(chunk, request_id=request_ids[1])
            await asyncio.sleep(0)
        running.engine.end(request_id=request_ids[1])
        num_messages = 0
        text = ""
        while True:
            [tagged] = (await session.read()).responses
            num_messages += 1
            text += "".join(delta.text for delta in tagged.response.deltas)
            if tagged.response.HasField("usage"):
                break
        assert text == "the lazy dog " * 40 * num_outputs
        assert num_messages < num_outputs / 2
