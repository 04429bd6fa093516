"""AdminService: draining, a live view of the steps, and worker groups that come and go."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import grpc
import grpc.aio
import structlog
from google.protobuf.duration_pb2 import Duration
from stepwire.v1 import admin_pb2 as pb
from stepwire.v1 import admin_pb2_grpc as pb_grpc

from control_plane.config import check_worker_address
from control_plane.core.engine import Engine, GroupError
from control_plane.core.step_feed import StepWatcher
from control_plane.core.worker_group import WorkerGroup
from control_plane.core.worker_link import WorkerAddress
from control_plane.frontend.errors import RequestRefused, Violation
from control_plane.frontend.metrics import FrontendMetrics
from control_plane.frontend.servicer import client_may_leave, refuse

log = structlog.get_logger(__name__)

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

DEFAULT_INTERVAL_S = 0.2
MIN_INTERVAL_S, MAX_INTERVAL_S = 0.01, 10.0
DEFAULT_MAX_STEPS, MAX_MAX_STEPS = 512, 4096
# Each watcher costs a little on every step.
MAX_WATCHERS = 32
DEFAULT_JOIN_TIMEOUT_S = 30.0


class Histogram(Protocol):
    """Of FrontendMetrics: counts that only grow."""

    @property
    def bounds(self) -> tuple[float, ...]: ...

    def counts(self) -> list[int]: ...


class _WithTimeout(Protocol):
    """Requests that say how long they are willing to wait."""

    @property
    def timeout(self) -> Duration: ...

    def HasField(self, name: Any, /) -> bool: ...


class _NewCounts:
    """What a histogram has counted since it was asked last."""

    def __init__(self, histogram: Histogram) -> None:
        self._histogram = histogram
        self._seen = histogram.counts()

    def take(self) -> pb.LatencyCounts:
        counts = self._histogram.counts()
        new = [count - before for count, before in zip(counts, self._seen, strict=True)]
        self._seen = counts
        return pb.LatencyCounts(bounds_s=self._histogram.bounds, counts=new)


class AdminServicer(pb_grpc.AdminServiceServicer):
    """`begin_drain` tells health; `exit_process` ends the process as SIGTERM does, once; `address_of` adds to where a
    worker listens how it is spoken to."""

    def __init__(
        self,
        engine: Engine,
        metrics: FrontendMetrics,
        *,
        drain_timeout_s: float,
        begin_drain: Callable[[], Awaitable[None]],
        exit_process: Callable[[], None],
        address_of: Callable[[str], WorkerAddress],
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._drain_timeout_s = drain_timeout_s
        self._begin_drain = begin_drain
        self._exit_process = exit_process
        self._address_of = address_of

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        timeout_s = await self._timeout_s(request, context, self._drain_timeout_s)
        log.info("drain asked for", limit_s=timeout_s, exit=request.exit)
        await self._begin_drain()
        is_drained = await self._engine.drain(timeout_s)
        response = pb.DrainResponse(is_drained=is_drained, num_open_requests=self._engine.num_open_requests)
        if request.exit:
            if not is_drained:
                self._engine.abort_all("the server is shutting down")
            # The answer goes out first.
            asyncio.get_running_loop().call_later(0.1, self._exit_process)
        return response

    async def WatchSteps(self, request: pb.WatchStepsRequest, context: Context) -> None:
        interval_s = _seconds(request.interval) if request.HasField("interval") else DEFAULT_INTERVAL_S
        max_steps = request.max_steps or DEFAULT_MAX_STEPS
        violations = []
        if not MIN_INTERVAL_S <= interval_s <= MAX_INTERVAL_S:
            violations.append(Violation("interval", f"must be from {MIN_INTERVAL_S:g} to {MAX_INTERVAL_S:g} s"))
        if max_steps > MAX_MAX_STEPS:
            violations.append(Violation("max_steps", f"must be from 1 to {MAX_MAX_STEPS}, not {max_steps}"))
        if violations:
            await refuse(context, RequestRefused.invalid(*violations))
        if self._engine.steps.num_watchers >= MAX_WATCHERS:
            message = f"{MAX_WATCHERS} watchers are there already; try again when one has gone"
            await refuse(
                context,
                RequestRefused("RESOURCE_EXHAUSTED", "too_many_watchers", message, retry_after_s=5.0, retryable=True),
            )
        with client_may_leave(), self._engine.steps.watch(max_steps) as watcher:
            first_token, inter_token = (
                _NewCounts(self._metrics.time_to_first_token),
                _NewCounts(self._metrics.inter_token_latency),
            )
            while True:
                # A write waits for a slow reader; the watcher forgets meanwhile what it cannot hold.
                await context.write(self._response(watcher, first_token, inter_token))
                await asyncio.sleep(interval_s)

    def _response(
        self, watcher: StepWatcher, first_token: _NewCounts, inter_token: _NewCounts
    ) -> pb.WatchStepsResponse:
        records, num_lost = watcher.take()
        return pb.WatchStepsResponse(
            steps=[pb.StepSample(**asdict(record)) for record in records],
            num_lost_steps=num_lost,
            state=self._state(),
            time_to_first_token=first_token.take(),
            inter_token_latency=inter_token.take(),
        )

    def _state(self) -> pb.ServerState:
        engine = self._engine
        state = pb.ServerState(is_worker_connected=engine.is_connected, is_draining=engine.is_draining)
        for group in engine.groups:
            entry = group_state(group)
            state.groups.append(entry)
            for name in _SUMMED:
                setattr(state, name, getattr(state, name) + getattr(entry, name))
        return state

    # ---- groups ----

    async def ListGroups(self, request: pb.ListGroupsRequest, context: Context) -> pb.ListGroupsResponse:
        return pb.ListGroupsResponse(groups=[_describe(group) for group in self._engine.groups])

    async def AddGroup(self, request: pb.AddGroupRequest, context: Context) -> pb.AddGroupResponse:
        try:
            check_worker_address(request.worker)
        except ValueError as error:
            await refuse(context, RequestRefused.invalid(Violation("worker", str(error))))
        timeout_s = await self._timeout_s(request, context, DEFAULT_JOIN_TIMEOUT_S)
        log.info("group asked for", worker=request.worker)
        try:
            group = await self._engine.add_group(self._address_of(request.worker), timeout_s)
        except GroupError as error:
            await _refuse_group(context, error)
        return pb.AddGroupResponse(group=group.number)

    async def DrainGroup(self, request: pb.DrainGroupRequest, context: Context) -> pb.DrainGroupResponse:
        timeout_s = await self._timeout_s(request, context, self._drain_timeout_s)
        log.info("drain of a group asked for", group=request.group, limit_s=timeout_s)
        try:
            return pb.DrainGroupResponse(is_drained=await self._engine.drain_group(request.group, timeout_s))
        except GroupError as error:
            await _refuse_group(context, error)

    async def ResumeGroup(self, request: pb.ResumeGroupRequest, context: Context) -> pb.ResumeGroupResponse:
        try:
            self._engine.resume_group(request.group)
        except GroupError as error:
            await _refuse_group(context, error)
        return pb.ResumeGroupResponse()

    async def RemoveGroup(self, request: pb.RemoveGroupRequest, context: Context) -> pb.RemoveGroupResponse:
        timeout_s = await self._timeout_s(request, context, self._drain_timeout_s)
        log.info("removal of a group asked for", group=request.group, limit_s=timeout_s)
        try:
            await self._engine.remove_group(request.group, timeout_s)
        except GroupError as error:
            await _refuse_group(context, error)
        return pb.RemoveGroupResponse()

    @staticmethod
    async def _timeout_s(request: _WithTimeout, context: Context, default_s: float) -> float:
        timeout_s = _seconds(request.timeout) if request.HasField("timeout") else default_s
        if timeout_s < 0:
            await refuse(context, RequestRefused.invalid(Violation("timeout", "must not be negative")))
        return timeout_s


# What a ServerState has in common with its groups' states.
_SUMMED = tuple(
    field.name
    for field in pb.GroupState.DESCRIPTOR.fields
    if field.name.startswith(("num_", "max_num_")) and field.name in pb.ServerState.DESCRIPTOR.fields_by_name
)


def group_state(group: WorkerGroup) -> pb.GroupState:
    scheduler = group.scheduler
    state = pb.GroupState(group=group.number, is_worker_connected=group.is_connected, is_draining=group.is_draining)
    if scheduler is None:
        return state
    counters = scheduler.counters
    state.num_running_sequences = scheduler.num_running
    state.num_waiting_requests = scheduler.num_waiting_requests
    state.num_waiting_tokens = scheduler.num_waiting_tokens
    state.num_kv_blocks = scheduler.num_usable_blocks
    state.num_kv_blocks_in_use = scheduler.num_blocks_held
    state.num_kv_blocks_cached = scheduler.num_cached_blocks
    state.num_prompt_tokens = counters.num_prompt_tokens
    state.num_generated_tokens = counters.num_generated_tokens
    state.num_preemptions = counters.num_preemptions
    state.num_prefix_cache_queries = counters.num_prefix_queries
    state.num_prefix_cache_hits = counters.num_prefix_hits
    state.max_num_sequences = scheduler.config.max_num_seqs
    return state


def _describe(group: WorkerGroup) -> pb.Group:
    described = pb.Group(state=group_state(group), worker=group.address.target, trouble=group.trouble)
    if group.worker is not None:
        described.model, described.version = group.worker.model, group.worker.version
        described.devices.extend(group.worker.devices)
    return described


async def _refuse_group(context: Context, error: GroupError) -> NoReturn:
    await refuse(context, RequestRefused("FAILED_PRECONDITION", "group", str(error)))


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9
