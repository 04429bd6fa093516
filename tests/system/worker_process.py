"""A worker in a process of its own, and the least of a control plane that talks to it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from stepwire.v1 import worker_pb2, worker_pb2_grpc

from gpu_worker.runner_api import StepBatch, StepResult, TokenMask
from gpu_worker.step_codec import PROTOCOL_VERSION, decode_result, encode_mask, encode_step

REPOSITORY = Path(__file__).resolve().parents[2]
# On a machine that may be busy; it only ends a test that has failed.
TIMEOUT_S = 180.0
_BIG_MESSAGES = [("grpc.max_send_message_length", 2**26), ("grpc.max_receive_message_length", 2**26)]


class WorkerProcess:
    """`python -m MODULE FLAGS`; its log lines are JSON objects."""

    def __init__(
        self,
        flags: Sequence[str],
        *,
        module: str = "gpu_worker",
        env: dict[str, str] | None = None,
        prefix: Sequence[str] = (),
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("STEPWIRE_")}
        environment["PYTHONPATH"] = os.pathsep.join([".", "proto", "kernels"])
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", module, *flags],
            cwd=REPOSITORY,
            env=environment | (env or {}),
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        self._timeout_s = timeout_s
        self.lines: list[str] = []
        self._num_seen = 0
        self._unfinished = b""

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stderr is not None:
            self.process.stderr.close()

    def forget_events(self) -> None:
        """Those that were logged so far are no longer found."""
        self._num_seen = len(self.lines)

    def wait_for_event(self, text: str, *, then_forget: bool = False, timeout_s: float | None = None) -> dict[str, Any]:
        """The first log entry whose event contains `text`; with `then_forget` the next call looks after it."""
        deadline = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        seen = self._num_seen
        while True:
            for line in self.lines[seen:]:
                seen += 1
                entry = json.loads(line) if line.startswith("{") else {"event": line}
                if text in entry["event"]:
                    if then_forget:
                        self._num_seen = seen
                    return dict(entry)
            if not self._read_lines(deadline):
                raise AssertionError(f"no event {text!r} in:\n" + "\n".join(self.lines))

    def wait_for_exit(self) -> int:
        """The exit code; what was logged is in `lines`."""
        deadline = time.monotonic() + self._timeout_s
        while self._read_lines(deadline):
            pass
        return self.process.wait(max(0.1, deadline - time.monotonic()))

    def send_signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def _read_lines(self, deadline: float) -> bool:
        """Take what was logged; False at the end of the log."""
        stream = self.process.stderr
        assert stream is not None
        if not select.select([stream], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise AssertionError("the worker is silent; so far:\n" + "\n".join(self.lines))
        data = os.read(stream.fileno(), 65536)
        *complete, self._unfinished = (self._unfinished + data).split(b"\n")
        self.lines += [line.decode() for line in complete]
        return bool(data)


class WorkerClient:
    """A channel to a worker."""

    def __init__(self, address: str, credentials: grpc.ChannelCredentials | None = None) -> None:
        if credentials is None:
            self.channel = grpc.insecure_channel(address, options=_BIG_MESSAGES)
        else:
            self.channel = grpc.secure_channel(address, credentials, options=_BIG_MESSAGES)
        self.stub = worker_pb2_grpc.WorkerServiceStub(self.channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> WorkerClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.channel.close()

    def describe(self) -> worker_pb2.DescribeResponse:
        return self.stub.Describe(worker_pb2.DescribeRequest(), timeout=TIMEOUT_S)

    def health(self, service: str = "") -> str:
        stub = health_pb2_grpc.HealthStub(self.channel)
        response = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_S)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))

    def open(
        self,
        session_id: str = "a-session",
        *,
        protocol_version: int = PROTOCOL_VERSION,
        understands_leaving: bool = False,
    ) -> WorkerSession:
        """A stream whose hello is sent; its answer is not yet read."""
        session = WorkerSession(self.stub)
        hello = worker_pb2.SessionHello(
            session_id=session_id, protocol_version=protocol_version, understands_leaving=understands_leaving
        )
        session.send(worker_pb2.RunStepsRequest(hello=hello))
        return session

    def start(self, session_id: str = "a-session", *, understands_leaving: bool = False) -> WorkerSession:
        """A stream whose session is ready."""
        session = self.open(session_id, understands_leaving=understands_leaving)
        assert session.receive().ready.session_id == session_id
        return session


class WorkerSession:
    """One RunSteps stream."""

    def __init__(self, stub: worker_pb2_grpc.WorkerServiceStub) -> None:
        self._requests: SimpleQueue[worker_pb2.RunStepsRequest | None] = SimpleQueue()
        self.call = stub.RunSteps(self._iterate(), timeout=TIMEOUT_S)

    def _iterate(self) -> Iterator[worker_pb2.RunStepsRequest]:
        while (request := self._requests.get()) is not None:
            yield request

    def send(self, request: worker_pb2.RunStepsRequest) -> None:
        self._requests.put(request)

    def step(self, batch: StepBatch) -> None:
        self.send(worker_pb2.RunStepsRequest(step=encode_step(batch)))

    def mask(self, step_id: int, mask: TokenMask) -> None:
        self.send(worker_pb2.RunStepsRequest(mask=encode_mask(step_id, mask)))

    def half_close(self) -> None:
        self._requests.put(None)

    def receive(self) -> worker_pb2.RunStepsResponse:
        return next(self.call)

    def result(self) -> StepResult:
        response = self.receive()
        assert response.WhichOneof("message") == "result"
        return decode_result(response.result)

    def end(self) -> tuple[grpc.StatusCode, str]:
        """The status that the stream ended with; results that come before are dropped."""
        try:
            for _ in self.call:
                pass
        except grpc.RpcError:
            pass
        return self.call.code(), self.call.details()
