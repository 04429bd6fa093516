"""`stepwire serve` as a person runs it, for tests that kill parts of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import psutil

from tests.system.asking import LIMIT_S, ask
from tests.system.ports import free_port

ROOT = Path(__file__).resolve().parents[2]


def wait_until(
    condition: Callable[[], bool], timeout_s: float = LIMIT_S, what: str = "", *, every_s: float = 0.02
) -> None:
    """Poll, less often as time goes by; the limit only ends a test that has failed. `every_s`: how often at first."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what or condition}")
        time.sleep(every_s)
        every_s = max(every_s, min(every_s * 1.1, 0.1))


class Launched:
    """A running `stepwire serve`; leaving the context stops it and checks that nothing is left."""

    def __init__(self, model: str | Path, *flags: str, ready_timeout_s: float = 240.0) -> None:
        self.port, self.grpc_port, self.metrics_port = free_port(), free_port(), free_port()
        self.base_url = f"http://127.0.0.1:{self.port}/v1"
        command = [sys.executable, "-m", "gateway.cli", "serve", str(model), *flags]
        command += [f"--port={self.port}", f"--grpc-port={self.grpc_port}", f"--metrics-port={self.metrics_port}"]
        # A file and not a pipe: nobody has to read it for the processes to go on.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed with the object
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )
        self._ready_timeout_s = ready_timeout_s

    def __enter__(self) -> Launched:
        try:
            wait_until(lambda: "Try:" in self.read() or self.process.poll() is not None, self._ready_timeout_s, "ready")
            assert self.process.poll() is None, self.read()
        except BaseException:
            self.kill_all()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None and kind is None:
            assert self.stop(signal.SIGTERM) == 0, self.read()
        self.kill_all()

    def read(self) -> str:
        """Everything printed so far, logs included."""
        return os.pread(self._log.fileno(), 1 << 24, 0).decode(errors="replace")

    def stop(self, number: signal.Signals, timeout_s: float = LIMIT_S) -> int:
        self.process.send_signal(number)
        wait_until(lambda: self.process.poll() is not None, timeout_s, "the end")
        return self.process.returncode

    def kill_all(self) -> None:
        for process in [*self.children(), self.process]:
            process.kill()
        self.process.wait()

    def children(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def child(self, module: str) -> psutil.Process:
        """The running process of one service."""
        found = self.children_of(module)
        assert len(found) == 1, f"{len(found)} processes of {module}"
        return found[0]

    def children_of(self, module: str) -> list[psutil.Process]:
        return [process for process in self.children() if f"-m {module} " in " ".join(process.cmdline()) + " "]

    def metrics_page(self) -> str:
        """The control plane's."""
        return ask(f"http://127.0.0.1:{self.metrics_port}/metrics").text

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        values = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", self.metrics_page(), re.MULTILINE)
        assert values, f"no metric {name}"
        return sum(float(value) for value in values)

    def metric_of(self, name: str, **labels: str) -> float:
        """The sample with these labels, in their order on the page."""
        written = ",".join(f'{label}="{value}"' for label, value in labels.items())
        [value] = re.findall(rf"^{re.escape(f'{name}{{{written}}}')} (\S+)$", self.metrics_page(), re.MULTILINE)
        return float(value)
