"""Serves a runner over gRPC. Needs no torch: any `Runner` will do.

Three threads, so that a step never waits for the network and the network never waits for a step:

    gRPC loop (grpc.aio)  --queued steps-->  main thread (Runner.execute)  --pending steps-->  completion thread
            ^------------------------------- encoded results --------------------------------------+

The main thread launches a step while the one before still runs; the completion thread blocks until the device is done.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import FrameType
from typing import TypeVar

import grpc
import stepwire
import structlog
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio  # type: ignore[attr-defined]  # the stubs lack it
from stepwire.process.connections import KEEPALIVE_OPTIONS, MESSAGE_OPTIONS
from stepwire.v1 import worker_pb2, worker_pb2_grpc

from gpu_worker.listen import ListenAddress, ListenError
from gpu_worker.recording import Recorder
from gpu_worker.runner_api import EndsByItself, PendingStep, Runner, SessionEnded, StepError, UsesPauses, WorkerFacts
from gpu_worker.servicer import Servicer
from gpu_worker.session import QueuedStep, Session, StreamContext
from gpu_worker.step_codec import encode_facts, encode_result

logger = structlog.get_logger(__name__)

SERVICE_NAME = worker_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name
# The launching thread may hold the interpreter for most of a step; the default of 5 ms would add that to every result.
SWITCH_INTERVAL_S = 1e-4
# How long a thread that does not end may hold up the end of the process.
_LAST_RESORT_S = 3.0
# How long nothing must have come, and nothing been under way, for a pause. Between two steps of one stream there are
# gaps as well; what a runner does in those, the next step waits for.
_PAUSE_S = 0.05

_LAST_CALLS_S = 0.5
# How long a worker that cannot be used waits for a control plane to ask once more.
_LAST_WORDS_S = 2.0
_MAX_REASON_CHARS = 1000
_LOADING = "the worker is still loading its model"

T = TypeVar("T")

SERVER_OPTIONS = [
    *MESSAGE_OPTIONS,
    *KEEPALIVE_OPTIONS,
    # Two workers on one port would both start, and share the control plane's connections between them.
    ("grpc.so_reuseport", 0),
]


@dataclass(frozen=True, slots=True)
class _Reset:
    """Forget everything for this session, then tell the loop."""

    session: Session
    ready: asyncio.Future[str]


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step on its way to the completion thread."""

    step: QueuedStep
    pending: PendingStep
    queue_ns: int


class _Stop:
    """Last entry of a queue."""


class WorkerServer:
    """Listens from `start` on, says it is ready in `serve`, and ends by a signal or when the runner fails.

    Args:
        listen: address as in `WorkerSettings.listen`.
        credentials: for TLS; None serves in clear.
        shutdown_grace_s: how long queued steps may take after a signal.
        hang_limit_s: how long a new session may wait behind the step before; then the process ends, for it hangs.
        recorder: is told of everything that the control plane sends and is answered.
    """

    def __init__(
        self,
        listen: str,
        *,
        credentials: grpc.ServerCredentials | None = None,
        shutdown_grace_s: float = 10.0,
        hang_limit_s: float = 30.0,
        recorder: Recorder | None = None,
    ) -> None:
        self._recorder = recorder
        self._listen = ListenAddress.parse(listen)
        self._credentials = credentials
        self._shutdown_grace_s = shutdown_grace_s
        self._hang_limit_s = hang_limit_s
        self._instance_id = uuid.uuid4().hex
        self._facts: WorkerFacts | None = None
        self._loop = uvloop.new_event_loop()
        self._loop_thread = threading.Thread(target=self._run_loop, name="grpc", daemon=True)
        self._completion_thread = threading.Thread(target=self._complete_steps, name="completion", daemon=True)
        self._server: grpc.aio.Server | None = None
        self._health = health_aio.HealthServicer()
        self._session: Session | None = None
        self._work: SimpleQueue[QueuedStep | _Reset | _Stop] = SimpleQueue()
        self._launched: SimpleQueue[_Launched | threading.Event | _Stop] = SimpleQueue()
        # Counted by the main thread and by the completion thread.
        self._num_launched = self._num_completed = 0
        self._last_work_s = float("-inf")
        self._ending: asyncio.Task[None] | None = None  # set once, on the loop
        self._is_stopping = threading.Event()
        self._signal_receiver, self._signal_sender = socket.socketpair()
        for end in (self._signal_receiver, self._signal_sender):
            end.setblocking(False)
        self._failure_lock = threading.Lock()
        self._has_failed = False
        self._stuck_timer: asyncio.TimerHandle | None = None
        self._last_resort: threading.Timer | None = None
        self._abandon: Callable[[], None] = lambda: None
        # Why there will be no model, and whether anybody has asked for it, or was told.
        self._unusable = ""
        self._was_asked, self._has_told = False, threading.Event()

    # Life, on the main thread.

    def start(self) -> str:
        """Begin to listen and give the address, with its port. Raises `ListenError`."""
        self._listen.claim()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._loop_thread.start()
        port = self._on_loop(self._start_grpc())
        return str(self._listen) if self._listen.path is not None else f"{self._listen.host}:{port}"

    def serve(self, runner: Runner, on_ready: Callable[[WorkerFacts], None]) -> int:
        """Run the sessions' steps until a signal comes or the runner fails; gives the process's exit code."""
        facts = runner.describe()
        if self._recorder is not None:
            self._recorder.begin(encode_facts(facts, self._instance_id, stepwire.__version__))
        self._facts = facts
        self._completion_thread.start()
        self._on_loop(self._watch_signals())
        # A Python handler alone runs when the main thread next runs Python, which may be never: a signal that comes in
        # the moment before the thread waits for work does not end its wait. The byte that C writes reaches the loop.
        signal.set_wakeup_fd(self._signal_sender.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _leave_to_the_loop)
        self._on_loop(self._set_serving())
        if isinstance(runner, EndsByItself):
            self._abandon = runner.abandon
            runner.watch(lambda error: self._fail("the group", error), self.shut_down)
        on_ready(self._facts)
        # Asked once: what a protocol has is looked up member by member, 30 us a step.
        pausing = runner if isinstance(runner, UsesPauses) else None
        while not isinstance(work := self._next_work(pausing), _Stop):
            if isinstance(work, QueuedStep):
                self._launch(runner, work)
            else:
                self._reset(runner, work)
        self._launched.put(_Stop())
        self._completion_thread.join(_LAST_RESORT_S)
        is_hung = self._completion_thread.is_alive()
        if is_hung:
            logger.error("a launched step has not ended: the process ends without it")
        else:
            if not self._has_failed:
                runner.close()
            self.stop()
        if self._recorder is not None:
            # After the loop's end: nothing is delivered any more.
            self._recorder.close()
        return 1 if is_hung or self._has_failed else 0

    def shut_down(self, message: str) -> None:
        """End as after a signal: queued steps are answered first. Any thread."""
        self._loop.call_soon_threadsafe(self._begin_end, message)

    def outlive(self) -> None:
        """For who has more to do in this process once `serve` has returned: its end is no longer enforced."""
        if self._last_resort is not None:
            self._last_resort.cancel()

    def stop_unusable(self, reason: str) -> None:
        """Instead of `serve`: there will be no model. A control plane that waits for it is told. Any thread."""
        self._unusable = reason[:_MAX_REASON_CHARS]
        if self._was_asked:
            self._has_told.wait(_LAST_WORDS_S)
        self.stop()

    def stop(self) -> None:
        """Stop listening and end the gRPC thread. `serve` does it; needed where `serve` is never reached."""
        if self._loop_thread.is_alive():
            self._on_loop(self._stop_grpc())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop_thread.join(_LAST_RESORT_S)

    def _next_work(self, pausing: UsesPauses | None) -> QueuedStep | _Reset | _Stop:
        work = None if pausing is None else self._use_pause(pausing)
        if work is None:
            work = self._work.get()
        self._last_work_s = time.monotonic()
        return work

    def _use_pause(self, runner: UsesPauses) -> QueuedStep | _Reset | _Stop | None:
        """Let the runner prepare until work comes; None: there is no more to prepare."""
        while not self._has_failed:
            if self._num_launched != self._num_completed:
                # What a long step's result brings is still to come when the step has ended.
                self._last_work_s = time.monotonic()
            has_lasted = time.monotonic() - self._last_work_s >= _PAUSE_S
            try:
                return self._work.get_nowait() if has_lasted else self._work.get(timeout=_PAUSE_S)
            except Empty:
                if not has_lasted:
                    continue
            try:
                if not runner.idle():
                    break
            except Exception as error:
                self._fail("preparing for steps to come", error)
        return None

    def _launch(self, runner: Runner, step: QueuedStep) -> None:
        session, step_id = step.session, step.batch.step_id
        if session.is_over or self._has_failed:
            return
        queue_ns = time.monotonic_ns() - step.arrived_ns
        try:
            pending = runner.execute(step.batch, step.wait_for_mask)
        except StepError as error:
            logger.warning("step refused", session_id=session.session_id, step_id=step_id, reason=str(error))
            self._end_session(session, grpc.StatusCode.INVALID_ARGUMENT, f"step {step_id}: {error}")
        except SessionEnded as error:
            self._end_session(session, grpc.StatusCode.UNAVAILABLE, f"step {step_id}: {error}")
        except Exception as error:
            self._fail(f"step {step_id} of session {session.session_id}", error)
        else:
            self._num_launched += 1
            self._launched.put(_Launched(step, pending, queue_ns))

    def _reset(self, runner: Runner, reset: _Reset) -> None:
        if reset.session.is_over or self._has_failed:
            return
        # Steps of the session before may still be on the device, and their results in the runner's buffers.
        retired = threading.Event()
        self._launched.put(retired)
        while not retired.wait(0.1):
            if self._is_stopping.is_set():
                return
        try:
            runner.reset()
        except Exception as error:
            self._fail(f"the reset for session {reset.session.session_id}", error)
            return
        self._loop.call_soon_threadsafe(self._note_reset, reset)

    def _end_session(self, session: Session, code: grpc.StatusCode, message: str) -> None:
        """For other threads than the loop's; returns once the session is over, so that none of its steps runs after."""
        self._on_loop(self._close_session(session, code, message))

    def _fail(self, where: str, error: Exception) -> None:
        """End the process because the runner is broken. Any thread."""
        with self._failure_lock:
            if self._has_failed:
                return
            self._has_failed = True
        logger.error(
            f"{where} failed: this worker ends, its requests can be resumed elsewhere", error=str(error), exc_info=error
        )
        self._end_after(_LAST_RESORT_S, "the worker did not end by itself after a failure")
        self._loop.call_soon_threadsafe(self._begin_end, f"the worker failed in {where} and ends: {error}")
        # A launched step may wait for a rank that lives and itself waits for the one that is gone.
        self._abandon()

    def _end_after(self, seconds: float, message: str) -> None:
        if self._last_resort is not None:
            return  # the end that follows a failure is bounded already
        self._last_resort = threading.Timer(seconds, _end_process, [message])
        self._last_resort.daemon = True
        self._last_resort.start()

    # The completion thread.

    def _complete_steps(self) -> None:
        while not isinstance(launched := self._launched.get(), _Stop):
            if isinstance(launched, threading.Event):
                launched.set()
            elif not self._has_failed:
                self._complete(launched)
                self._num_completed += 1

    def _complete(self, launched: _Launched) -> None:
        session = launched.step.session
        try:
            result = launched.pending.result()
            # A step that was given up has a result, and a worthless one.
            if session.is_over or self._has_failed:
                return
            response = worker_pb2.RunStepsResponse(result=encode_result(result, launched.queue_ns))
        except Exception as error:
            self._fail(f"step {launched.step.batch.step_id} of session {session.session_id}", error)
            return
        self._loop.call_soon_threadsafe(session.deliver, response)

    # The gRPC loop's thread.

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    def _on_loop(self, coroutine: Coroutine[object, object, T]) -> T:
        """Run it on the loop, and wait: for other threads than the loop's, which never waits for them in turn."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _start_grpc(self) -> int:
        for service in ("", SERVICE_NAME):
            await self._health.set(service, health_pb2.HealthCheckResponse.NOT_SERVING)
        server = grpc.aio.server(options=SERVER_OPTIONS)
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(Servicer(self), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        address = str(self._listen)
        try:
            if self._credentials is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, self._credentials)
        except RuntimeError as error:
            raise ListenError(f"--listen: gRPC cannot listen on {address}: {error}") from error
        await server.start()
        self._server = server
        return port

    async def _watch_signals(self) -> None:
        self._loop.add_reader(self._signal_receiver, self._on_signal)

    def _on_signal(self) -> None:
        for number in self._signal_receiver.recv(64):
            if number in (signal.SIGTERM, signal.SIGINT):
                self._begin_end(f"the worker got {signal.Signals(number).name} and is shutting down")

    async def _set_serving(self) -> None:
        for service in ("", SERVICE_NAME):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    async def _stop_grpc(self) -> None:
        if self._server is not None:
            await self._server.stop(_LAST_CALLS_S)

    async def _close_session(self, session: Session, code: grpc.StatusCode, message: str) -> None:
        session.end(code, message)

    def _begin_end(self, message: str) -> None:
        if self._ending is None:
            self._ending = self._loop.create_task(self._end(message))
        elif self._has_failed and self._session is not None:
            self._session.end(grpc.StatusCode.INTERNAL, message)

    async def _end(self, message: str) -> None:
        if not self._has_failed:
            logger.info(message)
        await self._health.enter_graceful_shutdown()
        session = self._session
        if session is not None:
            if self._has_failed:
                session.end(grpc.StatusCode.INTERNAL, message)
            else:
                session.leave(message, self._shutdown_grace_s)
            try:
                await asyncio.wait_for(session.finished.wait(), self._shutdown_grace_s)
            except TimeoutError:
                logger.warning(
                    "steps are unanswered after shutdown_grace_s, or the control plane holds on: they are given up",
                    grace_s=self._shutdown_grace_s,
                )
                session.end(grpc.StatusCode.UNAVAILABLE, message)
        self._is_stopping.set()
        self._end_after(_LAST_RESORT_S, "the worker did not end by itself: a step hangs")
        self._work.put(_Stop())

    def describe(self) -> worker_pb2.DescribeResponse | None:
        """None while the model is loading."""
        return encode_facts(self._facts, self._instance_id, stepwire.__version__) if self._facts is not None else None

    def why_not(self) -> tuple[grpc.StatusCode, str]:
        """What `describe` cannot be answered with."""
        self._was_asked = True
        if not self._unusable:
            return grpc.StatusCode.UNAVAILABLE, _LOADING
        self._has_told.set()
        return grpc.StatusCode.FAILED_PRECONDITION, f"the worker could not load its model: {self._unusable}"

    async def run_session(self, hello: worker_pb2.SessionHello, context: StreamContext) -> None:
        """Serve one stream after its hello; the session before ends, and the runner forgets it."""
        if self._facts is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, _LOADING)
            return
        if self._ending is not None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the worker is shutting down")
            return
        session = Session(hello, self._facts, self._work.put, self._recorder)
        former, self._session = self._session, session
        if former is not None:
            former.end(grpc.StatusCode.ABORTED, f"session {hello.session_id} has taken the place of this one")
        if self._recorder is not None:
            self._recorder.hello(hello)
        logger.info("session begins", session_id=hello.session_id, peer=context.peer())
        ready: asyncio.Future[str] = self._loop.create_future()
        self._work.put(_Reset(session, ready))
        if self._stuck_timer is None:
            # Over all attempts until one is served: whoever waits may give up and come again.
            self._stuck_timer = self._loop.call_later(self._hang_limit_s, self._fail_stuck)
        try:
            await session.run(context, ready)
        finally:
            if self._session is session:
                self._session = None
            logger.info("session ended", session_id=hello.session_id)

    def _note_reset(self, reset: _Reset) -> None:
        if self._stuck_timer is not None:
            self._stuck_timer.cancel()
            self._stuck_timer = None
        _set_unless_done(reset.ready, self._instance_id)

    def _fail_stuck(self) -> None:
        message = f"the step before hangs: no new session could begin within {self._hang_limit_s:g} s"
        self._fail("beginning a session", TimeoutError(message))


def _leave_to_the_loop(number: int, frame: FrameType | None) -> None:
    """A signal's Python handler: without one, Python would not write the signal's number to the wakeup descriptor."""


def _set_unless_done(future: asyncio.Future[str], value: str) -> None:
    if not future.done():
        future.set_result(value)


def _end_process(message: str) -> None:
    """For when threads hang that nothing can wake."""
    logger.error(message)
    sys.stderr.flush()
    os._exit(1)
