"""Rank 0's runner: passes every step to the other ranks, then executes its own part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from stepwire.v1 import group_pb2

from gpu_worker.parallel.group_watch import GroupWatch
from gpu_worker.runner_api import (
    PendingStep,
    Runner,
    SessionEnded,
    StepBatch,
    StepError,
    StepResult,
    TokenMask,
    UsesPauses,
    WaitsForOthers,
    WorkerFacts,
)
from gpu_worker.step_codec import decode_described, encode_mask, encode_step

# What the other ranks may take to end when they are told to.
_CLOSE_LIMIT_S = 5.0


class Followers(Protocol):
    """The other ranks, or a part of them."""

    def send(self, command: bytes) -> None: ...

    def close(self, grace_s: float) -> None: ...

    def kill(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _ExplainedStep:
    pending: PendingStep
    watch: GroupWatch

    def result(self) -> StepResult:
        try:
            result = self.pending.result()
            if result.awaits_prompts:
                result.prompt_logprobs = decode_described(self.watch.wait_described(result.step_id))
            return result
        except Exception as error:
            raise self.watch.explain(error) from error


class GroupRunner:
    """Implements `runner_api.Runner` for a whole group. Commands leave in the order in which rank 0 executes them."""

    def __init__(self, local: Runner, facts: WorkerFacts, followers: list[Followers], watch: GroupWatch) -> None:
        self._local, self._facts, self._followers, self._watch = local, facts, followers, watch

    @property
    def local(self) -> Runner:
        """Rank 0's own part."""
        return self._local

    def describe(self) -> WorkerFacts:
        return self._facts

    def watch(self, on_failure: Callable[[Exception], None], on_leaving: Callable[[str], None]) -> None:
        """Have a rank's end told, on any thread."""
        self._watch.watch(on_failure, on_leaving)

    def abandon(self) -> None:
        self._watch.stop()
        for followers in self._followers:
            followers.kill()
        # Kernels wait in memory that stays mapped: a peer's end is nothing that they would see.
        if isinstance(self._local, WaitsForOthers):
            self._local.give_up()

    def execute(self, batch: StepBatch, wait_for_mask: Callable[[], TokenMask]) -> PendingStep:
        self._send(group_pb2.RankCommand(step=encode_step(batch)))

        def relayed_mask() -> TokenMask:
            try:
                mask = wait_for_mask()
            except Exception:
                self._send(group_pb2.RankCommand(abandon=group_pb2.Empty()))
                raise
            self._send(group_pb2.RankCommand(mask=encode_mask(batch.step_id, mask)))
            return mask

        try:
            return _ExplainedStep(self._local.execute(batch, relayed_mask), self._watch)
        except (StepError, SessionEnded):
            raise
        except Exception as error:
            raise self._watch.explain(error) from error

    def has_pause_work(self) -> bool:
        return isinstance(self._local, UsesPauses) and self._local.has_pause_work()

    def idle(self) -> bool:
        if not isinstance(self._local, UsesPauses) or not self._local.has_pause_work():
            return False
        self._send(group_pb2.RankCommand(pause=group_pb2.Empty()))
        return self._local.idle()

    def reset(self) -> None:
        self._watch.forget_described()
        self._send(group_pb2.RankCommand(reset=group_pb2.Empty()))
        self._local.reset()

    def close(self) -> None:
        self._watch.stop()
        for followers in self._followers:
            followers.close(_CLOSE_LIMIT_S)
        self._local.close()

    def _send(self, command: group_pb2.RankCommand) -> None:
        data = command.SerializeToString()
        for followers in self._followers:
            followers.send(data)
