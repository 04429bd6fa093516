"""`python -m load_tests.relay_skew`: how far apart a group's ranks begin a step, by the relay alone.

Real processes and the worker's own relay: a pipe to ranks of the first node, gRPC to another node's relay and pipes
from there (on this machine, over loopback). Ranks take steps as they do in a group and note the time instead of
computing, by the machine's monotonic clock. Rank 0 sends steps of decodes at a fixed pace; times are from the beginning
of its sending. `own` is when rank 0 itself goes on to its part, `last` when the last rank has the step in hand, and
`skew` the time between the first and the last of all ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from stepwire.v1 import group_pb2

from gpu_worker.config import WorkerSettings
from gpu_worker.parallel import joining, local_ranks
from gpu_worker.parallel.group_runner import Followers
from gpu_worker.parallel.group_watch import GroupWatch
from gpu_worker.parallel.layout import GroupLayout
from gpu_worker.parallel.local_ranks import LocalRanks
from gpu_worker.parallel.nodes import NodeServer
from gpu_worker.parallel.places import write_places
from gpu_worker.runner_api import StepBatch
from gpu_worker.step_codec import encode_step
from load_tests.results import REPOSITORY_ROOT, RESULTS_DIRECTORY, append_result, measurement_facts
from load_tests.stack import free_port

MODULE = "load_tests.relay_skew"
NOTING_RANK = "load_tests.relayed_rank"
WARM_STEPS = 50
_END_LIMIT_S = 10.0


@dataclass(frozen=True)
class Case:
    num_ranks: int
    num_nodes: int = 1

    @property
    def name(self) -> str:
        return f"{self.num_ranks} ranks on {self.num_nodes} node{'s' if self.num_nodes > 1 else ''}"


CASES = (Case(2), Case(4), Case(8), Case(2, 2), Case(4, 2), Case(8, 2))


def decode_step(step_id: int, num_rows: int) -> StepBatch:
    """Every row decodes, and every sixteenth gets a block."""
    rows = np.arange(num_rows, dtype=np.uint32)
    new = (rows % 16 == step_id % 16).astype(np.uint32)
    nothing = np.zeros(0, dtype=np.uint32)
    return StepBatch(
        step_id=step_id,
        bucket=0,
        drop_rows=nothing,
        adds=(),
        run_rows=rows,
        run_start_positions=rows + np.uint32(1000 + step_id),
        run_num_tokens=np.ones(num_rows, dtype=np.uint32),
        run_samples=np.ones(num_rows, dtype=np.bool_),
        run_num_new_blocks=new,
        new_block_ids=np.arange(int(new.sum()), dtype=np.uint32),
        mask_rows=nothing,
    )


def measure(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    # The ranks that this process starts are those of the benchmark.
    local_ranks.RANK_MODULE = NOTING_RANK
    with tempfile.TemporaryDirectory() as folder:
        settings = WorkerSettings(
            device="cpu",
            model=Path(folder),
            tensor_parallel_size=case.num_ranks,
            num_nodes=case.num_nodes,
            group_listen=f"127.0.0.1:{free_port()}" if case.num_nodes > 1 else None,
        )
        layout = GroupLayout(case.num_ranks, (1,), num_nodes=case.num_nodes)
        watch = GroupWatch(layout)
        followers: list[Followers] = []
        relay: subprocess.Popen[bytes] | None = None
        ranks = LocalRanks(watch.on_event)
        try:
            if case.num_nodes > 1:
                nodes = NodeServer(settings, layout, watch, "unused:0")
                followers.append(nodes)
                command = [sys.executable, "-m", MODULE, "--relay", folder, "--join", str(settings.group_listen)]
                environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
                relay = subprocess.Popen(command, cwd=REPOSITORY_ROOT, env=environment)
                nodes.await_all()
            followers.append(ranks)
            places = write_places(layout, 0, settings, "unused:0", "127.0.0.1")
            for place in places:
                place.settings = json.dumps({"arrivals": folder})
            ranks.start(places[1:])
            watch.wait_started(settings.group_timeout_s)
            sent = _send_steps(followers, args)
        finally:
            watch.stop()
            for each in followers:
                each.close(_END_LIMIT_S)
            if relay is not None:
                relay.wait(_END_LIMIT_S)
        arrived = [np.load(Path(folder) / f"{rank}.npy") for rank in range(1, case.num_ranks)]
    return {"case": case.name, "num_ranks": case.num_ranks, "num_nodes": case.num_nodes} | _summary(sent, arrived)


def _send_steps(followers: Sequence[Followers], args: argparse.Namespace) -> np.ndarray:
    """[num_steps, begun and gone on], ns."""
    times = np.zeros((args.steps + WARM_STEPS, 2), dtype=np.int64)
    due = time.monotonic()
    for step_id in range(len(times)):
        batch = decode_step(step_id, args.rows)
        due += args.step_ms / 1e3
        time.sleep(max(0.0, due - time.monotonic()))
        times[step_id, 0] = time.monotonic_ns()
        # As the group's runner does it.
        data = group_pb2.RankCommand(step=encode_step(batch)).SerializeToString()
        for each in followers:
            each.send(data)
        times[step_id, 1] = time.monotonic_ns()
    return times


def _summary(sent: np.ndarray, arrived: Sequence[np.ndarray]) -> dict[str, Any]:
    """Microseconds, over the steps after the first few."""
    begun, own = sent[WARM_STEPS:, 0], sent[WARM_STEPS:, 1]
    others = np.stack([each[WARM_STEPS:, 1] for each in arrived])  # [num_ranks - 1, num_steps]
    everybody = np.concatenate([own[None], others])
    spans = {
        "own_us": own - begun,
        "last_us": others.max(axis=0) - begun,
        "skew_us": everybody.max(axis=0) - everybody.min(axis=0),
    }
    return {
        name: {f"p{share}": round(float(np.percentile(span, share)) / 1e3, 1) for share in (50, 99)}
        for name, span in spans.items()
    }


class _NotingRanks(LocalRanks):
    """Ranks that note their arrivals here."""

    folder = ""

    def start(self, places: Sequence[group_pb2.RankPlace]) -> None:
        for place in places:
            place.settings = json.dumps({"arrivals": self.folder})
        super().start(places)


def relay(folder: str, address: str) -> int:
    """The other node's process, with the benchmark's ranks in place of the worker's."""
    local_ranks.RANK_MODULE = NOTING_RANK
    _NotingRanks.folder = folder
    joining.LocalRanks = _NotingRanks  # type: ignore[misc]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return joining.hold_ranks(WorkerSettings(device="cpu", model=Path(folder), join=address))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="steps of a case (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=256, help="decodes in a step (default: %(default)s)")
    parser.add_argument("--step-ms", type=float, default=5.0, help="from step to step (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="turns through all cases (default: %(default)s)")
    parser.add_argument("--label", default="", help="said in the result")
    parser.add_argument("--out", type=Path, default=RESULTS_DIRECTORY / "relay_skew.jsonl")
    parser.add_argument("--relay", help=argparse.SUPPRESS)
    parser.add_argument("--join", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.relay:
        return relay(args.relay, args.join)
    facts = measurement_facts(MODULE, argv)
    console = Console()
    step_bytes = len(group_pb2.RankCommand(step=encode_step(decode_step(1, args.rows))).SerializeToString())
    turns: dict[str, list[dict[str, Any]]] = {}
    for _ in range(args.repeats):
        for case in CASES:
            found = measure(case, args)
            turns.setdefault(case.name, []).append(found)
            console.print(
                f"{case.name}: own {found['own_us']}, last {found['last_us']}, skew {found['skew_us']} (microseconds)"
            )
    append_result(
        args.out,
        {**facts, "label": args.label, "rows": args.rows, "step_bytes": step_bytes, "step_ms": args.step_ms}
        | {"cases": list(turns.values())},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
