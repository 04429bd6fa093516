from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
from grpc.aio import EOF  # type: ignore[attr-defined]  # the stubs lack it
from stepwire.v1 import worker_pb2

from gpu_worker.session import Session


class _Stream:
    """What a session is given of its stream; the client closes it once it has been told that the worker leaves."""

    def __init__(self, while_writing: Callable[[str], None]) -> None:
        self._while_writing = while_writing
        self._is_told = asyncio.Event()
        self.written: list[str] = []
        self.status = grpc.StatusCode.OK

    async def write(self, message: worker_pb2.RunStepsResponse) -> None:
        kind = str(message.WhichOneof("message"))
        self._while_writing(kind)
        await asyncio.sleep(0)
        self.written.append(kind)
        if kind == "leaving":
            self._is_told.set()

    async def read(self) -> Any:
        await self._is_told.wait()
        return EOF

    async def abort(self, code: grpc.StatusCode, message: str) -> None:
        self.status = code


def test_a_worker_that_is_told_to_end_while_it_says_ready_says_that_it_leaves() -> None:
    async def run() -> _Stream:
        facts: Any = None
        session = Session(worker_pb2.SessionHello(session_id="a", understands_leaving=True), facts, lambda step: None)
        stream: Any = _Stream(lambda kind: session.leave("told", 10.0) if kind == "ready" else None)
        ready = asyncio.get_running_loop().create_future()
        ready.set_result("instance")
        await asyncio.wait_for(session.run(stream, ready), 60)
        assert isinstance(stream, _Stream)
        return stream

    stream = asyncio.run(run())
    assert (stream.written, stream.status) == (["ready", "leaving"], grpc.StatusCode.OK)
