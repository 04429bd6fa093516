"""The server with a scripted runner, in a process of its own, over a unix socket."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from stepwire.v1 import worker_pb2

from gpu_worker.runner_api import StepBatch, TokenMask
from gpu_worker.session import MAX_UNANSWERED_STEPS
from tests.system.worker_process import WorkerClient, WorkerProcess
from tests.unit.gpu_worker import scripted_worker as script
from tests.unit.gpu_worker.step_builder import Run, step, uint32


def start(folder: Path, *flags: str) -> WorkerProcess:
    options = ["--runner=simulated", "--log-format=json", f"--listen=unix:{folder}/w.sock", *flags]
    worker = WorkerProcess(options, module="tests.unit.gpu_worker.scripted_worker")
    worker.wait_for_event("worker ready")
    return worker


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[WorkerProcess]:
    """One for this test alone, which may end it."""
    with start(tmp_path) as process:
        yield process


@pytest.fixture
def client(worker: WorkerProcess, tmp_path: Path) -> Iterator[WorkerClient]:
    with WorkerClient(f"unix:{tmp_path}/w.sock") as client:
        yield client


@pytest.fixture(scope="module")
def lasting_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[WorkerProcess, str]]:
    folder = tmp_path_factory.mktemp("lasting")
    with start(folder, "--log-level=debug") as process:
        yield process, f"unix:{folder}/w.sock"


@pytest.fixture
def shared(lasting_worker: tuple[WorkerProcess, str]) -> Iterator[WorkerProcess]:
    """One that outlives the test, which leaves no session behind."""
    worker, _ = lasting_worker
    worker.forget_events()
    yield worker
    assert worker.process.poll() is None


@pytest.fixture
def visitor(shared: WorkerProcess, lasting_worker: tuple[WorkerProcess, str]) -> Iterator[WorkerClient]:
    """A client of the shared worker."""
    with WorkerClient(lasting_worker[1]) as client:
        yield client


def ordered(step_id: int, order: int = 0, mask_rows: tuple[int, ...] = ()) -> StepBatch:
    return step(step_id, [Run(0, 0, new_blocks=[order] if order else [])], mask_rows=mask_rows)


def runner_events(worker: WorkerProcess) -> list[str]:
    """What the runner was asked to do; to be read after the process has ended."""
    entries = [json.loads(line) for line in worker.lines if line.startswith("{")]
    return [entry["event"] for entry in entries if entry["logger"] == "runner"]


def end(worker: WorkerProcess) -> int:
    worker.send_signal(signal.SIGTERM)
    return worker.wait_for_exit()


def test_steps_run_on_the_main_thread_and_complete_on_another(worker: WorkerProcess, client: WorkerClient) -> None:
    session = client.start()
    for step_id in (1, 2, 3):
        session.step(ordered(step_id))
    assert [session.result().step_id for _ in range(3)] == [1, 2, 3]
    assert end(worker) == 0
    threads = {
        entry["event"].split()[0]: entry["thread"] for entry in map(json.loads, worker.lines) if "thread" in entry
    }
    assert threads == {"reset": "MainThread", "execute": "MainThread", "result": "completion", "close": "MainThread"}


def test_a_step_is_launched_while_the_one_before_runs(shared: WorkerProcess, visitor: WorkerClient) -> None:
    session = visitor.start()
    session.step(ordered(1, script.UNTIL_NEXT))
    session.step(ordered(2))
    assert [session.result().step_id, session.result().step_id] == [1, 2]
    # Step 1 had its result only because step 2 was executed in the meantime.
    assert shared.wait_for_event("result 1")["in_time"] is True


def test_waiting_in_the_queue_is_measured(shared: WorkerProcess, visitor: WorkerClient) -> None:
    session = visitor.start()
    session.step(ordered(1, mask_rows=(0,)))  # holds the main thread until its mask comes
    session.step(ordered(2))
    for _ in range(2):
        shared.wait_for_event("step queued", then_forget=True)
    time.sleep(0.3)
    session.mask(1, TokenMask(rows=uint32([0]), bitmask=np.array([[1, 2]], dtype=np.uint32)))
    first, second = session.receive().result, session.receive().result
    assert second.timings.queue_ns > 300_000_000 and first.timings.queue_ns > 0


def test_a_new_session_ends_the_old_one_and_its_steps(worker: WorkerProcess, client: WorkerClient) -> None:
    old = client.start("old")
    old.step(ordered(1, mask_rows=(0,)))  # waits on the main thread, and the rest in the queue
    for step_id in (2, 3, 4):
        old.step(ordered(step_id))
    worker.wait_for_event("execute 1")
    new = client.start("new")
    assert old.end() == (grpc.StatusCode.ABORTED, "session new has taken the place of this one")
    new.step(ordered(1))
    assert new.result().step_id == 1
    assert end(worker) == 0
    assert runner_events(worker) == ["reset", "execute 1", "reset", "execute 1", "result 1", "close"]


def test_a_launched_step_retires_before_the_reset(worker: WorkerProcess, client: WorkerClient) -> None:
    old = client.start("old")
    old.step(ordered(1, script.LATE_RESULT))
    worker.wait_for_event("execute 1")
    client.start("new")
    assert old.end()[0] == grpc.StatusCode.ABORTED
    assert end(worker) == 0
    assert runner_events(worker) == ["reset", "execute 1", "result 1", "reset", "close"]


def test_a_client_that_vanishes_frees_a_step_that_waits_for_a_mask(
    shared: WorkerProcess, visitor: WorkerClient
) -> None:
    old = visitor.start("old")
    old.step(ordered(1, mask_rows=(0,)))
    shared.wait_for_event("execute 1")
    old.call.cancel()
    new = visitor.start("new")
    new.step(ordered(1))
    assert new.result().step_id == 1


def test_masks_reach_their_step_early_or_late(shared: WorkerProcess, visitor: WorkerClient) -> None:
    session = visitor.start()
    late = TokenMask(rows=uint32([0]), bitmask=np.array([[1, 2]], dtype=np.uint32))
    early = TokenMask(rows=uint32([0]), bitmask=np.array([[3, 4]], dtype=np.uint32))
    session.step(ordered(1, mask_rows=(0,)))
    shared.wait_for_event("execute 1")
    # Step 2 and its mask are there before step 1 has got its own.
    session.step(ordered(2, mask_rows=(0,)))
    session.mask(2, early)
    session.mask(1, late)
    assert [session.result().step_id, session.result().step_id] == [1, 2]
    assert shared.wait_for_event("mask 1")["words"] == [[1, 2]]
    assert shared.wait_for_event("mask 2")["words"] == [[3, 4]]
    session.mask(2, early)
    code, message = session.end()
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "TokenMask for step 2, which does not wait for one" in message


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([ordered(2)], "step_id is 2, and 1 is the next: step ids are contiguous"),
        ([ordered(1), ordered(1)], "step_id is 1, and 2 is the next"),
        ([ordered(1), ordered(3)], "step_id is 3, and 2 is the next"),
        ([step(1, [Run(999, 0)])], r"step 1: run_rows[0] is 999: rows are below max_num_seqs 256"),
    ],
)
def test_a_bad_step_ends_the_session_but_not_the_worker(
    shared: WorkerProcess, visitor: WorkerClient, batches: list[StepBatch], message: str
) -> None:
    session = visitor.start()
    for batch in batches:
        session.step(batch)
    code, details = session.end()
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert message in details
    again = visitor.start()
    again.step(ordered(1))
    assert again.result().step_id == 1


def test_a_step_that_the_runner_refuses_ends_the_session_at_once(worker: WorkerProcess, client: WorkerClient) -> None:
    session = client.start()
    session.step(ordered(1, script.REFUSE))
    session.step(ordered(2))
    assert session.end() == (grpc.StatusCode.INVALID_ARGUMENT, "step 1: not such a step")
    again = client.start()
    again.step(ordered(1))
    assert again.result().step_id == 1
    assert end(worker) == 0
    assert "execute 2" not in runner_events(worker)


def test_a_runner_may_end_the_session(shared: WorkerProcess, visitor: WorkerClient) -> None:
    session = visitor.start()
    session.step(ordered(1, script.END_SESSION))
    assert session.end() == (grpc.StatusCode.UNAVAILABLE, "step 1: enough for today")
    visitor.start()


def test_too_many_unanswered_steps(shared: WorkerProcess, visitor: WorkerClient) -> None:
    session = visitor.start()
    session.step(ordered(1, mask_rows=(0,)))
    for step_id in range(2, MAX_UNANSWERED_STEPS + 2):
        session.step(ordered(step_id))
    code, message = session.end()
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert f"comes while {MAX_UNANSWERED_STEPS} steps are unanswered" in message


def test_the_hello_is_checked(shared: WorkerProcess, visitor: WorkerClient) -> None:
    code, message = visitor.open(protocol_version=2).end()
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "speaks version 2 of the worker contract and this worker version 1" in message
    assert visitor.open("").end() == (grpc.StatusCode.INVALID_ARGUMENT, "hello.session_id is empty")
    replaced = visitor.open("replaced")
    # Streams have no order among one another: its hello could come after those of the others, and end them.
    shared.wait_for_event("session begins")
    first = visitor.start("first")
    for request, text in (
        (worker_pb2.RunStepsRequest(hello=worker_pb2.SessionHello(session_id="x")), "a second hello"),
        (worker_pb2.RunStepsRequest(), "neither hello, step nor mask"),
    ):
        session = visitor.start("again")
        session.send(request)
        code, message = session.end()
        assert code == grpc.StatusCode.INVALID_ARGUMENT and text in message
    assert first.end()[0] == replaced.end()[0] == grpc.StatusCode.ABORTED


def test_a_stream_must_begin_with_a_hello(shared: WorkerProcess, visitor: WorkerClient) -> None:
    current = visitor.start("current")
    batch = worker_pb2.RunStepsRequest(step=worker_pb2.StepBatch(step_id=1))
    call = visitor.stub.RunSteps(iter([batch]), timeout=120)
    with pytest.raises(grpc.RpcError):
        list(call)
    assert call.code() == grpc.StatusCode.INVALID_ARGUMENT
    # A stream that never became a session takes nobody's place.
    current.step(ordered(1))
    assert current.result().step_id == 1


def test_a_half_closed_stream_gets_its_results_first(shared: WorkerProcess, visitor: WorkerClient) -> None:
    session = visitor.start()
    session.step(ordered(1, script.SLOW_EXECUTE))
    session.step(ordered(2))
    session.half_close()
    assert [session.result().step_id, session.result().step_id] == [1, 2]
    assert session.end() == (grpc.StatusCode.OK, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_queued_steps_finish(tmp_path: Path, number: signal.Signals) -> None:
    with start(tmp_path, "--log-level=debug") as worker, WorkerClient(f"unix:{tmp_path}/w.sock") as client:
        session = client.start()
        for step_id, mask_rows in ((1, ()), (2, (0,)), (3, ())):
            session.step(ordered(step_id, mask_rows=mask_rows))
        for _ in range(3):
            worker.wait_for_event("step queued", then_forget=True)
        worker.send_signal(number)
        worker.wait_for_event("shutting down")
        mask = TokenMask(rows=uint32([0]), bitmask=np.array([[1, 2]], dtype=np.uint32))
        session.step(ordered(4, mask_rows=(0,)))  # too late, and so is its mask
        session.mask(4, mask)
        session.mask(2, mask)
        assert [session.result().step_id for _ in range(3)] == [1, 2, 3]
        code, message = session.end()
        assert code == grpc.StatusCode.UNAVAILABLE
        assert f"the worker got {number.name} and is shutting down" in message
        assert worker.wait_for_exit() == 0
        assert runner_events(worker)[-1] == "close" and "execute 4" not in runner_events(worker)


def test_a_control_plane_that_understands_is_told_and_closes_the_stream(tmp_path: Path) -> None:
    with start(tmp_path, "--shutdown-grace-s=100") as worker, WorkerClient(f"unix:{tmp_path}/w.sock") as client:
        session = client.start(understands_leaving=True)
        session.step(ordered(1, mask_rows=(0,)))
        worker.wait_for_event("execute 1")
        worker.send_signal(signal.SIGTERM)
        leaving = session.receive().leaving
        assert leaving.reason == "the worker got SIGTERM and is shutting down" and leaving.serves_for_ns == 10**11
        # It was on its way when the worker spoke: it is answered like any other.
        session.step(ordered(2))
        session.mask(1, TokenMask(rows=uint32([0]), bitmask=np.array([[1, 2]], dtype=np.uint32)))
        assert [session.result().step_id, session.result().step_id] == [1, 2]
        assert client.open("another").end() == (grpc.StatusCode.UNAVAILABLE, "the worker is shutting down")
        assert worker.process.poll() is None, "it waits for the control plane"
        session.call.cancel()
        assert worker.wait_for_exit() == 0
        assert runner_events(worker)[-2:] == ["result 2", "close"]


def test_a_session_that_has_not_begun_is_not_told(worker: WorkerProcess, client: WorkerClient) -> None:
    first = client.start("first", understands_leaving=True)
    first.step(ordered(1, script.LATE_RESULT))
    worker.wait_for_event("execute 1")
    second = client.open("second", understands_leaving=True)
    assert first.end()[0] == grpc.StatusCode.ABORTED
    worker.send_signal(signal.SIGTERM)
    assert second.end() == (grpc.StatusCode.UNAVAILABLE, "the worker got SIGTERM and is shutting down")
    assert worker.wait_for_exit() == 0


@pytest.mark.parametrize("understands_leaving", [False, True])
def test_a_signal_does_not_wait_for_ever(tmp_path: Path, understands_leaving: bool) -> None:
    with start(tmp_path, "--shutdown-grace-s=0.2") as worker, WorkerClient(f"unix:{tmp_path}/w.sock") as client:
        session = client.start(understands_leaving=understands_leaving)
        session.step(ordered(1, mask_rows=(0,)))  # its mask never comes
        worker.wait_for_event("execute 1")
        worker.send_signal(signal.SIGTERM)
        assert session.end()[0] == grpc.StatusCode.UNAVAILABLE
        assert worker.wait_for_exit() == 0
        assert any("unanswered after shutdown_grace_s" in line for line in worker.lines)


@pytest.mark.parametrize(
    ("order", "error"), [(script.FAIL_EXECUTE, "a kernel failed"), (script.FAIL_RESULT, "the device is lost")]
)
def test_a_failing_runner_ends_the_process(worker: WorkerProcess, client: WorkerClient, order: int, error: str) -> None:
    session = client.start("broken")
    session.step(ordered(1))
    assert session.result().step_id == 1
    session.step(ordered(2, order))
    code, message = session.end()
    assert code == grpc.StatusCode.INTERNAL
    assert message == f"the worker failed in step 2 of session broken and ends: {error}"
    assert worker.wait_for_exit() == 1
    failures = [json.loads(line) for line in worker.lines if '"error"' in line]
    assert [failure["level"] for failure in failures] == ["error"]
    assert failures[0]["event"].startswith("step 2 of session broken failed: this worker ends")
    assert "ZeroDivisionError" in failures[0]["exception"]


def test_a_step_that_is_given_up_is_not_answered(worker: WorkerProcess, client: WorkerClient) -> None:
    session = client.start("broken")
    session.step(ordered(1))
    assert session.result().step_id == 1
    session.step(ordered(2, script.LOSE_A_PART))
    # Its result comes before the stream ends, and says nothing that could be believed.
    code, message = session.end()
    assert code == grpc.StatusCode.INTERNAL and message.startswith("the worker failed in the group")
    assert worker.wait_for_exit() == 1
    events = [json.loads(line)["event"] for line in worker.lines if line.startswith("{")]
    assert "abandon" in events and "result 2" in events
    assert not [event for event in events if "did not end by itself" in event]


def test_a_failing_reset_ends_the_process(worker: WorkerProcess, client: WorkerClient) -> None:
    session = client.start("first")
    session.step(ordered(1, script.FAIL_RESET))
    assert session.result().step_id == 1
    code, message = client.open("second").end()
    assert code == grpc.StatusCode.INTERNAL and "the reset for session second" in message
    assert worker.wait_for_exit() == 1


def test_a_worker_that_loads_says_so(tmp_path: Path) -> None:
    flags = ["--runner=simulated", "--log-format=json", f"--listen=unix:{tmp_path}/w.sock", "--seed=1"]
    with (
        WorkerProcess(flags, module="tests.unit.gpu_worker.scripted_worker") as worker,
        WorkerClient(f"unix:{tmp_path}/w.sock") as client,
    ):
        worker.wait_for_event("loading")
        assert client.health() == client.health("stepwire.v1.WorkerService") == "NOT_SERVING"
        loading = (grpc.StatusCode.UNAVAILABLE, "the worker is still loading its model")
        with pytest.raises(grpc.RpcError) as caught:
            client.describe()
        assert (caught.value.code(), caught.value.details()) == loading  # type: ignore[attr-defined]
        assert client.open().end() == loading
        (tmp_path / "loaded").touch()
        worker.wait_for_event("worker ready")
        assert client.health() == "SERVING" and client.describe().vocab_size == 64
        client.start()


def test_describe_and_health(shared: WorkerProcess, visitor: WorkerClient) -> None:
    described = visitor.describe()
    assert (described.model, described.vocab_size, described.first_block_id) == ("simulated", 64, 1)
    assert described.version and len(described.instance_id) == 32
    session = visitor.open("s")
    assert session.receive().ready == worker_pb2.SessionReady(session_id="s", instance_id=described.instance_id)
    assert visitor.health() == visitor.health("stepwire.v1.WorkerService") == "SERVING"
    with pytest.raises(grpc.RpcError) as caught:
        visitor.health("nothing")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]
