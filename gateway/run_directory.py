"""What the processes of one gateway share while they live: who they are, and the files of their metrics."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

# prometheus_client reads it when it is imported.
METRICS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


class RunDirectory:
    """Made by the process that starts the others, and gone with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics"

    def create(self) -> None:
        self.metrics.mkdir()

    def enter(self, number: int) -> None:
        """This process takes requests from now on."""
        half = self.path / f"{number}.new"
        half.write_text(str(os.getpid()))
        half.replace(self._file(number))

    def processes(self) -> dict[int, int]:
        """Number -> pid of those that live."""
        found: dict[int, int] = {}
        for path in sorted(self.path.glob("*.pid")):
            with contextlib.suppress(OSError, ValueError):
                pid = int(path.read_text())
                os.kill(pid, 0)
                found[int(path.stem)] = pid
        return found

    def _file(self, number: int) -> Path:
        return self.path / f"{number}.pid"
