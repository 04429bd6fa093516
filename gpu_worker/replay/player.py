"""Sends a recording's steps to a worker over a real RunSteps stream, and takes its results.

A step is sent when as many results have come as had when it was recorded, so that the same steps are in flight. Steps
that were never answered (their session or worker ended first) are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

import grpc
from stepwire.process.connections import MESSAGE_OPTIONS
from stepwire.v1 import worker_pb2, worker_pb2_grpc
from stepwire.v1.recording_pb2 import RecordingEntry

from gpu_worker.errors import LoadError
from gpu_worker.recording import read_recording
from gpu_worker.replay.comparison import Comparison


class ReplayError(LoadError):
    """The recording cannot be run through this worker. The message says what to set."""


@dataclass(slots=True)
class RecordedSession:
    """A session's entries after its hello."""

    hello: worker_pb2.SessionHello
    entries: list[RecordingEntry] = field(default_factory=list)
    num_answered: int = 0


def recorded_sessions(path: Path) -> Iterator[RecordedSession | worker_pb2.DescribeResponse]:
    """Sessions in order; the worker that ran those that follow before them. Holds one session in memory."""
    session: RecordedSession | None = None
    for entry in read_recording(path):
        kind = entry.WhichOneof("entry")
        if kind in ("header", "hello"):
            if session is not None:
                yield session
            session = RecordedSession(entry.hello) if kind == "hello" else None
            if kind == "header":
                yield entry.header.worker
        elif session is not None:
            session.entries.append(entry)
            session.num_answered += kind == "result"
    if session is not None:
        yield session


def check_worker(recorded: worker_pb2.DescribeResponse, ours: worker_pb2.DescribeResponse) -> None:
    """Raises `ReplayError` if steps that were made for one worker cannot run on the other."""
    for name, flag in (("block_size", "--block-size"), ("vocab_size", "--model")):
        wanted, have = getattr(recorded, name), getattr(ours, name)
        if wanted != have:
            raise ReplayError(f"the recording is of a worker with {name} {wanted}, this one has {have}: change {flag}")
    pool_flag = (
        "--cpu-kv-cache-gib" if ours.devices and ours.devices[0].startswith("cpu") else "--gpu-memory-utilization"
    )
    for name, flag in (
        ("num_blocks", pool_flag),
        ("max_model_len", "--max-model-len"),
        ("max_num_seqs", "--max-num-seqs"),
        ("max_num_batched_tokens", "--max-num-batched-tokens"),
    ):
        wanted, have = getattr(recorded, name), getattr(ours, name)
        if wanted > have:
            raise ReplayError(f"the recording needs {name} {wanted}, this worker has {have}: raise {flag}")
    if list(recorded.buckets) != list(ours.buckets):
        raise ReplayError("the recording's steps are padded to other buckets than this worker's")


def play(path: Path, address: str) -> Comparison:
    """Run all sessions, or up to the first step whose tokens differ.

    Raises:
        ReplayError: the worker does not fit, or ended a session.
        RecordingError: the file is damaged.
    """
    comparison = Comparison()
    with grpc.insecure_channel(address, options=MESSAGE_OPTIONS) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        ours = stub.Describe(worker_pb2.DescribeRequest())
        for item in recorded_sessions(path):
            if isinstance(item, worker_pb2.DescribeResponse):
                check_worker(item, ours)
            elif not _play_session(item, stub, comparison):
                break
    return comparison


def _play_session(session: RecordedSession, stub: worker_pb2_grpc.WorkerServiceStub, comparison: Comparison) -> bool:
    comparison.begin_session()
    outbox: SimpleQueue[worker_pb2.RunStepsRequest | None] = SimpleQueue()
    call = stub.RunSteps(iter(outbox.get, None))
    outbox.put(worker_pb2.RunStepsRequest(hello=session.hello))
    try:
        next(call)
        for entry in session.entries:
            kind = entry.WhichOneof("entry")
            if kind == "step" and entry.step.step_id <= session.num_answered:
                comparison.note_step(entry.step)
                outbox.put(worker_pb2.RunStepsRequest(step=entry.step))
            elif kind == "mask" and entry.mask.step_id <= session.num_answered:
                outbox.put(worker_pb2.RunStepsRequest(mask=entry.mask))
            elif kind == "result" and not comparison.compare(entry.result, next(call).result):
                return False
        outbox.put(None)
        for _ in call:
            pass
    except grpc.RpcError as error:
        raise ReplayError(f"the worker ended session {comparison.num_sessions}: {error.details()}") from error
    finally:
        outbox.put(None)
        call.cancel()
    return True
