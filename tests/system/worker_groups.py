"""A control plane with several simulated workers, each a process of its own that tests may start and kill."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import grpc
import grpc.aio
import httpx
from stepwire.v1 import admin_pb2_grpc
from stepwire.v1 import inference_pb2 as pb
from stepwire.v1 import inference_pb2_grpc as pb_grpc

from tests.system.conftest import LIMIT_S, ROOT, START_LIMIT_S, STOP_LIMIT_S, read_sample, wait_until
from tests.system.ports import free_port
from tests.system.standing_still import standing_still

VOCAB_SIZE = 1000


class WorkerGroups:
    """Token ids in, token ids out; the workers listen on unix sockets `0`, `1`, ... in a directory of their own."""

    def __init__(self, num_groups: int, *, worker_flags: Sequence[str] = ()) -> None:
        # Not pytest's own directory: a unix socket's path has 107 characters at most.
        self.directory = Path(tempfile.mkdtemp(prefix="stepwire-"))
        self.num_groups = num_groups
        self.worker_flags = worker_flags
        self.grpc_port, self.admin_port, self.metrics_port = free_port(), free_port(), free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def address(self, name: int | str) -> str:
        return f"unix:{self.directory}/{name}.sock"

    def start_worker(self, name: int | str, *flags: str) -> None:
        own = ["--runner=simulated", f"--listen={self.address(name)}", f"--sim-vocab-size={VOCAB_SIZE}"]
        self._start(f"worker {name}", ["gpu_worker", *own, *self.worker_flags, *flags])

    def start_broken_worker(self, name: str, model: Path) -> None:
        """A real one, of a model that it finds out to be none after it has begun to listen."""
        self._start(
            f"worker {name}", ["gpu_worker", f"--listen={self.address(name)}", f"--model={model}", "--device=cpu"]
        )

    def _start(self, name: str, arguments: Sequence[str]) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("STEPWIRE_")}
        environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / source) for source in (".", "proto", "kernels"))
        with (self.directory / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", *arguments, "--exit-with-parent"],
                cwd=self.directory,
                env=environment,
                stdout=log,
                stderr=log,
            )

    def is_listening(self, name: int | str) -> bool:
        return (self.directory / f"{name}.sock").exists()

    def end_worker(self, name: int | str, number: signal.Signals) -> int:
        """Its exit code; negative where the signal ended it."""
        process = self.processes.pop(f"worker {name}")
        process.send_signal(number)
        return process.wait(STOP_LIMIT_S)

    def paused(self) -> AbstractContextManager[None]:
        """All workers stand still in the block: what is asked meanwhile is accepted and waits."""
        return standing_still([process for name, process in self.processes.items() if name.startswith("worker ")])

    async def wait_open(self, num_requests: int) -> None:
        """Until so many requests have been accepted and are not over."""
        await self.wait_for(lambda: self.metric("stepwire_open_requests") == num_requests)

    def start(self) -> None:
        for number in range(self.num_groups):
            self.start_worker(number)
        workers = ",".join(self.address(number) for number in range(self.num_groups))
        self._start(
            "control_plane",
            [
                *("control_plane", f"--workers={workers}", f"--grpc-port={self.grpc_port}"),
                *(f"--admin-port={self.admin_port}", f"--metrics-port={self.metrics_port}"),
            ],
        )
        try:
            wait_until(lambda: self.metric("stepwire_worker_connected") == self.num_groups, START_LIMIT_S, self.logs)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    @asynccontextmanager
    async def clients(self) -> AsyncIterator[Self]:
        """Calls may be made inside; channels belong to one event loop."""
        addresses = (f"127.0.0.1:{port}" for port in (self.grpc_port, self.admin_port))
        public, private = (grpc.aio.insecure_channel(address) for address in addresses)
        async with public, private:
            self.inference = pb_grpc.InferenceServiceStub(public)
            self.admin = admin_pb2_grpc.AdminServiceStub(private)
            yield self

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        await asyncio.to_thread(self.start)
        try:
            async with self.clients():
                yield self
        finally:
            self.stop()

    async def wait_connected(self, num_groups: int) -> None:
        await self.wait_for(lambda: self.metric("stepwire_worker_connected") == num_groups)

    async def wait_for(self, condition: Callable[[], bool], limit_s: float = START_LIMIT_S) -> None:
        await asyncio.to_thread(wait_until, condition, limit_s, self.logs)

    def metric(self, sample: str, group: int | None = None) -> float:
        """A metric of one group, or the sum over all; 0 while the page does not have it."""
        name = sample if group is None else f'{sample}{{group="{group}"}}'
        try:
            page = httpx.get(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=LIMIT_S)
            return read_sample(page.text, name)
        except (LookupError, httpx.TransportError):
            return 0.0

    def log_of(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text()

    def logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in self.directory.glob("*.log"))

    async def generate(self, prompt: Sequence[int], *, seed: int = 0, max_tokens: int = 40) -> Stream:
        """One request, until its end. Raises `grpc.aio.AioRpcError` if it is not accepted."""
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=prompt),
            stop=pb.StopConditions(max_tokens=max_tokens, ignore_eos=True),
            sampling=pb.SamplingParams(seed=seed, temperature=1.0),
            output=pb.OutputOptions(token_ids=True),
        )
        stream = Stream()
        async for response in self.inference.Generate(request):
            for delta in response.deltas:
                stream.token_ids += delta.token_ids
            stream.num_cached_tokens = response.usage.num_cached_tokens
            stream.error = response.error.message
        return stream


@dataclass(slots=True)
class Stream:
    """What a request got."""

    token_ids: list[int] = field(default_factory=list)
    num_cached_tokens: int = 0
    error: str = ""
