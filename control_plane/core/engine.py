"""The loop around the scheduler: arrivals in, steps out, results in, outputs out. The one place that awaits both sides.

Everything runs on one event loop and nothing here blocks. The order within a turn is chosen for the worker: when a
result comes, the next step is planned and sent first, and only then are the outputs handed to the frontend.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass

import structlog
from stepwire.v1 import worker_pb2

from control_plane.core.admission import AdmissionLimits, QueueLoad, check_admission
from control_plane.core.metrics import CoreMetrics
from control_plane.core.policy import PolicyName
from control_plane.core.request import (
    AdmissionError,
    CoreRequest,
    ModelFacts,
    OutputSink,
    RequestFault,
    SequenceOutput,
)
from control_plane.core.scheduler import Scheduler, SchedulerConfig
from control_plane.core.step_codec import decode_result, encode_mask, encode_step
from control_plane.core.step_deadline import StepDeadline
from control_plane.core.step_feed import StepFeed
from control_plane.core.step_plan import ProtocolError, StepEvents, StepPlan
from control_plane.core.token_masks import FilledMasks, MaskFiller
from control_plane.core.worker_link import WorkerAddress, WorkerLink, WorkerUnavailable

log = structlog.get_logger(__name__)

_CONNECT_TIMEOUT_S = 5.0
_RECONNECT_PAUSE_S = 0.1
_WATCHDOG_PERIOD_S = 0.25


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Policy of the core; what the worker has comes from the worker."""

    max_num_batched_tokens: int | None = None
    max_queued_requests: int = 1024
    max_queued_tokens: int = 1 << 20
    scheduling_policy: PolicyName = "fcfs"
    enable_prefix_caching: bool = True
    steps_in_flight: int = 2
    step_timeout_s: float = 60.0


@dataclass(slots=True)
class _StepInFlight:
    plan: StepPlan
    sent_s: float
    is_masked: bool = False  # its mask was sent or is being made


class Engine:
    """Drives one worker group. Implements `EngineClient`; every method on the event loop that runs `run`."""

    def __init__(self, address: WorkerAddress, config: EngineConfig, metrics: CoreMetrics) -> None:
        self._address = address
        self._config = config
        self._metrics = metrics
        self._scheduler: Scheduler | None = None
        self._worker: worker_pb2.DescribeResponse | None = None
        self._facts: ModelFacts | None = None
        self._limits: AdmissionLimits | None = None
        self._buckets: list[int] = []
        self._link: WorkerLink | None = None
        self._sinks: dict[str, OutputSink] = {}
        self._in_flight: deque[_StepInFlight] = deque()
        self._deadline = StepDeadline(config.step_timeout_s)
        self._masks = MaskFiller()
        self._pump_scheduled = False
        self._draining = False
        # What steps held, for AdminService.
        self.steps = StepFeed()
        self._idle = asyncio.Event()
        self._idle.set()
        self._connected = asyncio.Event()
        self._lost = asyncio.Event()
        metrics.watch(self)

    # ---- what the frontend may ask (EngineClient) ----

    @property
    def facts(self) -> ModelFacts:
        if self._facts is None:
            raise AdmissionError("no_worker", "no worker is ready yet", code="UNAVAILABLE", retry_after_s=2.0)
        return self._facts

    def submit(self, request: CoreRequest, sink: OutputSink) -> None:
        if self._draining:
            raise AdmissionError("draining", "this server is shutting down", code="UNAVAILABLE", retry_after_s=5.0)
        if self._scheduler is None or self._limits is None:
            raise AdmissionError("no_worker", "no worker is ready yet", code="UNAVAILABLE", retry_after_s=2.0)
        scheduler = self._scheduler
        load = QueueLoad(
            scheduler.num_waiting_requests, scheduler.num_waiting_tokens, self._metrics.prompt_tokens_per_s()
        )
        try:
            check_admission(request, self._limits, load)
        except AdmissionError as error:
            self._metrics.rejections.labels(reason=error.reason).inc()
            raise
        scheduler.add_request(request, time.monotonic())
        self._sinks[request.request_id] = sink
        self._idle.clear()
        self._schedule_pump()

    def cancel(self, request_id: str) -> None:
        if self._sinks.pop(request_id, None) is not None and self._scheduler is not None:
            self._scheduler.cancel(request_id)
            self._metrics.cancellations.inc()
            self._schedule_pump()
            self._note_idle()

    def finish_sequence(self, request_id: str, index: int) -> None:
        if self._scheduler is None:
            return
        ended = self._scheduler.finish_sequence(request_id, index)
        if ended is not None:
            # The caller may be inside on_output: its on_end comes on its own turn.
            asyncio.get_running_loop().call_soon(self._publish, StepEvents(ended=[(ended, None)]))
        self._schedule_pump()

    # ---- life ----

    @property
    def scheduler(self) -> Scheduler | None:
        """For metrics and tests: look, do not touch."""
        return self._scheduler

    @property
    def worker(self) -> worker_pb2.DescribeResponse | None:
        """What the worker in use says of itself."""
        return self._worker

    @property
    def is_connected(self) -> bool:
        return self._connected.is_set()

    @property
    def is_draining(self) -> bool:
        return self._draining

    @property
    def num_open_requests(self) -> int:
        return len(self._sinks)

    async def wait_connected(self) -> None:
        await self._connected.wait()

    async def wait_lost(self) -> None:
        """Returns when a connected worker is lost."""
        await self._lost.wait()

    async def run(self) -> None:
        """Keep a session with the worker until cancelled: connect, work, and on loss connect again."""
        watchdog = asyncio.create_task(self._watch())
        last_complaint = ""
        try:
            while True:
                link = WorkerLink(self._address, self._on_result, self._on_lost)
                try:
                    facts = await link.connect(_CONNECT_TIMEOUT_S)
                    self._adopt(facts)
                except WorkerUnavailable as error:
                    if str(error) != last_complaint:
                        log.warning("worker not available, trying again", reason=str(error))
                        last_complaint = str(error)
                    await link.close()
                    await asyncio.sleep(_RECONNECT_PAUSE_S)
                    continue
                last_complaint = ""
                self._link = link
                self._lost.clear()
                self._connected.set()
                self._metrics.worker_connections.inc()
                log.info(
                    "worker connected", model=facts.model, devices=list(facts.devices), num_blocks=facts.num_blocks
                )
                self._schedule_pump()
                await self._lost.wait()
                await link.close()
        finally:
            watchdog.cancel()
            self._masks.close()
            if self._link is not None:
                await self._link.close()

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for those admitted; False if some were still running after `timeout_s`."""
        self._draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def abort_all(self, message: str) -> None:
        """End every request with a fault: the time to drain is over."""
        sinks, self._sinks = self._sinks, {}
        for request_id, sink in sinks.items():
            if self._scheduler is not None:
                self._scheduler.cancel(request_id)
            sink.on_end(0, RequestFault("UNAVAILABLE", message, retryable=True))
        self._note_idle()

    # ---- the step loop ----

    def _schedule_pump(self) -> None:
        """Plan in the next turn of the loop, so that arrivals of one turn share a step."""
        if not self._pump_scheduled:
            self._pump_scheduled = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        """Fill the window of steps in flight."""
        self._pump_scheduled = False
        if self._scheduler is None or self._link is None or not self._connected.is_set():
            return
        while len(self._in_flight) < max(self._config.steps_in_flight, self._scheduler.config.wanted_in_flight):
            now = time.monotonic()
            plan = self._scheduler.plan(now)
            if plan is None:
                break
            self._link.send(encode_step(plan, self._buckets))
            self._in_flight.append(_StepInFlight(plan, now))
            self._metrics.note_plan(plan, now)
        self._begin_mask()
        self._note_idle()

    def _begin_mask(self) -> None:
        """Make the mask of the oldest step in flight: every token before it is known."""
        if not self._in_flight or self._facts is None or self._link is None:
            return
        step, link, loop = self._in_flight[0], self._link, asyncio.get_running_loop()
        if step.is_masked or not step.plan.mask_rows:
            return
        step.is_masked = True

        def done(filled: Future[FilledMasks]) -> None:
            if not filled.cancelled():
                loop.call_soon_threadsafe(self._on_masks, link, filled.result())

        self._masks.begin(step.plan, self._facts.vocab_size, done)

    def _on_masks(self, link: WorkerLink, filled: FilledMasks) -> None:
        scheduler = self._scheduler
        if scheduler is None:
            return
        if link is self._link:
            link.send(encode_mask(filled.step_id, filled.rows, filled.bitmask))
        for sequence in filled.over:
            self._publish(scheduler.finish_matched(sequence))
        for sequence, reason in filled.failed:
            log.warning("a grammar gave up", request_id=sequence.request.request.request_id, reason=reason)
            fault = RequestFault("INVALID_ARGUMENT", f"the structured output cannot go on: {reason}", retryable=False)
            self._publish(scheduler.fail_sequence(sequence, fault))
        if filled.over or filled.failed:
            self._schedule_pump()

    def _on_result(self, result: worker_pb2.StepResult) -> None:
        if not self._in_flight or self._scheduler is None or self._link is None:
            return
        step = self._in_flight.popleft()
        try:
            events = self._scheduler.apply(decode_result(result, step.plan))
        except ProtocolError as error:
            self._in_flight.appendleft(step)
            self._link.lose(f"the worker broke the step protocol: {error}")
            return
        self._begin_mask()
        now = time.monotonic()
        self._deadline.note(step.plan.num_tokens, now - step.sent_s)
        self._pump()
        self._publish(events)
        self._metrics.note_result(step.plan, result.timings, now - step.sent_s)
        self.steps.note(step.plan, result.timings, now - step.sent_s, self._scheduler)

    def _publish(self, events: StepEvents) -> None:
        sinks = self._sinks
        for state, output in events.outputs:
            sink = sinks.get(state.request.request_id)
            if sink is not None:
                self._deliver(state.request.request_id, sink, output)
        for state, fault in events.ended:
            sink = sinks.pop(state.request.request_id, None)
            if sink is not None:
                sink.on_end(state.num_cached_tokens, fault)
        if events.ended:
            self._note_idle()

    def _deliver(self, request_id: str, sink: OutputSink, output: SequenceOutput) -> None:
        """One request's output; what goes wrong with it ends that request and no other."""
        try:
            sink.on_output(output)
        except Exception:
            log.exception("an output could not be delivered", request_id=request_id)
            self.cancel(request_id)
            sink.on_end(0, RequestFault("INTERNAL", "the output could not be delivered", retryable=False))

    def _note_idle(self) -> None:
        if not self._sinks:
            self._idle.set()

    # ---- the worker comes and goes ----

    def _adopt(self, worker: worker_pb2.DescribeResponse) -> None:
        """Take up a worker's facts. Raises `WorkerUnavailable` if requests in hand could not go on with it."""
        budget = self._config.max_num_batched_tokens or worker.max_num_batched_tokens
        budget = min(budget, worker.max_num_batched_tokens)
        if worker.buckets:
            # A full step fills its bucket: more would be padded up to the next.
            budget = max((bucket for bucket in worker.buckets if bucket <= budget), default=worker.buckets[0])
        config = SchedulerConfig(
            first_block_id=worker.first_block_id,
            num_blocks=worker.num_blocks,
            block_size=worker.block_size,
            max_num_seqs=worker.max_num_seqs,
            max_num_batched_tokens=budget,
            policy=self._config.scheduling_policy,
            enable_prefix_caching=self._config.enable_prefix_caching,
            num_stages=max(1, worker.num_stages),
        )
        # A sequence has to fit the pool as well as the context.
        max_model_len = min(worker.max_model_len, (worker.num_blocks - worker.first_block_id) * worker.block_size)
        facts = ModelFacts(
            model=worker.model,
            max_model_len=max_model_len,
            vocab_size=worker.vocab_size,
            max_num_logprobs=worker.max_num_logprobs,
            can_mask_tokens=worker_pb2.CAPABILITY_TOKEN_MASK in worker.capabilities,
        )
        if self._facts is not None and facts != self._facts:
            raise WorkerUnavailable(f"the worker now serves {facts}, this control plane was started for {self._facts}")
        if self._scheduler is not None and config != self._scheduler.config and self._scheduler.num_requests:
            smaller = config.num_blocks - config.first_block_id < self._scheduler.num_usable_blocks
            if smaller or config.block_size != self._scheduler.config.block_size:
                raise WorkerUnavailable("the worker came back smaller while requests are waiting for it")
        self._worker, self._facts, self._buckets = worker, facts, list(worker.buckets)
        self._limits = AdmissionLimits(
            max_queued_requests=self._config.max_queued_requests,
            max_queued_tokens=self._config.max_queued_tokens,
            max_model_len=max_model_len,
            max_num_seqs=worker.max_num_seqs,
            block_size=worker.block_size,
            num_usable_blocks=worker.num_blocks - worker.first_block_id,
            vocab_size=worker.vocab_size,
        )
        if self._scheduler is None:
            self._scheduler = Scheduler(config)
        else:
            self._scheduler.reset(config)

    def _on_lost(self, reason: str) -> None:
        """Every request waits for the next worker, but for those that have cost too many."""
        self._connected.clear()
        self._lost.set()
        self._link = None
        self._in_flight.clear()
        self._deadline.forget()
        self._metrics.worker_losses.inc()
        num_requests = len(self._sinks)
        log.error("worker lost", reason=reason, num_requests=num_requests)
        if self._scheduler is not None:
            self._publish(self._scheduler.worker_lost())

    async def _watch(self) -> None:
        """A hung worker is a dead worker; and an idle moment is one to check the books in."""
        checked = True
        while True:
            await asyncio.sleep(_WATCHDOG_PERIOD_S)
            is_idle = self._idle.is_set() and not self._in_flight
            if is_idle and not checked and self._scheduler is not None:
                self._check_books()
            checked = is_idle
            if self._in_flight and self._link is not None:
                step = self._in_flight[0]
                limit_s = self._deadline.limit_s(step.plan.num_tokens)
                waited_s = time.monotonic() - step.sent_s
                if waited_s > limit_s:
                    self._link.lose(
                        f"step {step.plan.step_id} of {step.plan.num_tokens} tokens gave no result "
                        f"in {waited_s:.1f} s (limit {limit_s:.1f} s)"
                    )

    def _check_books(self) -> None:
        try:
            if self._scheduler is not None:
                self._scheduler.check_integrity()
        except RuntimeError:
            # A defect of ours. Nothing runs now, so nobody is harmed by looking; going on blindly would be worse.
            log.exception("the books of rows and blocks disagree: starting a new session")
            if self._link is not None:
                self._link.lose("the control plane's books disagree")
