"""WorkerService as gRPC calls it: what needs no runner is answered here, the rest by the worker's server."""

from __future__ import annotations

from typing import Protocol

import grpc
from grpc.aio import EOF  # type: ignore[attr-defined]  # the stubs lack it
from stepwire.v1 import worker_pb2, worker_pb2_grpc

from gpu_worker.session import StreamContext
from gpu_worker.step_codec import PROTOCOL_VERSION


class Worker(Protocol):
    """What is asked of it on the gRPC loop."""

    def describe(self) -> worker_pb2.DescribeResponse | None:
        """None while there is no model."""
        ...

    def why_not(self) -> tuple[grpc.StatusCode, str]:
        """What `describe` cannot be answered with."""
        ...

    async def run_session(self, hello: worker_pb2.SessionHello, context: StreamContext) -> None:
        """Serve one stream after its hello."""
        ...


class Servicer(worker_pb2_grpc.WorkerServiceServicer):
    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    async def Describe(
        self,
        request: worker_pb2.DescribeRequest,
        context: grpc.aio.ServicerContext[worker_pb2.DescribeRequest, worker_pb2.DescribeResponse],
    ) -> worker_pb2.DescribeResponse:
        response = self._worker.describe()
        if response is None:
            await context.abort(*self._worker.why_not())
        return response

    async def RunSteps(self, requests: object, context: StreamContext) -> None:
        # `requests` is the iterator form of context.read(), which is what the session uses.
        first = await context.read()
        if first is EOF or first.WhichOneof("message") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message of a stream must be a hello")
        hello = first.hello
        if hello.protocol_version != PROTOCOL_VERSION:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the control plane speaks version {hello.protocol_version} of the worker contract"
                f" and this worker version {PROTOCOL_VERSION}: install the same release of stepwire on both",
            )
        if not hello.session_id:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "hello.session_id is empty")
        await self._worker.run_session(hello, context)
