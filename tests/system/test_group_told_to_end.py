"""A group of which a process is told to end while it still forms: exit code 0 for all that are told, nothing left."""

from __future__ import annotations

import contextlib
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from tests.system.launched import wait_until
from tests.system.ports import free_port
from tests.system.standing_still import standing_still
from tests.system.worker_process import WorkerClient, WorkerProcess

FLAGS = ("--device=cpu", "--dtype=float32", "--num-threads=1", "--cpu-kv-cache-gib=0.01", "--log-format=json")
# Nobody comes before this: only a signal ends them.
PATIENT = ("--group-timeout-s=600",)


def worker(model: Path, *flags: str) -> WorkerProcess:
    return WorkerProcess([*FLAGS, *PATIENT, f"--model={model}", *flags])


@contextlib.contextmanager
def forming(model: Path, directory: Path, num_nodes: int) -> Iterator[tuple[WorkerProcess, WorkerProcess]]:
    """The first node, and the second one, which has joined and waits for the others."""
    address = f"127.0.0.1:{free_port()}"
    sizes = (f"--pipeline-parallel-size={num_nodes}", f"--num-nodes={num_nodes}")
    listening = (f"--group-listen={address}", f"--listen=unix:{directory}/w.sock")
    with worker(model, *sizes, *listening) as first, worker(model, f"--join={address}") as second:
        second.wait_for_event("this rank waits for the others")
        yield first, second


def processes_of(*workers: WorkerProcess) -> list[psutil.Process]:
    own = [psutil.Process(each.process.pid) for each in workers]
    return [*own, *(child for process in own for child in process.children(recursive=True))]


def rests(process: WorkerProcess) -> bool:
    """It has computed next to nothing for a moment."""
    seen = psutil.Process(process.process.pid)
    before = seen.cpu_times()
    time.sleep(1.0)
    after = seen.cpu_times()
    return after.user + after.system - before.user - before.system < 0.05


def wait_until_gone(processes: list[psutil.Process]) -> None:
    def are_gone() -> bool:
        return not any(
            each.is_running() and each.status() != psutil.STATUS_ZOMBIE
            for each in processes
            if psutil.pid_exists(each.pid)
        )

    wait_until(are_gone, what="the end of all ranks")


def test_a_node_whose_first_node_says_nothing(llama: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        worker(llama, f"--join=127.0.0.1:{listening.getsockname()[1]}") as node,
    ):
        listening.accept()
        node.send_signal(signal.SIGTERM)
        assert node.wait_for_exit() == 0, node.lines


@pytest.mark.parametrize("told", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_any_node_of_a_group_that_waits_for_another(llama: Path, tmp_path: Path, told: int) -> None:
    """The group ends as one, in peace."""
    with forming(llama, tmp_path, num_nodes=3) as nodes:
        processes = processes_of(*nodes)
        nodes[told].send_signal(signal.SIGTERM)
        assert [node.wait_for_exit() for node in nodes] == [0, 0], [node.lines for node in nodes]
        wait_until_gone(processes)


@pytest.mark.slow
def test_a_first_node_that_waits_in_a_collective(llama: Path, tmp_path: Path) -> None:
    """Its main thread is not in Python: another hears the signal."""
    with forming(llama, tmp_path, num_nodes=2) as (first, second):
        processes = processes_of(first, second)
        ranks = [each for each in processes_of(second) if each.pid != second.process.pid]
        assert len(ranks) == 1
        with standing_still(ranks):
            wait_until(lambda: rests(first), what="the first node has nothing to do but wait", every_s=0.5)
            first.send_signal(signal.SIGTERM)
            assert first.wait_for_exit() == 0, first.lines
        assert second.wait_for_exit() == 0, second.lines
        wait_until_gone(processes)


def test_who_waits_for_the_worker_is_told_why_there_will_be_none(llama: Path, tmp_path: Path) -> None:
    with forming(llama, tmp_path, num_nodes=3) as (first, second):
        processes = processes_of(first, second)
        [rank] = [each for each in processes_of(second) if each.pid != second.process.pid]
        with WorkerClient(f"unix:{tmp_path}/w.sock") as client:
            assert refusal_of(client)[0] is grpc.StatusCode.UNAVAILABLE
            rank.kill()
            told: list[tuple[grpc.StatusCode, str]] = []

            def is_told() -> bool:
                told.append(refusal_of(client))
                return told[-1][0] is grpc.StatusCode.FAILED_PRECONDITION

            wait_until(is_told, what="the reason")
        assert "could not load its model: rank 1" in told[-1][1]
        assert first.wait_for_exit() == 1 and second.wait_for_exit() == 1
        wait_until_gone(processes)


def refusal_of(client: WorkerClient) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as refused:
        client.describe()
    return refused.value.code(), refused.value.details()


@pytest.mark.slow
def test_a_node_whose_first_node_hangs(llama: Path, tmp_path: Path) -> None:
    with forming(llama, tmp_path, num_nodes=3) as (first, second):
        processes = processes_of(second)
        with standing_still([first.process]):
            second.send_signal(signal.SIGTERM)
            second.wait_for_event("leaves its group")
            second.send_signal(signal.SIGTERM)
            assert second.wait_for_exit() == 0, second.lines
        wait_until_gone(processes)
