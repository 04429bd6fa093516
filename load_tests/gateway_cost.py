"""What a token costs the gateway: 256 server-sent event streams through one gateway to a simulated worker.

    PYTHONPATH=.:proto python -m load_tests.gateway_cost --step-ms 20 10 5

The simulated worker draws one token a stream every step, so that 20 ms make 50 tokens/s a stream. CPU time (user and
system, all threads) is read from /proc around a window in which all streams run; tokens are those that the control
plane counted meanwhile. Beside it stands the floor: what a process pays here and now that only writes as many bytes to
as many sockets. One JSON line a run is added to load_tests/results/gateway_cost.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import uvloop
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "load_tests" / "results" / "gateway_cost.jsonl"
SERVICES = ("gateway", "control_plane", "gpu_worker")
MAX_MODEL_LEN = 32768
VOCAB_SIZE = 4096
CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
START_LIMIT_S = 60.0
# Streams have begun, the window has not: buffers and caches fill.
WARM_UP_S = 2.0


def write_model(directory: Path) -> None:
    """A byte-level tokenizer of this project's own text, and the JSON files that go with one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train([str(path) for path in sorted((ROOT / "gateway").glob("*.py"))], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    config = {"model_type": "llama", "vocab_size": size, "max_position_embeddings": MAX_MODEL_LEN}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))


@dataclass
class Services:
    """The three processes, on unix sockets and free ports."""

    directory: Path
    step_ms: float
    num_streams: int
    worker_module: str = "gpu_worker"
    worker_flags: tuple[str, ...] = ()
    gateway_flags: tuple[str, ...] = ()
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self) -> None:
        worker, control_plane = f"unix:{self.directory}/worker.sock", f"unix:{self.directory}/control_plane.sock"
        model = ["--model", str(self.directory)]
        num_blocks = self.num_streams * MAX_MODEL_LEN // 16 + 16
        self._start(
            "gpu_worker",
            *model,
            *("--runner", "simulated", "--listen", worker, "--sim-step-ms", str(self.step_ms)),
            *("--sim-max-num-seqs", str(self.num_streams), "--sim-max-model-len", str(MAX_MODEL_LEN)),
            *("--sim-num-blocks", str(num_blocks)),
            *self.worker_flags,
            module=self.worker_module,
        )
        ports = ["--grpc-port", "0", "--metrics-port", str(self.metrics_port)]
        self._start("control_plane", *model, "--workers", worker, "--listen", control_plane, *ports)
        self._start("gateway", "--port", str(self.port), "--control-plane", control_plane, *self.gateway_flags)

    def __post_init__(self) -> None:
        self.port, self.metrics_port = _free_ports(2)

    def _start(self, service: str, *flags: str, module: str | None = None) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("STEPWIRE_")}
        sources = [str(ROOT), str(ROOT / "proto"), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sources))
        with (self.directory / f"{service}.log").open("wb") as log:
            self.processes[service] = subprocess.Popen(
                [sys.executable, "-m", module or service, *flags, "--exit-with-parent", "--log-level", "warning"],
                env=environment,
                stdout=log,
                stderr=log,
            )

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            with contextlib.suppress(OSError), urlopen(f"http://127.0.0.1:{self.port}/ready", timeout=5):
                return
            ended = [name for name, process in self.processes.items() if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = "\n".join(path.read_text() for path in self.directory.glob("*.log"))
                raise SystemExit(f"the stack did not become ready (ended: {ended or 'none'})\n{logs}")
            time.sleep(0.1)

    def stop(self) -> None:
        """In the order in which requests flow, so that nobody waits for one that has gone."""
        for service in SERVICES:
            process = self.processes.get(service)
            if process is not None:
                process.terminate()
                process.wait(60)

    def cpu_s(self) -> dict[str, float]:
        return {name: _cpu_s(process.pid) for name, process in self.processes.items()}

    def counters(self) -> dict[str, float]:
        """Counts since the start: tokens generated, events sent, sends to sockets, bytes of events."""
        gateway = _samples(f"http://127.0.0.1:{self.port}/metrics")
        control_plane = _samples(f"http://127.0.0.1:{self.metrics_port}/metrics")
        return {
            "tokens": control_plane["stepwire_generation_tokens_total"],
            "events": gateway["stepwire_gateway_sse_events_total"],
            "sends": gateway["stepwire_gateway_sse_sends_total"],
            "bytes": gateway["stepwire_gateway_sse_bytes_total"],
        }


def _free_ports(count: int) -> list[int]:

    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _samples(url: str) -> dict[str, float]:
    """Samples by name, those of all labels together."""
    samples: dict[str, float] = {}
    with urlopen(url, timeout=10) as response:
        for line in response.read().decode().splitlines():
            if line and line[0] != "#":
                sample, _, value = line.rpartition(" ")
                name = sample.partition("{")[0]
                samples[name] = samples.get(name, 0.0) + float(value)
    return samples


async def write_only(port: int, interval_s: float, num_bytes: int) -> None:
    """The floor: the same bytes to every connection every interval, from nowhere."""
    transports: set[asyncio.Transport] = set()

    class Writer(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            transport.write(b"HTTP/1.1 200 OK\r\n\r\n")  # type: ignore[attr-defined]
            transports.add(transport)  # type: ignore[arg-type]

    loop = asyncio.get_running_loop()
    event = b"\ndata: ".ljust(num_bytes, b"x")
    await loop.create_server(Writer, "127.0.0.1", port)
    due = loop.time()
    while True:
        due = max(due + interval_s, loop.time())
        await asyncio.sleep(due - loop.time())
        for transport in transports:
            transport.write(event)


async def measure_floor(num_streams: int, interval_s: float, num_bytes: int, seconds: float) -> float:
    """CPU of the floor in microseconds a write."""
    (port,) = _free_ports(1)
    command = [
        sys.executable,
        "-m",
        "load_tests.gateway_cost",
        "--write-only",
        str(port),
        str(interval_s),
        str(num_bytes),
    ]
    process = subprocess.Popen(command, cwd=ROOT)
    loop = asyncio.get_running_loop()
    try:
        clients = [StreamClient(b"") for _ in range(num_streams)]
        for client in clients:
            while True:
                with contextlib.suppress(OSError):
                    await loop.create_connection(lambda client=client: client, "127.0.0.1", port)  # type: ignore[misc]
                    break
                await asyncio.sleep(0.05)
        await asyncio.sleep(1.0)
        begin_cpu_s, begin_events = _cpu_s(process.pid), sum(client.num_events for client in clients)
        await asyncio.sleep(seconds)
        num_events = sum(client.num_events for client in clients) - begin_events
        return round((_cpu_s(process.pid) - begin_cpu_s) / num_events * 1e6, 2)
    finally:
        process.kill()
        process.wait()


class StreamClient(asyncio.Protocol):
    """One stream, read as cheaply as Python can: events are counted, not parsed; arrivals are timed."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.num_events = 0
        self.arrivals_s: list[float] = []
        self.failure: bytes | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        transport.write(self._request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        if not self.arrivals_s and not data.startswith(b"HTTP/1.1 200"):
            self.failure = data
        self.num_events += data.count(b"\ndata: ")
        self.arrivals_s.append(time.monotonic())


def _request(port: int, num_tokens: int) -> bytes:
    body = {
        "messages": [{"role": "user", "content": "Say something long."}],
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "stream": True,
    }
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


async def measure(services: Services, seconds: float) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    request = _request(services.port, MAX_MODEL_LEN - 256)
    clients = [StreamClient(request) for _ in range(services.num_streams)]
    for client in clients:
        await loop.create_connection(lambda client=client: client, "127.0.0.1", services.port)  # type: ignore[misc]
    while not all(client.num_events > 1 for client in clients):
        failed = next((client.failure for client in clients if client.failure), None)
        if failed is not None:
            raise SystemExit(f"a stream was refused: {failed.decode(errors='replace')}")
        await asyncio.sleep(0.05)
    await asyncio.sleep(WARM_UP_S)

    begin, begin_counters = time.monotonic(), await asyncio.to_thread(services.counters)
    begin_cpu, begin_own = services.cpu_s(), time.process_time()
    await asyncio.sleep(seconds)
    end_cpu, end_own = services.cpu_s(), time.process_time()
    end, end_counters = time.monotonic(), await asyncio.to_thread(services.counters)
    for client in clients:
        client.transport.abort()  # type: ignore[attr-defined]

    counted = {name: end_counters[name] - begin_counters[name] for name in end_counters}
    num_tokens = counted["tokens"]
    gaps_s = np.concatenate(
        [np.diff([at for at in client.arrivals_s if begin <= at <= end]) for client in clients]
    )  # [num_gaps]
    p50, p99 = np.percentile(gaps_s * 1e3, (50, 99))
    return {
        "wall_s": round(end - begin, 2),
        "tokens_per_s": round(num_tokens / (end - begin)),
        "tokens_per_event": round(num_tokens / counted["events"], 3),
        "events_per_send": round(counted["events"] / counted["sends"], 3),
        "bytes_per_token": round(counted["bytes"] / num_tokens),
        "gateway_cpu_us_per_token": round((end_cpu["gateway"] - begin_cpu["gateway"]) / num_tokens * 1e6, 2),
        "control_plane_cpu_us_per_token": round(
            (end_cpu["control_plane"] - begin_cpu["control_plane"]) / num_tokens * 1e6, 2
        ),
        "worker_cpu_us_per_token": round((end_cpu["gpu_worker"] - begin_cpu["gpu_worker"]) / num_tokens * 1e6, 2),
        "client_cpu_us_per_token": round((end_own - begin_own) / num_tokens * 1e6, 2),
        "arrival_gap_ms": {"p50": round(float(p50), 2), "p99": round(float(p99), 2)},
    }


@contextlib.contextmanager
def _running(step_ms: float, num_streams: int) -> Iterator[Services]:
    directory = Path(tempfile.mkdtemp(prefix="stepwire-"))
    services = Services(directory, step_ms, num_streams)
    try:
        write_model(directory)
        services.start()
        services.wait_ready()
        yield services
    finally:
        services.stop()
        shutil.rmtree(directory, ignore_errors=True)


def _describe_run() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    processor = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit.stdout.strip(),
        "command": shlex.join(["python", "-m", "load_tests.gateway_cost", *sys.argv[1:]]),
        "machine": {"processor": processor, "num_cores": os.cpu_count(), "load_average": round(os.getloadavg()[0], 2)},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("grpcio", "protobuf", "uvicorn", "uvloop", "fastapi")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256, help="streams at one time (default 256)")
    parser.add_argument("--step-ms", type=float, nargs="+", default=[20.0, 10.0, 5.0], help="lengths of a step to try")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the measured window (default 10)")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each length, interleaved (default 1)")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"JSON lines file (default {RESULTS.name})")
    parser.add_argument("--write-only", nargs=3, help=argparse.SUPPRESS, metavar=("PORT", "INTERVAL_S", "BYTES"))
    arguments = parser.parse_args()
    if arguments.write_only:
        port, interval_s, num_bytes = arguments.write_only
        uvloop.run(write_only(int(port), float(interval_s), int(num_bytes)))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(arguments.repeats):
        for step_ms in arguments.step_ms:
            described = _describe_run()
            with _running(step_ms, arguments.streams) as services:
                numbers = uvloop.run(measure(services, arguments.seconds))
            floor = measure_floor(arguments.streams, step_ms / 1e3, numbers["bytes_per_token"], arguments.seconds / 2)
            numbers["floor_cpu_us_per_write"] = uvloop.run(floor)
            record = {**described, "num_streams": arguments.streams, "step_ms": step_ms, **numbers}
            with arguments.output.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(json.dumps({"step_ms": step_ms, **numbers}), flush=True)


if __name__ == "__main__":
    main()
