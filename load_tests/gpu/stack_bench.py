"""The whole stack on GPUs: workers and control plane as processes, the load driver over gRPC with token ids.

    python -m load_tests.gpu.stack_bench --shape llama-3.1-8b --run 'decode --batch-size 32' --run nano --output DIR

Starts `python -m gpu_worker` (random weights) and `python -m control_plane`, says how long they took to be ready, waits
until the workers have captured the graphs of all shapes of steps, runs the scenarios of `python -m load_tests` one
after another, and prints the servers' log if something fails. What was measured before all graphs were there says so in
its label.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gpu_worker.cuda.runner import GRAPHS_COMPLETE
from load_tests.stack import REPOSITORY_ROOT, SHAPES_DIRECTORY, _Processes, free_port

_READY_LIMIT_S = 120.0


class WorkerStack(_Processes):
    """GPU workers, each a group, and a control plane that takes and gives token ids. Ready when entered."""

    def __init__(
        self, shape: str, worker_flags: Sequence[str], control_plane_flags: Sequence[str], num_groups: int = 1
    ) -> None:
        super().__init__()
        self._num_groups = num_groups
        self._shape, self._worker_flags, self._control_plane_flags = shape, worker_flags, control_plane_flags
        self.grpc_address = f"unix:{self.directory}/public.sock"
        # From the first process's start.
        self.ready_s = 0.0

    def __enter__(self) -> Self:
        workers = [f"unix:{self.directory}/worker{number}.sock" for number in range(self._num_groups)]
        started_s = time.monotonic()
        model = str(SHAPES_DIRECTORY / self._shape)
        try:
            for number, worker in enumerate(workers):
                # One group may have several devices; several have one each.
                device = {"CUDA_VISIBLE_DEVICES": str(number)} if self._num_groups > 1 else {}
                command = ["gpu_worker", "--model", model, "--load-format", "dummy", "--listen", worker]
                self._start(f"gpu_worker {number}", [*command, *self._worker_flags], device)
            self._start(
                "control_plane",
                [
                    "control_plane",
                    *("--workers", ",".join(workers), "--listen", self.grpc_address),
                    *("--grpc-port", "0", "--metrics-port", str(free_port())),
                    *self._control_plane_flags,
                ],
            )
            self._wait_until(self._is_serving, _READY_LIMIT_S)
        except BaseException:
            self.stop()
            raise
        self.ready_s = time.monotonic() - started_s
        return self

    def wait_for_graphs(self, limit_s: float) -> float | None:
        """Seconds until every group's first rank has all its graphs; None: not within the limit."""
        begun_s = time.monotonic()
        while time.monotonic() < begun_s + limit_s:
            said = [line for line in self._log.read_text(errors="replace").splitlines() if GRAPHS_COMPLETE in line]
            # The other ranks of a group name themselves.
            if sum("rank=" not in line for line in said) >= self._num_groups:
                return time.monotonic() - begun_s
            time.sleep(0.2)
        return None

    def _is_serving(self) -> bool:
        with grpc.insecure_channel(self.grpc_address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            try:
                answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
            except grpc.RpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def run_scenario(stack: WorkerStack, scenario: str, label: str, output: Path, timeout_s: float) -> int:
    """One `python -m load_tests`; its exit code."""
    command = [sys.executable, "-m", "load_tests", *shlex.split(scenario), "--grpc", stack.grpc_address]
    command += ["--label", label, "--out", str(output), "--timeout-s", str(timeout_s), "--token-id-limit", "100000"]
    environment = dict(os.environ, COLUMNS="150")
    return subprocess.run(command, cwd=REPOSITORY_ROOT, env=environment, timeout=timeout_s + 30, check=False).returncode


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m load_tests.gpu.stack_bench", description=__doc__)
    parser.add_argument("--shape", required=True, choices=sorted(path.name for path in SHAPES_DIRECTORY.iterdir()))
    parser.add_argument("--control-plane-flags", default="", help="for python -m control_plane")
    parser.add_argument("--worker-flags", default="--max-model-len 9216", help="for python -m gpu_worker")
    parser.add_argument("--data-parallel-size", type=int, default=1, help="workers of one device each")
    parser.add_argument(
        "--run", action="append", required=True, help="a scenario of python -m load_tests and its flags"
    )
    parser.add_argument("--timeout-s", type=float, default=90.0, help="for one scenario (default: %(default)s)")
    parser.add_argument(
        "--graphs-timeout-s",
        type=float,
        default=120.0,
        help="for the workers' graphs; 0: do not wait (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, required=True, help="file that results are appended to")
    parser.add_argument("--log", action="store_true", help="print the end of the servers' log")
    args = parser.parse_args(argv)
    has_failed = False
    label = f"worker: {args.worker_flags}; control plane: {args.control_plane_flags or 'defaults'}"
    if args.data_parallel_size > 1:
        label += f"; {args.data_parallel_size} groups"
    flags = shlex.split(args.worker_flags), shlex.split(args.control_plane_flags)
    with WorkerStack(args.shape, *flags, args.data_parallel_size) as stack:
        print(f"{args.shape}: ready {stack.ready_s:.1f} s after the start", flush=True)
        if args.graphs_timeout_s and "--enforce-eager" not in args.worker_flags:
            graphs_s = stack.wait_for_graphs(args.graphs_timeout_s)
            print(
                "graphs are NOT complete" if graphs_s is None else f"graphs complete after {graphs_s:.1f} s", flush=True
            )
            label += "; graphs incomplete" if graphs_s is None else ""
        else:
            label += "; without waiting for graphs"
        for scenario in args.run:
            print(f"--- {args.shape}: {scenario}", flush=True)
            if run_scenario(stack, scenario, label, args.output, args.timeout_s):
                has_failed = True
        if has_failed or args.log:
            print(stack.log())
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
