"""What rank 0 does when another rank is lost."""

from __future__ import annotations

from collections.abc import Callable

from gpu_worker.parallel.group_runner import GroupRunner
from gpu_worker.parallel.group_watch import GroupWatch
from gpu_worker.parallel.layout import GroupLayout
from gpu_worker.runner_api import PendingStep, StepBatch, TokenMask, WorkerFacts
from gpu_worker.simulated import SimulationSpec


class Local:
    """Rank 0's part, whose steps wait for the others."""

    def __init__(self, happened: list[str]) -> None:
        self._happened = happened

    def describe(self) -> WorkerFacts:
        return SimulationSpec().facts()

    def execute(self, batch: StepBatch, wait_for_mask: Callable[[], TokenMask]) -> PendingStep:
        raise NotImplementedError

    def reset(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def give_up(self) -> None:
        self._happened.append("give up")


class Node:
    def __init__(self, happened: list[str]) -> None:
        self._happened = happened

    def send(self, data: bytes) -> None:
        raise NotImplementedError

    def close(self, grace_s: float) -> None:
        raise NotImplementedError

    def kill(self) -> None:
        self._happened.append("kill")


def test_a_lost_rank_ends_the_others_and_what_waits_for_them_here() -> None:
    happened: list[str] = []
    local = Local(happened)
    watch = GroupWatch(GroupLayout(3, (2,)))
    runner = GroupRunner(local, local.describe(), [Node(happened), Node(happened)], watch)
    runner.abandon()
    # The others first: one that still ran would take what is left here for a sum.
    assert happened == ["kill", "kill", "give up"]
    runner.abandon()
