"""The core as the frontend sees it: who is let in, which worker group runs a request, and where its outputs go.

Each group plans its own steps (`worker_group`); the engine owns the requests. A request has one home at a time. It gets
another when its group is lost, drained or taken away: it then goes on from its token ids, and because sampling is keyed
by seed and position it goes on as it would have.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import structlog
from stepwire.v1 import worker_pb2

from control_plane.core.admission import QueueLoad, check_fits, check_queue
from control_plane.core.engine_config import EngineConfig
from control_plane.core.group_facts import admission_limits, check_may_serve, model_facts, scheduler_config
from control_plane.core.metrics import CoreMetrics
from control_plane.core.prefix_cache import BlockHash, extend_chain, root_hash
from control_plane.core.request import (
    AdmissionError,
    CoreRequest,
    ModelFacts,
    OutputSink,
    RequestFault,
)
from control_plane.core.router import GroupLoad, RequestNeeds, choose_group
from control_plane.core.scheduler import Scheduler
from control_plane.core.sequence import RequestState
from control_plane.core.step_feed import StepFeed
from control_plane.core.step_plan import StepEvents
from control_plane.core.token_masks import FilledMasks, MaskFiller
from control_plane.core.worker_group import WorkerGroup
from control_plane.core.worker_link import WorkerAddress, WorkerRefused, WorkerUnavailable

log = structlog.get_logger(__name__)

_DRAIN_POLL_S = 0.02


class GroupError(Exception):
    """What was asked of a group cannot be done; one line that says why."""


@dataclass(slots=True)
class _OpenRequest:
    state: RequestState
    home: WorkerGroup


class Engine:
    """Drives worker groups. Implements `EngineClient` and `GroupHost`; everything on the event loop that runs `run`."""

    def __init__(self, addresses: Sequence[WorkerAddress], config: EngineConfig, metrics: CoreMetrics) -> None:
        self._config = config
        self._metrics = metrics
        self._facts: ModelFacts | None = None
        self._open: dict[str, _OpenRequest] = {}
        self._arrivals = count()
        self._group_numbers = count()
        self._masks = MaskFiller()
        self._draining = False
        # What steps held, for AdminService.
        self.steps = StepFeed()
        self._idle = asyncio.Event()
        self._idle.set()
        self._connected = asyncio.Event()
        self._lost = asyncio.Event()
        self._tasks: dict[WorkerGroup, asyncio.Task[None]] = {}
        self._failure: asyncio.Future[None] | None = None
        self._groups = [self._new_group(address) for address in addresses]
        metrics.watch(self)

    # ---- what the frontend may ask (EngineClient) ----

    @property
    def facts(self) -> ModelFacts:
        if self._facts is None:
            raise _no_worker()
        return self._facts

    def submit(self, request: CoreRequest, sink: OutputSink) -> None:
        if self._draining:
            raise AdmissionError("draining", "this server is shutting down", code="UNAVAILABLE", retry_after_s=5.0)
        if request.request_id in self._open:
            raise ValueError(f"request id {request.request_id} is already in use")
        try:
            groups = self._admit(request)
        except AdmissionError as error:
            if error.reason != "no_worker":
                self._metrics.rejections.labels(reason=error.reason).inc()
            raise
        needs = RequestNeeds(len(request.prompt_ids), request.num_sequences)
        hashes = self._prompt_hashes(request, groups)
        group = self._choose(needs, hashes, groups)
        state = self._scheduler_of(group).add_request(request, time.monotonic(), hashes)
        state.sink = sink
        self._open[request.request_id] = _OpenRequest(state, group)
        self._idle.clear()
        group.schedule_pump()

    def cancel(self, request_id: str) -> None:
        entry = self._open.pop(request_id, None)
        if entry is not None:
            entry.state.sink = None
            self._scheduler_of(entry.home).cancel(request_id)
            self._metrics.cancellations.inc()
            entry.home.schedule_pump()
            self._note_idle()

    def finish_sequence(self, request_id: str, index: int) -> None:
        entry = self._open.get(request_id)
        if entry is None:
            return
        ended = self._scheduler_of(entry.home).finish_sequence(request_id, index)
        if ended is not None:
            # The caller may be inside on_output: its on_end comes on its own turn.
            asyncio.get_running_loop().call_soon(self.publish, StepEvents(ended=[(ended, None)]))
        entry.home.schedule_pump()

    # ---- life ----

    @property
    def groups(self) -> Sequence[WorkerGroup]:
        """For metrics, AdminService and tests: look, do not touch."""
        return self._groups

    @property
    def is_connected(self) -> bool:
        """Whether there is a worker."""
        return self._connected.is_set()

    @property
    def is_draining(self) -> bool:
        return self._draining

    @property
    def num_open_requests(self) -> int:
        return len(self._open)

    async def wait_connected(self) -> None:
        """Returns once a worker is there."""
        await self._connected.wait()

    async def wait_lost(self) -> None:
        """Returns when the last connected worker is lost."""
        await self._lost.wait()

    async def run(self) -> None:
        """Keep a session with every group's worker until cancelled. Raises what a group's own loop raised."""
        self._failure = asyncio.get_running_loop().create_future()
        try:
            for group in self._groups:
                self._start(group)
            await self._failure
        finally:
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._masks.close()

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
        entries, self._open = self._open, {}
        for request_id, entry in entries.items():
            self._scheduler_of(entry.home).cancel(request_id)
            sink, entry.state.sink = entry.state.sink, None
            if sink is not None:
                sink.on_end(0, RequestFault("UNAVAILABLE", message, retryable=True))
        self._note_idle()

    # ---- groups join, drain and leave ----

    async def add_group(self, address: WorkerAddress, timeout_s: float) -> WorkerGroup:
        """Take another worker into service. Raises `GroupError` if it does not fit or is not there in time."""
        if self._failure is None:
            raise GroupError("this control plane is not running yet")
        if any(group.address.target == address.target for group in self._groups):
            raise GroupError(f"{address.target} is the worker of a group already")
        group = self._new_group(address)
        self._groups.append(group)
        self._start(group)
        joined = False
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await group.settled.wait()
            joined = group.is_connected
        finally:
            if not joined:
                await self._discard(group)
        if not joined:
            raise GroupError(group.trouble or f"no answer from {address.target} within {timeout_s:g} s")
        return group

    async def drain_group(self, number: int, timeout_s: float) -> bool:
        """Give the group nothing new, and what waits there to others; False if it still runs requests after
        `timeout_s`. Raises `GroupError`."""
        group = self._group(number)
        self._check_others_remain(group)
        group.is_put_aside = True
        self._move_waiting(group)
        deadline = time.monotonic() + timeout_s
        while group.num_requests and group.is_put_aside and time.monotonic() < deadline:
            await asyncio.sleep(_DRAIN_POLL_S)
        return not group.num_requests

    def resume_group(self, number: int) -> None:
        """A drained group takes requests again. Raises `GroupError`."""
        group = self._group(number)
        group.is_put_aside = False
        self._share_waiting()

    async def remove_group(self, number: int, timeout_s: float) -> None:
        """Drain the group, move what still runs there after `timeout_s`, and forget it. Raises `GroupError`."""
        await self.drain_group(number, timeout_s)
        group = self._group(number)
        self._check_others_remain(group)
        group.leave()
        self._move_waiting(group)
        await self._discard(group)

    def _new_group(self, address: WorkerAddress) -> WorkerGroup:
        number = next(self._group_numbers)
        metrics = self._metrics.of_group(number)
        return WorkerGroup(number, address, self._config, self, metrics, self._masks, self.steps)

    def _start(self, group: WorkerGroup) -> None:
        task = asyncio.create_task(group.run())
        self._tasks[group] = task

        def ended(task: asyncio.Task[None]) -> None:
            error = None if task.cancelled() else task.exception()
            if error is not None and self._failure is not None and not self._failure.done():
                self._failure.set_exception(error)

        task.add_done_callback(ended)

    async def _discard(self, group: WorkerGroup) -> None:
        if group.is_connected:
            group.leave()
            self._move_waiting(group)
        self._groups.remove(group)
        self._metrics.forget_group(group.number)
        self._note_connections()
        task = self._tasks.pop(group)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    def _group(self, number: int) -> WorkerGroup:
        for group in self._groups:
            if group.number == number:
                return group
        raise GroupError(f"there is no group {number}; there are {', '.join(str(g.number) for g in self._groups)}")

    def _check_others_remain(self, group: WorkerGroup) -> None:
        if not any(other.takes_requests for other in self._groups if other is not group):
            raise GroupError(
                f"no other group takes requests: group {group.number} stays; add one first, or drain the server"
            )

    # ---- who runs what ----

    def _admit(self, request: CoreRequest) -> list[WorkerGroup]:
        """The groups that could take the request. Raises `AdmissionError`."""
        groups = [group for group in self._groups if group.takes_requests]
        if not groups:
            # Nothing is lost while the workers are away: what they served before they will serve again.
            groups = [group for group in self._groups if group.limits is not None and not group.is_put_aside]
        if not groups:
            raise _no_worker()
        fitting = [group for group in groups if group.limits is not None and _fits(request, group)]
        if not fitting:
            roomiest = max(groups, key=lambda group: group.limits.num_usable_blocks if group.limits else 0)
            assert roomiest.limits is not None
            check_fits(request, roomiest.limits)
        assert fitting[0].limits is not None
        check_queue(request, fitting[0].limits, self._queue_load())
        return fitting

    def _queue_load(self) -> QueueLoad:
        schedulers = [group.scheduler for group in self._groups if group.scheduler is not None]
        return QueueLoad(
            sum(scheduler.num_waiting_requests for scheduler in schedulers),
            sum(scheduler.num_waiting_tokens for scheduler in schedulers),
            self._metrics.prompt_tokens_per_s(),
        )

    def _prompt_hashes(self, request: CoreRequest, groups: Sequence[WorkerGroup]) -> list[BlockHash]:
        """Names of the prompt's full blocks; none where there is nothing to choose."""
        hashes: list[BlockHash] = []
        if len(groups) > 1 and self._config.enable_prefix_caching:
            root = root_hash(request.tenant, request.cache_salt)
            block_size = self._scheduler_of(groups[0]).config.block_size
            extend_chain(hashes, root, array("I", request.prompt_ids.tobytes()), block_size)
        return hashes

    def _choose(self, needs: RequestNeeds, hashes: list[BlockHash], groups: Sequence[WorkerGroup]) -> WorkerGroup:
        if len(groups) == 1:
            return groups[0]
        return groups[choose_group(needs, [_load(self._scheduler_of(group), needs, hashes) for group in groups])]

    def _move_waiting(self, home: WorkerGroup) -> None:
        """Give what waits at a group to the groups that take requests; it stays where there is none."""
        if home.scheduler is None or not any(group.takes_requests for group in self._groups if group is not home):
            return
        for state in home.scheduler.take_waiting():
            self._rehome(state, home)

    def _share_waiting(self) -> None:
        """There is a group more: choose anew for everything that waits."""
        waiting: list[tuple[RequestState, WorkerGroup]] = []
        for group in self._groups:
            if group.scheduler is not None and group.scheduler.num_waiting:
                waiting += [(state, group) for state in group.scheduler.take_waiting()]
        for state, home in sorted(waiting, key=lambda entry: entry[0].arrival):
            self._rehome(state, home)

    def _rehome(self, state: RequestState, home: WorkerGroup) -> None:
        groups = [group for group in self._groups if group.takes_requests and _fits(state.request, group)]
        sequences = [sequence for sequence in state.sequences if not sequence.finished]
        if groups:
            needs = RequestNeeds(
                sum(sequence.num_known for sequence in sequences),
                len(sequences),
                is_suspect=any(sequence.is_suspect for sequence in sequences),
            )
            home = self._choose(needs, sequences[0].block_hashes, groups)
        self._scheduler_of(home).adopt(state)
        entry = self._open.get(state.request.request_id)
        if entry is not None:
            entry.home = home
        home.schedule_pump()

    @staticmethod
    def _scheduler_of(group: WorkerGroup) -> Scheduler:
        if group.scheduler is None:
            raise RuntimeError(f"group {group.number} has never had a worker")
        return group.scheduler

    # ---- what groups report (GroupHost) ----

    def adopt(self, group: WorkerGroup, worker: worker_pb2.DescribeResponse) -> None:
        others = [other for other in self._groups if other is not group and other.is_connected]
        if any(other.worker is not None and other.worker.instance_id == worker.instance_id for other in others):
            raise WorkerRefused(f"the worker at {group.address.target} is another group's already")
        check_may_serve(
            worker, self._config, self._facts, [other.worker for other in others if other.worker is not None]
        )
        config = scheduler_config(worker, self._config)
        if group.scheduler is not None and group.scheduler.num_requests:
            was = group.scheduler.config
            smaller = config.num_blocks - config.first_block_id < was.num_blocks - was.first_block_id
            if smaller or config.block_size != was.block_size:
                raise WorkerUnavailable("the worker came back smaller while requests are waiting for it")
        if self._facts is None:
            self._facts = model_facts(worker, self._config)
        group.limits = admission_limits(worker, self._facts, self._config)
        if group.scheduler is None:
            group.scheduler = Scheduler(config, self._arrivals)
        else:
            group.scheduler.reset(config)

    def on_connected(self, group: WorkerGroup) -> None:
        self._note_connections()
        self._share_waiting()

    def on_leaving(self, group: WorkerGroup) -> None:
        self._move_waiting(group)

    def on_gone(self, group: WorkerGroup, events: StepEvents) -> None:
        self._note_connections()
        self._move_waiting(group)
        self.publish(events)

    def on_masks(self, filled: FilledMasks) -> None:
        for sequence in filled.over:
            entry = self._open.get(sequence.request.request.request_id)
            if entry is not None:
                self.publish(self._scheduler_of(entry.home).finish_matched(sequence))
        for sequence, reason in filled.failed:
            request_id = sequence.request.request.request_id
            fault = RequestFault("INVALID_ARGUMENT", f"the structured output cannot go on: {reason}", retryable=False)
            entry = self._open.get(request_id)
            if entry is not None:
                self.publish(self._scheduler_of(entry.home).fail_sequence(sequence, fault))

    def publish(self, events: StepEvents) -> None:
        for state, output in events.outputs:
            if state.sink is not None:
                try:
                    state.sink.on_output(output)
                except Exception:
                    self._give_up(state)
        for sequence, token_id in zip(events.sequences, events.token_ids, strict=True):
            sink = sequence.request.sink
            if sink is not None:
                try:
                    sink.on_token(sequence.index, token_id)
                except Exception:
                    self._give_up(sequence.request)
        for state, fault in events.ended:
            sink, state.sink = state.sink, None
            if sink is not None:
                del self._open[state.request.request_id]
                sink.on_end(state.num_cached_tokens, fault)
        if events.ended:
            self._note_idle()

    def _give_up(self, state: RequestState) -> None:
        """One request's output went wrong: that ends this request and no other."""
        request_id, sink = state.request.request_id, state.sink
        log.exception("an output could not be delivered", request_id=request_id)
        self.cancel(request_id)
        if sink is not None:
            sink.on_end(0, RequestFault("INTERNAL", "the output could not be delivered", retryable=False))

    def _note_connections(self) -> None:
        if any(group.is_connected for group in self._groups):
            self._lost.clear()
            self._connected.set()
        else:
            self._connected.clear()
            self._lost.set()

    def _note_idle(self) -> None:
        if not self._open:
            self._idle.set()


def _no_worker() -> AdmissionError:
    return AdmissionError("no_worker", "no worker is ready yet", code="UNAVAILABLE", retry_after_s=2.0)


def _fits(request: CoreRequest, group: WorkerGroup) -> bool:
    if group.limits is None:
        return False
    try:
        check_fits(request, group.limits)
    except AdmissionError:
        return False
    return True


def _load(scheduler: Scheduler, needs: RequestNeeds, hashes: list[BlockHash]) -> GroupLoad:
    return GroupLoad(
        # One token at least is run, whatever is cached.
        num_cached_tokens=min(scheduler.num_cached_tokens(hashes), needs.num_tokens - 1),
        num_queued_tokens=scheduler.num_waiting_tokens + scheduler.num_prefill_tokens,
        num_sequences=scheduler.num_running + scheduler.num_waiting,
        max_num_seqs=scheduler.config.max_num_seqs,
        num_free_blocks=scheduler.num_usable_blocks - scheduler.num_blocks_held,
        num_blank_blocks=scheduler.num_blank_blocks,
        block_size=scheduler.config.block_size,
        num_suspects=scheduler.num_suspects,
    )
