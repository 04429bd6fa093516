"""Sends a phase's requests at their times and waits for their ends: in this process, or spread over several.

The driver says what it cost: its CPU time is measured over every phase, so that a slow client is not taken for a slow
server.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import orjson

from load_tests.records import RequestRecord
from load_tests.target import ServedModelFacts, Target, TargetError, TargetSpec, open_target
from load_tests.workload import Phase, RequestSpec, split

_REPOSITORY_ROOT = Path(__file__).resolve().parents[1]
# A pipe's line may hold the prompts of a whole phase.
_MAX_LINE_BYTES = 1 << 30
# Children that were told when to start need a moment to be there.
_START_PAUSE_S = 0.05


@dataclass(slots=True)
class PhaseResult:
    """Records in the order of the phase's requests, and what the driver used of the machine meanwhile."""

    records: list[RequestRecord]
    wall_s: float
    driver_cpu_s: float
    num_processes: int = 1
    # CPU seconds of the server's processes, by name, where the driver started them.
    server_cpu_s: dict[str, float] = field(default_factory=dict)


class Driver(Protocol):
    @property
    def num_ended(self) -> int | None:
        """Requests of the running phase that have ended; None where only the end tells."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc_info: object) -> None: ...

    async def facts(self) -> ServedModelFacts: ...

    async def run(self, phase: Phase, timeout_s: float) -> PhaseResult:
        """Send everything, wait until it has ended; what has not after `timeout_s` is given up and counts as failed."""
        ...


class InProcessDriver:
    def __init__(self, spec: TargetSpec) -> None:
        self._target: Target = open_target(spec)
        self._records: Sequence[RequestRecord] = ()

    @property
    def num_ended(self) -> int:
        return sum(1 for record in self._records if record.ended_s or record.error is not None)

    async def __aenter__(self) -> Self:
        await self._target.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._target.__aexit__()

    async def facts(self) -> ServedModelFacts:
        return await self._target.facts()

    async def run(self, phase: Phase, timeout_s: float) -> PhaseResult:
        return await self.run_encoded(phase, self.encode(phase), time.monotonic(), timeout_s)

    def encode(self, phase: Phase) -> list[Any]:
        return [self._target.encode(request) for request in phase.requests]

    async def run_encoded(self, phase: Phase, encoded: Sequence[Any], start_s: float, timeout_s: float) -> PhaseResult:
        """`start_s` is of the monotonic clock: request times count from it."""
        records = [RequestRecord(num_prompt_tokens=len(request.prompt_ids)) for request in phase.requests]
        self._records = records
        slots = None if phase.max_concurrency is None else asyncio.Semaphore(phase.max_concurrency)
        was_frozen = gc.get_freeze_count() > 0
        gc.collect()
        gc.freeze()
        # A collection in the middle would walk every record and show up as a pause of the server.
        gc.disable()
        started_s, cpu_started_s = time.monotonic(), time.process_time()
        sender = asyncio.create_task(self._send_all(phase.requests, encoded, records, slots, start_s))
        try:
            await asyncio.wait([sender], timeout=start_s + timeout_s - time.monotonic())
            if not sender.done():
                sender.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await sender
                _give_up(records, timeout_s)
            else:
                sender.result()
            wall_s, cpu_s = time.monotonic() - started_s, time.process_time() - cpu_started_s
        finally:
            gc.enable()
            # What others have frozen stays so.
            if not was_frozen:
                gc.unfreeze()
        return PhaseResult(records, wall_s, cpu_s)

    async def _send_all(
        self,
        requests: Sequence[RequestSpec],
        encoded: Sequence[Any],
        records: Sequence[RequestRecord],
        slots: asyncio.Semaphore | None,
        start_s: float,
    ) -> None:
        async with asyncio.TaskGroup() as group:
            for request, message, record in zip(requests, encoded, records, strict=True):
                due_s = start_s + request.send_at_s
                pause_s = due_s - time.monotonic()
                if pause_s > 0:
                    await asyncio.sleep(pause_s)
                if slots is None:
                    record.late_s = max(0.0, time.monotonic() - due_s)
                    group.create_task(self._target.send(message, record))
                else:
                    await slots.acquire()
                    task = group.create_task(self._target.send(message, record))
                    task.add_done_callback(lambda _: slots.release())


def _give_up(records: Sequence[RequestRecord], timeout_s: float) -> None:
    for record in records:
        if not record.ended_s and record.error is None:
            record.error = f"not finished within --timeout-s {timeout_s:g}"


class DriverProcesses:
    """`num_processes` children, each with connections of its own and its share of the requests."""

    def __init__(self, spec: TargetSpec, num_processes: int) -> None:
        self._spec = spec
        self._num_processes = num_processes
        self._children: list[asyncio.subprocess.Process] = []

    @property
    def num_ended(self) -> None:
        return None

    async def __aenter__(self) -> Self:
        environment = dict(os.environ)
        sources = [str(_REPOSITORY_ROOT), str(_REPOSITORY_ROOT / "proto"), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sources))
        for _ in range(self._num_processes):
            child = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "load_tests.driver_process",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=environment,
                limit=_MAX_LINE_BYTES,
            )
            self._children.append(child)
        try:
            await self._ask_all([{"target": self._spec.to_json()}] * self._num_processes)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for child in self._children:
            if child.stdin is not None:
                child.stdin.close()  # the end of its input ends a child
        for child in self._children:
            try:
                async with asyncio.timeout(5):
                    await child.wait()
            except TimeoutError:
                child.kill()
                await child.wait()

    async def facts(self) -> ServedModelFacts:
        answer = (await self._ask_all([{"facts": True}]))[0]
        return ServedModelFacts(**answer["facts"])

    async def run(self, phase: Phase, timeout_s: float) -> PhaseResult:
        parts = split(phase, self._num_processes)
        await self._ask_all([{"phase": asdict(part)} for part in parts])
        start = {"start_s": time.monotonic() + _START_PAUSE_S, "timeout_s": timeout_s}
        answers = await self._ask_all([start] * self._num_processes)
        records: list[RequestRecord] = [RequestRecord()] * len(phase.requests)
        for part, answer in enumerate(answers):
            records[part :: self._num_processes] = [RequestRecord(**record) for record in answer["records"]]
        return PhaseResult(
            records,
            wall_s=max(answer["wall_s"] for answer in answers),
            driver_cpu_s=sum(answer["cpu_s"] for answer in answers),
            num_processes=self._num_processes,
        )

    async def _ask_all(self, questions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        for child, question in zip(self._children, questions, strict=False):
            if child.stdin is None:
                raise RuntimeError("a driver process was started without a pipe")
            child.stdin.write(orjson.dumps(question) + b"\n")
            await child.stdin.drain()
        answers = []
        for child in self._children[: len(questions)]:
            line = await child.stdout.readline() if child.stdout is not None else b""
            if not line:
                raise TargetError("a driver process ended early: its own message above says why")
            answer = orjson.loads(line)
            if "failed" in answer:
                raise TargetError(answer["failed"])
            answers.append(answer)
        return answers


def open_driver(spec: TargetSpec, num_processes: int) -> Driver:
    return InProcessDriver(spec) if num_processes == 1 else DriverProcesses(spec, num_processes)
