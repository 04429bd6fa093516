"""A process that is kept running: started, started again when it dies, ended when its starter says so."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

log = structlog.get_logger("stepwire")

T = TypeVar("T")

# Pauses before a process that died is started again: at once, then longer while it keeps dying.
_RESTART_PAUSES_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0)
# A process that has run this long starts its count of deaths anew.
_STABLE_S = 60.0


class ChildFailed(Exception):
    """A process ended before it was ever ready; one line."""


@dataclass(slots=True)
class ChildProcess:
    """One of the processes, over all its lives."""

    name: str
    module: str
    arguments: list[str]
    environment: dict[str, str]
    stop_timeout_s: float
    process: asyncio.subprocess.Process | None = None
    was_ready: bool = False
    # Told the pid of each life that is over.
    on_death: Callable[[int], None] | None = None

    async def keep_running(self) -> None:
        """Start the process, and again whenever it dies. Raises `ChildFailed` if it dies before it was ever ready."""
        num_deaths = 0
        while True:
            started_s = time.monotonic()
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                self.module,
                *self.arguments,
                env=self.environment,
                stdin=asyncio.subprocess.DEVNULL,
                # Ctrl-C in the terminal reaches the starter alone: it decides who ends when.
                start_new_session=True,
            )
            code = await self.process.wait()
            if self.on_death is not None:
                self.on_death(self.process.pid)
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            if not self.was_ready:
                raise ChildFailed(f"{self.name} ended before it was ready ({how}): its own message above says why")
            num_deaths = 1 if time.monotonic() - started_s > _STABLE_S else num_deaths + 1
            pause_s = _RESTART_PAUSES_S[min(num_deaths, len(_RESTART_PAUSES_S)) - 1]
            if code == 0:
                log.info("a process has ended as somebody told it to, starting it again", process=self.name)
            else:
                log.error("a process died, starting it again", process=self.name, how=how, pause_s=pause_s)
            await asyncio.sleep(pause_s)

    async def stop(self, hurry: asyncio.Event) -> None:
        """Let the process finish what it is doing; no longer than its limit, or than `hurry` allows."""
        if self.process is None or self.process.returncode is not None:
            return
        self.process.terminate()
        ended = asyncio.create_task(self.process.wait())
        hurried = asyncio.create_task(hurry.wait())
        await asyncio.wait([ended, hurried], timeout=self.stop_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        if not ended.done():
            log.warning("still running, killing it", process=self.name)
            self.process.kill()
        await ended


async def unless(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None if `stop` came first."""
    task = asyncio.create_task(work)
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([task, stopping], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if task.done():
        return task.result()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return None


async def first_failure(keepers: Sequence[asyncio.Task[None]]) -> None:
    """Raise what the first of the processes' keepers raises."""
    await asyncio.wait(keepers, return_when=asyncio.FIRST_COMPLETED)
    raise_failure(keepers)


def raise_failure(keepers: Sequence[asyncio.Task[None]]) -> None:
    for keeper in keepers:
        if keeper.done():
            keeper.result()
