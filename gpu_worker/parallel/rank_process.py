"""`python -m gpu_worker.parallel.rank_process FD`: a rank other than 0, started by its node's worker or relay.

Everything it is and does comes over the pipe FD: its place, then steps in the order of rank 0. When the pipe closes the
process ends, whatever it waits for.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

import structlog
from stepwire.process.logs import set_up_logging
from stepwire.process.parent import end_with_parent
from stepwire.v1 import group_pb2, worker_pb2

from gpu_worker.config import WorkerSettings
from gpu_worker.errors import LoadError
from gpu_worker.parallel.frames import Channel, ChannelClosed
from gpu_worker.parallel.places import read_place
from gpu_worker.parallel.rank_loading import load_rank_runner
from gpu_worker.runner_api import DescribesPrompts, PendingStep, Runner, SessionEnded, StepError, TokenMask, UsesPauses
from gpu_worker.step_codec import decode_mask, decode_step, encode_described

log = structlog.get_logger(__name__)

# Launched steps whose results nobody reads; the oldest is waited for, so that what went wrong on a device shows.
_MAX_UNREAD = 8


class RankFollower:
    """Executes commands as they come."""

    def __init__(
        self,
        runner: Runner,
        commands: SimpleQueue[group_pb2.RankCommand],
        describe: Callable[[worker_pb2.StepResult], None] | None = None,
    ) -> None:
        self._runner, self._commands, self._describe = runner, commands, describe
        self._facts = runner.describe()
        self._unread: deque[PendingStep] = deque()

    def run(self) -> None:
        """Until `close`."""
        while (kind := (command := self._commands.get()).WhichOneof("command")) != "close":
            if kind == "step":
                self._execute(command)
            elif kind == "reset":
                self._read_results(0)
                self._runner.reset()
            elif kind == "pause" and isinstance(self._runner, UsesPauses):
                self._read_results(0)
                self._runner.idle()
        self._runner.close()

    def _execute(self, command: group_pb2.RankCommand) -> None:
        batch = decode_step(command.step, self._facts)

        def wait_for_mask() -> TokenMask:
            answer = self._commands.get()
            if answer.WhichOneof("command") != "mask":
                raise SessionEnded("the session ended before the mask came")
            return decode_mask(answer.mask, batch.mask_rows, self._facts.vocab_size)

        try:
            self._unread.append(self._runner.execute(batch, wait_for_mask))
        except (StepError, SessionEnded) as error:
            log.debug("step refused", step_id=batch.step_id, reason=str(error))
            return
        pending = self._unread[-1]
        # Rank 0 waits for what this step tells of prompts.
        is_awaited = self._describe is not None and isinstance(pending, DescribesPrompts) and pending.describes_prompts
        self._read_results(0 if is_awaited else _MAX_UNREAD)

    def _read_results(self, num_left: int) -> None:
        while len(self._unread) > num_left:
            pending = self._unread.popleft()
            result = pending.result()
            if self._describe is not None and isinstance(pending, DescribesPrompts) and pending.describes_prompts:
                self._describe(encode_described(result))


def main(argv: list[str]) -> int:
    # The process that started this one decides when it ends, also where a signal is for all of a service's processes.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # There is nothing to finish, and a rank that hangs or is stopped would not see its pipe close.
    end_with_parent(signal.SIGKILL)
    channel = Channel(socket.socket(fileno=int(argv[0])))
    try:
        place = channel.receive(group_pb2.RankCommand).place
    except ChannelClosed:
        return 1
    settings = WorkerSettings(**json.loads(place.settings))
    set_up_logging(settings)
    structlog.contextvars.bind_contextvars(rank=place.rank)
    commands: SimpleQueue[group_pb2.RankCommand] = SimpleQueue()
    threading.Thread(target=_read, args=(channel, commands), name="commands", daemon=True).start()
    channel.send(group_pb2.RankEvent(rank=place.rank, started=group_pb2.Empty()).SerializeToString())
    log.info("this rank waits for the others")
    if commands.get().WhichOneof("command") != "form":
        return 0
    try:
        runner, ready = load_rank_runner(settings, read_place(place))
    except (LoadError, ValueError, OSError) as error:
        log.debug("loading failed", exc_info=True)
        return _report(channel, group_pb2.RankEvent(rank=place.rank, failure=group_pb2.RankFailure(message=str(error))))
    except Exception as error:
        return _report(channel, _felt(place.rank, f"{type(error).__name__}: {error}"))
    channel.send(group_pb2.RankEvent(rank=place.rank, ready=ready).SerializeToString())
    try:
        RankFollower(runner, commands, _describe_to(channel, place)).run()
    except Exception as error:
        return _report(channel, _felt(place.rank, f"a step failed: {type(error).__name__}: {error}"))
    return 0


def _describe_to(channel: Channel, place: group_pb2.RankPlace) -> Callable[[worker_pb2.StepResult], None] | None:
    """How rank 0 is told of prompts, on the one rank that does so."""
    first_of_last = (len(place.stage_layers) - 1) * place.tensor_parallel_size
    if place.rank != first_of_last:
        return None

    def describe(result: worker_pb2.StepResult) -> None:
        channel.send(group_pb2.RankEvent(rank=place.rank, described=result).SerializeToString())

    return describe


def _read(channel: Channel, commands: SimpleQueue[group_pb2.RankCommand]) -> None:
    is_closing = False
    try:
        while True:
            command = channel.receive(group_pb2.RankCommand)
            is_closing = command.WhichOneof("command") == "close"
            commands.put(command)
    except ChannelClosed:
        if not is_closing:
            # The main thread may be in a collective that never ends.
            os._exit(1)


def _felt(rank: int, message: str) -> group_pb2.RankEvent:
    """The exception being handled. Most often another rank has gone and this one felt it in a collective: rank 0 knows,
    and whether anybody wants to see where in the code that was."""
    log.warning("this rank ends", reason=message)
    failure = group_pb2.RankFailure(message=message, is_consequence=True, trace=traceback.format_exc())
    return group_pb2.RankEvent(rank=rank, failure=failure)


def _report(channel: Channel, event: group_pb2.RankEvent) -> int:
    with contextlib.suppress(ChannelClosed):
        channel.send(event.SerializeToString())
    if event.failure.is_consequence:
        # Whoever really failed is to be seen first: until then the pipe stays open.
        threading.Event().wait(10.0)
    return 1


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stderr.flush()
    # Not through the interpreter's end: threads of torch may wait for ranks that are gone.
    os._exit(code)
