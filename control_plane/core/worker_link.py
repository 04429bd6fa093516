"""The step stream to one worker group: connecting, sending, receiving, and noticing that it is gone."""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import grpc
import structlog
from grpc import aio
from stepwire.process.connections import KEEPALIVE_OPTIONS, MESSAGE_OPTIONS, NO_PROXY_OPTIONS
from stepwire.process.tls import Renewed
from stepwire.v1 import worker_pb2, worker_pb2_grpc

from control_plane.core.step_codec import PROTOCOL_VERSION

log = structlog.get_logger(__name__)

END_OF_STREAM = aio.EOF  # type: ignore[attr-defined]
CHANNEL_OPTIONS = [
    *MESSAGE_OPTIONS,
    *KEEPALIVE_OPTIONS,
    *NO_PROXY_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class WorkerUnavailable(Exception):
    """The worker cannot be reached, or refuses to work with this control plane."""


class WorkerUnusable(WorkerUnavailable):
    """Waiting does not help: the worker says so itself."""


class WorkerRefused(WorkerUnusable):
    """This control plane refuses to work with the worker; the message names what does not fit."""


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    """`target` as gRPC writes it; `credentials` for TCP with TLS, none for a unix socket or a trusted network."""

    target: str
    credentials: Renewed[grpc.ChannelCredentials] | None = None


class WorkerLink:
    """One session with one worker group.

    The callbacks are called on the event loop; `on_lost` once, and nothing after it. One writer task and one reader
    task own the stream: two concurrent writes would kill it, and a read that is cancelled cancels the call.
    """

    def __init__(
        self,
        address: WorkerAddress,
        on_result: Callable[[worker_pb2.StepResult], None],
        on_leaving: Callable[[worker_pb2.SessionLeaving], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self._address = address
        self._on_result = on_result
        self._on_leaving = on_leaving
        self._on_lost = on_lost
        self._outgoing: deque[worker_pb2.RunStepsRequest] = deque()
        self._may_write = asyncio.Event()
        self._channel: aio.Channel | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = False

    async def connect(self, timeout_s: float) -> worker_pb2.DescribeResponse:
        """Open a session; returns what the worker says of itself. Raises `WorkerUnavailable`."""
        address = self._address
        if address.credentials is None:
            self._channel = aio.insecure_channel(address.target, options=CHANNEL_OPTIONS)
        else:
            self._channel = aio.secure_channel(address.target, address.credentials.take(), options=CHANNEL_OPTIONS)
        stub = worker_pb2_grpc.WorkerServiceStub(self._channel)  # type: ignore[no-untyped-call]
        try:
            async with asyncio.timeout(timeout_s):
                facts: worker_pb2.DescribeResponse = await stub.Describe(
                    worker_pb2.DescribeRequest(), wait_for_ready=True
                )
                self._call = stub.RunSteps()
                session_id = uuid.uuid4().hex
                hello = worker_pb2.SessionHello(
                    session_id=session_id, protocol_version=PROTOCOL_VERSION, understands_leaving=True
                )
                await self._call.write(worker_pb2.RunStepsRequest(hello=hello))
                answer = await self._call.read()
        except TimeoutError as error:
            await self.close()
            raise WorkerUnavailable(f"no answer from {address.target} within {timeout_s:g} s") from error
        except aio.AioRpcError as error:
            await self.close()
            raise _failed(address, error.code(), error.details()) from error
        if answer is END_OF_STREAM:
            code, details = await self._call.code(), await self._call.details()
            await self.close()
            raise _failed(address, code, details)
        if answer.ready.session_id != session_id:
            await self.close()
            raise WorkerUnavailable(f"{address.target}: answered {answer!r} to hello")
        if answer.ready.instance_id != facts.instance_id:
            await self.close()
            raise WorkerUnavailable(f"{address.target}: the worker was replaced while connecting")
        self._tasks = [asyncio.create_task(self._write_steps()), asyncio.create_task(self._read_results())]
        return facts

    def send(self, request: worker_pb2.RunStepsRequest) -> None:
        """Queue a step; steps go out in order."""
        self._outgoing.append(request)
        self._may_write.set()

    async def close(self) -> None:
        """End the session. No callback comes any more."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        if self._channel is not None:
            await self._channel.close(None)

    def lose(self, reason: str) -> None:
        """Give the worker up: it is hung, or it broke the protocol."""
        if not self._closed:
            self._closed = True
            self._call.cancel()
            self._on_lost(reason)

    async def _write_steps(self) -> None:
        try:
            while True:
                await self._may_write.wait()
                self._may_write.clear()
                while self._outgoing:
                    await self._call.write(self._outgoing.popleft())
        except (aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the reader learns why, and tells

    async def _read_results(self) -> None:
        try:
            while (response := await self._call.read()) is not END_OF_STREAM:
                if self._closed:
                    return
                kind = response.WhichOneof("message")
                if kind == "result":
                    self._on_result(response.result)
                elif kind == "leaving":
                    self._on_leaving(response.leaving)
                else:
                    self.lose("the worker sent something that is neither a step's result nor that it leaves")
                    return
                # The next step goes out first: asking for the next result wakes gRPC's threads, and they take the core.
                await asyncio.sleep(0)
            code, details = await self._call.code(), await self._call.details()
            reason = f"{code.name}: {details}" if code is not grpc.StatusCode.OK else "the worker ended the session"
        except aio.AioRpcError as error:
            reason = f"{error.code().name}: {error.details()}"
        except Exception as error:
            # Without its reader a session would look alive and give nothing: end it where it can be seen.
            log.exception("a result could not be taken")
            reason = f"a result could not be taken: {error}"
        self.lose(reason)


def _failed(address: WorkerAddress, code: grpc.StatusCode, details: str | None) -> WorkerUnavailable:
    message = f"{address.target}: {code.name}: {details}"
    return (WorkerUnusable if code is grpc.StatusCode.FAILED_PRECONDITION else WorkerUnavailable)(message)
