"""What rank 0 makes of the other ranks' events."""

from __future__ import annotations

import traceback
from queue import SimpleQueue

import pytest
from stepwire.v1 import group_pb2, worker_pb2

from gpu_worker.parallel.group_watch import GroupWatch
from gpu_worker.parallel.layout import GroupError, GroupLayout

LIMIT_S = 60.0


def felt(rank: int) -> group_pb2.RankEvent:
    failure = group_pb2.RankFailure(message="a step failed", is_consequence=True, trace=f"in the code of rank {rank}")
    return group_pb2.RankEvent(rank=rank, failure=failure)


def described(step_id: int) -> group_pb2.RankEvent:
    parts = [worker_pb2.PromptLogprobs(row=step_id)]
    return group_pb2.RankEvent(rank=2, described=worker_pb2.StepResult(step_id=step_id, prompt_logprobs=parts))


@pytest.fixture
def told() -> SimpleQueue[Exception | str]:
    return SimpleQueue()


@pytest.fixture
def watch(told: SimpleQueue[Exception | str]) -> GroupWatch:
    watch = GroupWatch(GroupLayout(3, (1,)))
    watch.watch(told.put, told.put)
    return watch


def test_a_rank_that_nobody_else_has_ended_shows_where_it_failed(
    watch: GroupWatch, told: SimpleQueue[Exception | str]
) -> None:
    watch.on_event(felt(1))
    error = told.get(timeout=LIMIT_S)
    assert isinstance(error, Exception)
    assert str(error) == "rank 1 (tensor-parallel rank 1 of 3): a step failed"
    assert "in the code of rank 1" in "".join(traceback.format_exception(error))


def test_a_rank_that_another_one_has_ended_does_not(watch: GroupWatch, told: SimpleQueue[Exception | str]) -> None:
    watch.on_event(felt(1))
    watch.on_event(group_pb2.RankEvent(rank=2, failure=group_pb2.RankFailure(message="its process 7 ended")))
    error = told.get(timeout=LIMIT_S)
    assert isinstance(error, Exception)
    assert str(error) == "rank 2 (tensor-parallel rank 2 of 3): its process 7 ended"
    assert "in the code" not in "".join(traceback.format_exception(error))


def test_a_node_that_is_told_to_end_is_no_failure(watch: GroupWatch, told: SimpleQueue[Exception | str]) -> None:
    watch.on_event(group_pb2.RankEvent(rank=2, leaving=group_pb2.Empty()))
    assert told.get(timeout=LIMIT_S) == "rank 2 (tensor-parallel rank 2 of 3): its node is told to end"


def test_processes_that_do_not_start_are_named(watch: GroupWatch) -> None:
    watch.on_event(group_pb2.RankEvent(rank=1, started=group_pb2.Empty()))
    with pytest.raises(GroupError, match=r"^rank 2 \(tensor-parallel rank 2 of 3\): no process runs after 0\.08 s"):
        watch.wait_started(0.01)
    watch.on_event(group_pb2.RankEvent(rank=2, started=group_pb2.Empty()))
    watch.wait_started(0.01)


def test_what_a_stage_tells_of_prompts_is_there_for_its_step(
    watch: GroupWatch, told: SimpleQueue[Exception | str]
) -> None:
    watch.on_event(described(7))
    watch.on_event(described(8))
    assert watch.wait_described(8).prompt_logprobs[0].row == 8
    # Whatever is left of the session before is nobody's.
    watch.forget_described()
    watch.fail("rank 2 is lost")
    with pytest.raises(GroupError, match="rank 2 is lost"):
        watch.wait_described(7)
    assert told.get(timeout=LIMIT_S)


def test_nobody_waits_for_a_group_that_is_over(watch: GroupWatch) -> None:
    watch.stop()
    with pytest.raises(GroupError, match="has ended"):
        watch.wait_described(1)
