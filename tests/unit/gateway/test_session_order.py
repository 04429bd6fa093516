"""In which order a message of the session is dealt with."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from stepwire.v1 import inference_pb2

from gateway.client import ControlPlaneClient
from gateway.config import GatewaySettings
from gateway.metrics import GatewayMetrics
from gateway.response_body import _EXTENSION
from gateway.sse import ChatChunks, StreamShape
from gateway.streaming import SseResponse, StreamTurns


class Body:
    may_write = True

    def write(self, data: bytes) -> None:
        pass


class Call:
    """A session whose other end says these messages and no more."""

    def __init__(self, messages: list[inference_pb2.SessionResponse]) -> None:
        self._messages = messages

    async def read(self) -> Any:
        await asyncio.sleep(0.01)
        return self._messages.pop(0) if self._messages else grpc.aio.EOF  # type: ignore[attr-defined]


async def test_a_streams_last_events_go_before_the_receipt_of_the_message_that_ended_it() -> None:
    metrics = GatewayMetrics()
    client = ControlPlaneClient(GatewaySettings.model_validate({"control_plane": "unix:/nobody.sock"}), metrics)
    client._outgoing = outgoing = asyncio.Queue()
    generation = client.generate([inference_pb2.GenerateRequest()], num_samples=1, stream=True, names={})
    (tag,) = generation.tags
    accepted, ended = inference_pb2.SessionResponse(), inference_pb2.SessionResponse()
    accepted.responses.add(tag=tag).response.accepted.model = "m"
    last = ended.responses.add(tag=tag).response
    last.deltas.add(text="word", num_tokens=1, finish_reason=inference_pb2.FINISH_REASON_LENGTH)
    last.usage.num_completion_tokens = 1
    order: list[str] = []

    async def write() -> None:
        while True:
            if (await outgoing.get()).HasField("receipt"):
                order.append("receipt")

    async def send(message: Any) -> None:
        order.append("last events" if b"[DONE]" in message.get("body", b"") else "head")

    async def respond() -> None:
        await generation.mailbox.accepted()
        response = SseResponse(generation, ChatChunks(StreamShape("id", 0, "m")), StreamTurns(metrics), 0, "request")
        await response({"extensions": {_EXTENSION: Body()}}, None, send)  # type: ignore[arg-type]

    writer, response = asyncio.create_task(write()), asyncio.create_task(respond())
    await client._read_all(Call([accepted, ended]), outgoing)  # type: ignore[arg-type]
    await response
    await asyncio.sleep(0)
    writer.cancel()
    assert order.count("receipt") == 2
    assert order.index("last events") < len(order) - 1 - order[::-1].index("receipt")
