"""A rank is lost while others, alive themselves, wait for it: the group ends at once, and in good order."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import psutil
import pytest

from tests.system.launched import wait_until
from tests.system.ports import free_port
from tests.system.worker_process import WorkerClient, WorkerProcess
from tests.unit.gpu_worker.step_builder import Run, row_add, step

FLAGS = ("--device=cpu", "--dtype=float32", "--num-threads=1", "--cpu-kv-cache-gib=0.01", "--log-format=json")
# Debug: it is logged when a step has come.
SIZES = ("--tensor-parallel-size=2", "--pipeline-parallel-size=2", "--group-timeout-s=240", "--log-level=debug")
LAST_RANK = 3


def last_rank(holder: WorkerProcess) -> psutil.Process:
    """Of those that `holder` has started."""
    started = [json.loads(line) for line in holder.lines if "rank started" in line]
    [pid] = [entry["pid"] for entry in started if entry["rank"] == LAST_RANK]
    return psutil.Process(pid)


def cpu_seconds(processes: list[psutil.Process]) -> float:
    return sum(process.cpu_times().user + process.cpu_times().system for process in processes)


def rest(processes: list[psutil.Process]) -> bool:
    """They have computed next to nothing for a moment."""
    before = cpu_seconds(processes)
    time.sleep(1.0)
    return cpu_seconds(processes) - before < 0.05 * len(processes)


@pytest.mark.parametrize("num_nodes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_first_rank_does_not_wait_for_those_that_wait(llama: Path, tmp_path: Path, num_nodes: int) -> None:
    """Rank 3 stands still in the middle of a step: rank 2 waits for it in a sum, and rank 0 for rank 2's tokens. Once
    it is gone rank 0 ends by itself, not because it took too long."""
    listen, address = f"unix:{tmp_path}/w.sock", f"127.0.0.1:{free_port()}"
    with contextlib.ExitStack() as stack:

        def start(*flags: str) -> WorkerProcess:
            return stack.enter_context(WorkerProcess([*FLAGS, f"--model={llama}", *flags]))

        if num_nodes == 1:
            nodes = [start(*SIZES, f"--listen={listen}")]
        else:
            first = start(*SIZES, f"--listen={listen}", "--num-nodes=2", f"--group-listen={address}")
            nodes = [first, start(f"--join={address}", "--group-timeout-s=240")]
            nodes[1].wait_for_event("this rank waits for the others")
        nodes[0].wait_for_event("worker ready")
        lost = last_rank(nodes[-1])
        own = [psutil.Process(node.process.pid) for node in nodes]
        ranks = [child for process in own for child in process.children(recursive=True)]
        assert len(own) + len(ranks) - num_nodes == LAST_RANK
        with WorkerClient(listen) as client:
            session = client.start()
            session.step(step(1, [Run(0, 0, 20)], adds=[row_add(0, range(20), [1, 2])]))
            assert session.result().step_id == 1
            nodes[0].wait_for_event("step queued", then_forget=True)
            lost.suspend()
            session.step(step(2, [Run(0, 20)]))
            nodes[0].wait_for_event("step queued")
            wait_until(lambda: rest([own[0], *ranks]), what="everybody waits for rank 3", every_s=0.5)
            lost.kill()
            _, message = session.end()
        assert "rank 3 (stage 1 of 2, tensor-parallel rank 1 of 2)" in message and "SIGKILL" in message
        assert [node.wait_for_exit() for node in nodes] == [1] * num_nodes
        wait_until(lambda: not any(rank.is_running() for rank in ranks), what="the end of all ranks")
        logged = "\n".join(nodes[0].lines)
        assert "did not end by itself" not in logged and "has not ended" not in logged, logged
