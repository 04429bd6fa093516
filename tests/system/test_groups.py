"""Several worker groups behind one control plane, in real processes: they join, drain, die and leave, and no stream
says anything else than it would have said undisturbed."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from stepwire.v1 import admin_pb2

from tests.system.conftest import STOP_LIMIT_S
from tests.system.standing_still import standing_still
from tests.system.worker_groups import VOCAB_SIZE, Stream, WorkerGroups

GENERATED = "stepwire_generation_tokens_total"
# A stream of 100 tokens takes five seconds: what happens meanwhile happens meanwhile on a busy machine as well.
SLOW_STEPS = ("--sim-step-ms=50",)


def prompts(count: int, length: int = 40) -> list[list[int]]:
    return [[(number * 37 + position) % VOCAB_SIZE for position in range(length)] for number in range(count)]


PROMPTS = prompts(16)
MAX_TOKENS = 150


@pytest.fixture(scope="module")
def said_alone() -> list[list[int]]:
    """What one group says to `PROMPTS`, undisturbed."""

    async def ask() -> list[list[int]]:
        async with WorkerGroups(1, worker_flags=("--sim-step-ms=0",)).running() as alone:
            return tokens_of(await asyncio.gather(*streams(alone, PROMPTS, MAX_TOKENS)))

    return asyncio.run(ask())


def streams(groups: WorkerGroups, wanted: Sequence[list[int]], max_tokens: int) -> list[Coroutine[Any, Any, Stream]]:
    return [groups.generate(prompt, seed=seed, max_tokens=max_tokens) for seed, prompt in enumerate(wanted)]


def tokens_of(answers: Sequence[Stream]) -> list[list[int]]:
    assert [answer.error for answer in answers] == [""] * len(answers)
    return [answer.token_ids for answer in answers]


@pytest.fixture(scope="module")
def pair() -> Iterator[WorkerGroups]:
    """Two groups that tests share; leave them running and idle."""
    groups = WorkerGroups(2)
    groups.start()
    yield groups
    groups.stop()


async def test_sixteen_streams_outlive_a_group_which_then_works_again(said_alone: list[list[int]]) -> None:
    wanted, expected = PROMPTS, [tokens[:60] for tokens in said_alone]
    async with WorkerGroups(2, worker_flags=SLOW_STEPS).running() as groups:
        running = asyncio.gather(*streams(groups, wanted, 60))
        await groups.wait_for(lambda: min(groups.metric(GENERATED, group) for group in (0, 1)) > 100)
        groups.end_worker(1, signal.SIGKILL)
        # Not one of them waits for the worker to come back: there is nobody who starts it.
        assert tokens_of(await running) == expected
        await groups.wait_for(lambda: groups.metric("stepwire_worker_losses_total", 1) == 1)
        assert groups.metric("stepwire_worker_losses_total", 0) == 0
        assert groups.metric("stepwire_worker_connected", 1) == 0

        before = groups.metric(GENERATED, 1)
        groups.start_worker(1)
        await groups.wait_connected(2)
        assert tokens_of(await asyncio.gather(*streams(groups, wanted, 60))) == expected
        assert groups.metric(GENERATED, 1) > before, "it takes work again"
        assert groups.metric("stepwire_kv_blocks_in_use") == 0


def assert_left_quietly(groups: WorkerGroups, num_departures: int) -> None:
    """Not one worker was lost, and the control plane has said one line about each that left."""
    assert groups.metric("stepwire_worker_losses_total") == 0
    assert groups.metric("stepwire_worker_departures_total") == num_departures
    log = groups.log_of("control_plane")
    assert log.count("worker leaves") == num_departures, log
    ready = log.index("ready")
    assert "warning" not in log[ready:] and "error" not in log[ready:], log


async def test_sixteen_streams_go_on_where_a_worker_is_told_to_end(said_alone: list[list[int]]) -> None:
    wanted, expected = PROMPTS, [tokens[:60] for tokens in said_alone]
    async with WorkerGroups(2, worker_flags=SLOW_STEPS).running() as groups:
        running = asyncio.gather(*streams(groups, wanted, 60))
        await groups.wait_for(lambda: min(groups.metric(GENERATED, group) for group in (0, 1)) > 100)
        assert groups.end_worker(1, signal.SIGTERM) == 0
        await groups.wait_connected(1)
        assert groups.metric("stepwire_requests_running", 1) == 0
        assert tokens_of(await running) == expected
        assert groups.metric("stepwire_group_draining") == 0, "what comes back takes work again"
        before = groups.metric(GENERATED, 1)
        groups.start_worker(1)
        await groups.wait_connected(2)
        assert tokens_of(await asyncio.gather(*streams(groups, wanted, 60))) == expected
        assert groups.metric(GENERATED, 1) > before
        assert_left_quietly(groups, 1)


async def test_streams_wait_for_the_successor_of_the_only_worker(said_alone: list[list[int]]) -> None:
    wanted, expected = PROMPTS[:8], [tokens[:60] for tokens in said_alone[:8]]
    async with WorkerGroups(1, worker_flags=SLOW_STEPS).running() as groups:
        running = asyncio.gather(*streams(groups, wanted[:7], 60))
        for num_tokens in (50, 150, 250):
            await groups.wait_for(lambda: groups.metric(GENERATED) > num_tokens)  # noqa: B023  waited for at once
            assert groups.end_worker(0, signal.SIGTERM) == 0
            if num_tokens == 50:
                await groups.wait_connected(0)
                late = asyncio.create_task(groups.generate(wanted[7], seed=7, max_tokens=60))
                await groups.wait_open(8)
            groups.start_worker(0)
            await groups.wait_connected(1)
        assert tokens_of([*await running, await late]) == expected
        assert_left_quietly(groups, 3)


async def test_a_group_drains_until_the_last_steps_of_its_worker_are_answered(said_alone: list[list[int]]) -> None:
    flags = ("--sim-step-ms=5000", "--shutdown-grace-s=100")
    async with WorkerGroups(1, worker_flags=flags).running() as groups:
        running = asyncio.create_task(groups.generate(PROMPTS[0], seed=0, max_tokens=20))
        await groups.wait_for(lambda: groups.metric("stepwire_steps_in_flight") == 2)
        worker = groups.processes["worker 0"]
        worker.send_signal(signal.SIGTERM)
        await groups.wait_for(lambda: "worker leaves" in groups.log_of("control_plane"))
        with standing_still([worker]):
            assert groups.metric("stepwire_group_draining") == 1 == groups.metric("stepwire_worker_connected")
            late = asyncio.create_task(groups.generate(PROMPTS[1], seed=1, max_tokens=20))
            await groups.wait_open(2)  # accepted: there is going to be another worker
        await groups.wait_connected(0)
        assert worker.wait(STOP_LIMIT_S) == 0
        assert groups.metric("stepwire_group_draining") == 0
        assert groups.metric(GENERATED) == 2, "what was sent was computed, and no more"
        groups.start_worker(0, "--sim-step-ms=0")
        assert tokens_of([await running, await late]) == [tokens[:20] for tokens in said_alone[:2]]
        assert_left_quietly(groups, 1)


async def test_groups_join_drain_and_leave_while_streams_run(said_alone: list[list[int]]) -> None:
    wanted, expected = PROMPTS[:8], said_alone
    async with WorkerGroups(1, worker_flags=SLOW_STEPS).running() as groups:
        admin = groups.admin
        groups.start_worker("new")
        await groups.wait_for(lambda: groups.is_listening("new"))
        running = asyncio.gather(*streams(groups, wanted, MAX_TOKENS))
        await groups.wait_for(lambda: groups.metric("stepwire_requests_running") == 8)
        with pytest.raises(grpc.aio.AioRpcError, match="no other group takes requests"):
            await admin.DrainGroup(admin_pb2.DrainGroupRequest(group=0))

        # A group joins; what comes from now on is shared.
        joined = await admin.AddGroup(admin_pb2.AddGroupRequest(worker=groups.address("new")))
        assert joined.group == 1
        second = asyncio.gather(*streams(groups, wanted[:2], MAX_TOKENS))
        await groups.wait_for(lambda: groups.metric("stepwire_requests_running", 1) == 2)

        # The first one drains: nothing new, and not in a hurry.
        drained = await admin.DrainGroup(admin_pb2.DrainGroupRequest(group=0, timeout=Duration(nanos=1)))
        assert not drained.is_drained
        listed = {entry.state.group: entry for entry in (await admin.ListGroups(admin_pb2.ListGroupsRequest())).groups}
        assert listed[0].state.is_draining and not listed[1].state.is_draining
        before = groups.metric("stepwire_prompt_tokens_total", 0)
        third = asyncio.gather(*streams(groups, wanted[:2], MAX_TOKENS))
        await groups.wait_for(lambda: groups.metric("stepwire_requests_running", 1) == 4)
        assert groups.metric("stepwire_prompt_tokens_total", 0) == before

        # It leaves before its streams have ended: they go on elsewhere.
        assert groups.metric("stepwire_requests_running", 0) == 8
        await admin.RemoveGroup(admin_pb2.RemoveGroupRequest(group=0, timeout=Duration()))
        assert tokens_of(await running) == expected[:8]
        assert tokens_of(await second) == expected[:2]
        assert tokens_of(await third) == expected[:2]
        listing = await admin.ListGroups(admin_pb2.ListGroupsRequest())
        assert [entry.state.group for entry in listing.groups] == [1]
        assert groups.metric("stepwire_worker_losses_total") == 0, "leaving is no loss"
        assert groups.metric("stepwire_worker_connected", 0) == 0 and groups.processes["worker 0"].poll() is None
        with pytest.raises(grpc.aio.AioRpcError, match="there is no group 0"):
            await admin.ResumeGroup(admin_pb2.ResumeGroupRequest(group=0))


@pytest.mark.slow
async def test_a_queue_is_shared_with_the_group_that_joins() -> None:
    async with WorkerGroups(1, worker_flags=(*SLOW_STEPS, "--sim-max-num-seqs=2")).running() as groups:
        groups.start_worker("new")
        await groups.wait_for(lambda: groups.is_listening("new"))
        running = asyncio.gather(*streams(groups, prompts(12), 100))
        await groups.wait_for(lambda: groups.metric("stepwire_requests_waiting") == 10)
        await groups.admin.AddGroup(admin_pb2.AddGroupRequest(worker=groups.address("new")))
        await groups.wait_for(lambda: groups.metric("stepwire_requests_running", 1) == 2)
        tokens_of(await running)
        assert groups.metric(GENERATED, 1) > 3 * 100
        # And given back by the one that drains.
        running = asyncio.gather(*streams(groups, prompts(12), 100))
        await groups.wait_for(lambda: groups.metric("stepwire_requests_waiting", 0) > 0)
        assert (await groups.admin.DrainGroup(admin_pb2.DrainGroupRequest(group=0))).is_drained
        assert groups.metric("stepwire_requests_waiting", 0) == 0
        await groups.admin.ResumeGroup(admin_pb2.ResumeGroupRequest(group=0))
        await groups.wait_for(lambda: groups.metric("stepwire_requests_running", 0) > 0)
        tokens_of(await running)


async def test_prompts_that_begin_alike_meet_in_one_cache(pair: WorkerGroups) -> None:
    """Two conversations of many turns: each stays where its history is, and the groups share them."""
    histories = prompts(2, length=640)
    names = ("stepwire_prefix_cache_queries_total", "stepwire_prefix_cache_hits_total")
    async with pair.clients() as groups:
        before = {(name, group): groups.metric(name, group) for name in names for group in (0, 1)}
        for turn in range(4):
            with groups.paused():  # until both are there: a group that has nothing to do takes the second one
                asking = [asyncio.create_task(groups.generate([*history, turn], seed=turn)) for history in histories]
                await groups.wait_open(2)
            answers = await asyncio.gather(*asking)
            assert [answer.num_cached_tokens for answer in answers] == ([640, 640] if turn else [0, 0])
        for group in (0, 1):
            queries, hits = (groups.metric(name, group) - before[name, group] for name in names)
            assert (queries, hits) == (4 * 641, 3 * 640), "half of the requests each, and every history found"


def model_that_cannot_load(directory: Path) -> Path:
    model = directory / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"architectures": ["NoSuchArchitecture"]}))
    return model


async def test_a_worker_that_does_not_fit_is_refused_by_name(pair: WorkerGroups) -> None:
    async with pair.clients() as groups:
        groups.start_worker("other", "--sim-vocab-size=2000", "--sim-block-size=32")
        await groups.wait_for(lambda: groups.is_listening("other"))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await groups.admin.AddGroup(admin_pb2.AddGroupRequest(worker=groups.address("other")))
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        said = refused.value.details() or ""
        assert "vocab_size 2000 instead of 1000" in said and "block_size 32 instead of 16" in said
        for worker, reason in (
            (groups.address(0), "is the worker of a group already"),
            (groups.address("nobody"), "no answer"),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match=reason):
                await groups.admin.AddGroup(admin_pb2.AddGroupRequest(worker=worker, timeout=Duration(seconds=1)))
        # This one would have had ten minutes to load.
        groups.start_broken_worker("broken", model_that_cannot_load(groups.directory))
        await groups.wait_for(lambda: groups.is_listening("broken"))
        with pytest.raises(grpc.aio.AioRpcError, match="could not load its model") as broken:
            await groups.admin.AddGroup(
                admin_pb2.AddGroupRequest(worker=groups.address("broken"), timeout=Duration(seconds=600))
            )
        assert broken.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "NoSuchArchitecture" in (broken.value.details() or "")
        with pytest.raises(grpc.aio.AioRpcError) as malformed:
            await groups.admin.AddGroup(admin_pb2.AddGroupRequest(worker="nowhere"))
        assert malformed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        listing = await groups.admin.ListGroups(admin_pb2.ListGroupsRequest())
        assert [entry.state.group for entry in listing.groups] == [0, 1], "none of them was kept"
        assert len((await groups.generate([1, 2, 3])).token_ids) == 40


async def test_a_request_that_kills_every_worker_it_meets_ends_alone(said_alone: list[list[int]]) -> None:
    """The poison ends one group after another; then it is tried with nothing beside it, and the others finish."""
    wanted, expected = PROMPTS[:8], [tokens[:60] for tokens in said_alone[:8]]
    harmless = {token for tokens in (*wanted, *expected) for token in tokens}
    poison = max(set(range(4, VOCAB_SIZE)) - harmless)
    async with WorkerGroups(2, worker_flags=(*SLOW_STEPS, f"--sim-poison-token={poison}")).running() as groups:
        watching = asyncio.create_task(keep_alive(groups))
        running = asyncio.gather(*streams(groups, wanted, 60))
        await groups.wait_for(lambda: groups.metric(GENERATED) > 80)
        culprit = await groups.generate([1, 2, poison, 3], max_tokens=5)
        assert "the last time with nothing beside it" in culprit.error
        assert tokens_of(await running) == expected
        watching.cancel()
        assert groups.metric("stepwire_worker_losses_total") == 3


async def keep_alive(groups: WorkerGroups) -> None:
    """Start workers that died again, as a launcher does."""
    while True:
        for name in [name for name, process in groups.processes.items() if process.poll() is not None]:
            groups.start_worker(name.removeprefix("worker "))
        await asyncio.sleep(0.05)


async def test_watched_steps_name_their_group(pair: WorkerGroups) -> None:
    async with pair.clients() as groups:
        request = admin_pb2.WatchStepsRequest(interval=Duration(nanos=20_000_000), max_steps=4096)
        watch = groups.admin.WatchSteps(request)
        before = (await watch.read()).state.num_generated_tokens
        with groups.paused():  # until all of them are there
            running = asyncio.gather(*streams(groups, prompts(6), 50))
            await groups.wait_open(6)
        tokens_of(await running)
        seen: dict[int, list[int]] = {}
        is_told = False
        while not is_told:
            # What was written meanwhile comes first.
            response = await watch.read()
            is_told = response.state.num_generated_tokens == before + 300
            for step in response.steps:
                seen.setdefault(step.group, []).append(step.step_id)
        assert sorted(seen) == [0, 1]
        for step_ids in seen.values():
            assert step_ids == list(range(step_ids[0], step_ids[0] + len(step_ids))), "every step once, in order"
        state = response.state
        assert state.num_generated_tokens == sum(group.num_generated_tokens for group in state.groups)
        assert state.max_num_sequences == sum(group.max_num_sequences for group in state.groups)
        watch.cancel()
