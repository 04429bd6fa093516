"""Tells a person how far a preparation is: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TextIO

from gpu_worker.prepare.errors import format_size

PLAIN_LINE_EVERY = 0.25  # of the whole

Advance = Callable[[int], None]
"""Called with the number of bytes done since the last call."""


class Progress(Protocol):
    """Where a preparation reports to."""

    def note(self, line: str) -> None:
        """Says something worth knowing, once."""

    def task(self, title: str, num_bytes: int) -> AbstractContextManager[Advance]:
        """A piece of work of `num_bytes`."""


class PlainProgress:
    """Whole lines, a few per task, for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def note(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    @contextmanager
    def task(self, title: str, num_bytes: int) -> Iterator[Advance]:
        self.note(f"{title} ({format_size(num_bytes)})")
        done, next_line = 0, PLAIN_LINE_EVERY

        def advance(count: int) -> None:
            nonlocal done, next_line
            done += count
            share = done / max(num_bytes, 1)
            if share >= next_line:
                self.note(f"{title}: {share:.0%} of {format_size(num_bytes)}")
                next_line = (share // PLAIN_LINE_EVERY + 1) * PLAIN_LINE_EVERY

        yield advance


class TerminalProgress:
    """A bar with speed and remaining time."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console

        self._console = Console(file=stream)

    def note(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False)

    @contextmanager
    def task(self, title: str, num_bytes: int) -> Iterator[Advance]:
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as RichProgress

        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
        with RichProgress(*columns, TimeRemainingColumn(), console=self._console) as bar:
            task = bar.add_task(title, total=num_bytes)
            yield lambda count: bar.advance(task, count)


class SilentProgress:
    """For callers who report by themselves."""

    def note(self, line: str) -> None:
        pass

    @contextmanager
    def task(self, title: str, num_bytes: int) -> Iterator[Advance]:
        yield lambda count: None


def default_progress(stream: TextIO | None = None) -> Progress:
    """A bar if `stream` (standard error by default) is a terminal, lines otherwise."""
    stream = sys.stderr if stream is None else stream
    return TerminalProgress(stream) if stream.isatty() else PlainProgress(stream)
