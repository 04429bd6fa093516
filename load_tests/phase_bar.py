"""What a terminal shows while a phase runs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from load_tests.driver import Driver
from load_tests.workload import Phase


@contextlib.asynccontextmanager
async def phase_bar(phase: Phase, driver: Driver, console: Console, *, interval_s: float = 1.0) -> AsyncIterator[None]:
    """How many of the phase's requests have ended, where `console` is a terminal.

    It is drawn on the driver's own loop, once in `interval_s`: a thread would take more from what is measured.
    """
    if not console.is_terminal:
        yield
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
        bar = progress.add_task(phase.name, total=len(phase.requests))

        async def follow() -> None:
            while True:
                progress.update(bar, completed=driver.num_ended, refresh=True)
                await asyncio.sleep(interval_s)

        follower = asyncio.create_task(follow())
        try:
            yield
        finally:
            follower.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await follower
