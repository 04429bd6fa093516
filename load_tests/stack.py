"""Servers started for a measurement, as real processes, and stopped after it.

`ServedStack` is what a person starts: `stepwire serve` with all three services. `ControlPlaneStack` is a simulated
worker and a control plane alone, for numbers that must not have a gateway in them.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from load_tests.process_cpu import read_cpu

REPOSITORY_ROOT = Path(__file__).resolve().parents[1]
SHAPES_DIRECTORY = Path(__file__).resolve().parent / "shapes"
_POLL_S = 0.02
_STOP_LIMIT_S = 40.0
_LOG_TAIL_CHARS = 4000
_SERVICES = ("gateway", "control_plane", "gpu_worker")


class StackError(Exception):
    """The servers did not come up; the message holds the end of their log."""


class _Processes:
    """Started together in a directory of their own, stopped together."""

    def __init__(self) -> None:
        # Not below the working directory: a unix socket's path has 107 characters at most.
        self.directory = Path(tempfile.mkdtemp(prefix="stepwire-load-"))
        self._log = self.directory / "log"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def _start(
        self, name: str, arguments: Sequence[str], variables: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        environment = {**os.environ, **(variables or {})}
        sources = [str(REPOSITORY_ROOT / source) for source in ("", "proto", "kernels")]
        environment["PYTHONPATH"] = os.pathsep.join([*sources, environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C reaches the driver alone: it stops the stack when it has stopped measuring.
                start_new_session=True,
            )
        self._processes[name] = process
        return process

    def _wait_until(self, is_ready: Callable[[], bool], limit_s: float) -> None:
        deadline_s = time.monotonic() + limit_s
        while not is_ready():
            for name, process in self._processes.items():
                if process.poll() is not None:
                    raise StackError(f"{name} ended with code {process.returncode} before it was ready:\n{self.log()}")
            if time.monotonic() > deadline_s:
                raise StackError(f"not ready within {limit_s:g} s (--ready-timeout-s):\n{self.log()}")
            time.sleep(_POLL_S)

    def log(self) -> str:
        """The end of what the processes have said."""
        return self._log.read_text(errors="replace")[-_LOG_TAIL_CHARS:] if self._log.exists() else ""

    def pids(self) -> dict[str, int]:
        return {name: process.pid for name, process in self._processes.items()}

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds so far of each service that is alive."""
        return {name: read_cpu(pid).total_s for name, pid in self.pids().items()}

    def stop(self) -> None:
        for process in self._processes.values():
            process.send_signal(signal.SIGTERM)
        for process in self._processes.values():
            try:
                process.wait(_STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


class ServedStack(_Processes):
    """`stepwire serve FLAGS`; ports that the flags do not name are free ones. Ready when entered."""

    def __init__(self, flags: Sequence[str], ready_timeout_s: float = 600.0) -> None:
        super().__init__()
        self.flags = list(flags)
        self._ready_timeout_s = ready_timeout_s
        self.port, grpc_port = self._port("--port"), self._port("--grpc-port")
        self._port("--metrics-port")
        self.url = f"http://127.0.0.1:{self.port}"
        self.grpc_address = f"127.0.0.1:{grpc_port}"
        # From the command until /ready.
        self.ready_s = 0.0

    def _port(self, flag: str) -> int:
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument(flag, type=int, dest="port")
        given: int | None = parser.parse_known_args(self.flags)[0].port
        if given is not None:
            return given
        port = free_port()
        self.flags += [flag, str(port)]
        return port

    def __enter__(self) -> Self:
        started_s = time.monotonic()
        try:
            self._start("stepwire serve", ["gateway.cli", "serve", *self.flags])
            self._wait_until(self._is_ready, self._ready_timeout_s)
        except BaseException:
            self.stop()
            raise
        self.ready_s = time.monotonic() - started_s
        return self

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def pids(self) -> dict[str, int]:
        """The services, which the launcher has started; the launcher itself does nothing meanwhile."""
        found = {}
        for launcher in self._processes.values():
            for child in psutil.Process(launcher.pid).children(recursive=True):
                words = child.cmdline()
                module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
                if module in _SERVICES:
                    found[module] = child.pid
        return found


class ControlPlaneStack(_Processes):
    """Simulated workers, one a group, and a control plane that takes and gives token ids."""

    def __init__(
        self, worker_flags: Sequence[str] = (), control_plane_flags: Sequence[str] = (), num_groups: int = 1
    ) -> None:
        super().__init__()
        self._num_groups = num_groups
        self._worker_flags, self._control_plane_flags = worker_flags, control_plane_flags
        self.grpc_address = f"unix:{self.directory}/public.sock"
        self.metrics_port = free_port()

    def __enter__(self) -> Self:
        workers = [f"unix:{self.directory}/worker-{number}.sock" for number in range(self._num_groups)]
        command = ["gpu_worker", "--runner", "simulated", *self._worker_flags]
        try:
            for number, worker in enumerate(workers):
                self._start(f"gpu_worker {number}" if number else "gpu_worker", [*command, "--listen", worker])
            self._start(
                "control_plane",
                [
                    "control_plane",
                    *("--workers", ",".join(workers), "--listen", self.grpc_address),
                    *("--grpc-port", "0", "--metrics-port", str(self.metrics_port)),
                    *self._control_plane_flags,
                ],
            )
            self._wait_until(self._is_serving, 60.0)
            self._wait_until(lambda: self.metric("stepwire_worker_connected") == [self._num_groups], 60.0)
        except BaseException:
            self.stop()
            raise
        return self

    def _is_serving(self) -> bool:
        with grpc.insecure_channel(self.grpc_address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            try:
                answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
            except grpc.RpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def metric(self, *samples: str) -> list[float]:
        """Samples of the control plane's metrics page: by name and labels as they stand there, or by name alone for
        the sum over all labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as answer:
            lines = [line for line in answer.read().decode().splitlines() if line[:1] not in "#"]
        values: dict[str, float] = {}
        for line in lines:
            sample, _, value = line.rpartition(" ")
            for name in {sample, sample.partition("{")[0]}:
                values[name] = values.get(name, 0.0) + float(value)
        missing = [sample for sample in samples if sample not in values]
        if missing:
            raise StackError(f"the control plane's metrics have no {', '.join(missing)}")
        return [values[sample] for sample in samples]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(argv: Sequence[str]) -> int:
    """`python -m load_tests.stack SHAPE [serve flags]`: serve a shape with random weights, to point drivers at."""
    shapes = sorted(path.name for path in SHAPES_DIRECTORY.iterdir() if path.is_dir())
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.stack",
        description="Serve one of the shapes below load_tests/shapes with random weights until Ctrl-C. "
        "All other flags are `stepwire serve`'s.",
    )
    parser.add_argument("shape", choices=shapes)
    args, flags = parser.parse_known_args(argv)
    command = ["serve", str(SHAPES_DIRECTORY / args.shape), "--load-format", "dummy", *flags]
    print(f"stepwire {shlex.join(command)}", flush=True)
    os.execv(sys.executable, [sys.executable, "-m", "gateway.cli", *command])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
