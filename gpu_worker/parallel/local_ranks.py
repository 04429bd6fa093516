"""The ranks of this node that another process of it has started: commands down a pipe, events up, and their ends."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

import structlog
from stepwire.v1 import group_pb2

from gpu_worker.parallel.frames import Channel, ChannelClosed

log = structlog.get_logger(__name__)

RANK_MODULE = "gpu_worker.parallel.rank_process"
# What a rank whose pipe is closed may take to be gone.
_END_LIMIT_S = 5.0


class LocalRanks:
    """Starts ranks and watches over them. `on_event` is called on threads of its own, one a rank.

    A rank that ends is an event as well: a failure, unless `close` was called before.
    """

    def __init__(self, on_event: Callable[[group_pb2.RankEvent], None]) -> None:
        self._on_event = on_event
        self._processes: list[subprocess.Popen[bytes]] = []
        self._channels: list[Channel] = []
        self._is_closing = False

    def start(self, places: Sequence[group_pb2.RankPlace]) -> None:
        for place in places:
            ours, theirs = socket.socketpair()
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-m", RANK_MODULE, str(theirs.fileno())],
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    # Ctrl-C reaches the process that a person started, which ends the group.
                    start_new_session=True,
                )
            channel = Channel(ours)
            self._processes.append(process)
            self._channels.append(channel)
            threading.Thread(
                target=self._watch, args=(place.rank, process, channel), name=f"rank {place.rank}", daemon=True
            ).start()
            log.info("rank started", rank=place.rank, pid=process.pid)
            self._send(channel, group_pb2.RankCommand(place=place).SerializeToString())

    def send(self, command: bytes) -> None:
        """To every rank, in order. One that is gone is noticed by whoever watches it."""
        for channel in self._channels:
            self._send(channel, command)

    @staticmethod
    def _send(channel: Channel, command: bytes) -> None:
        try:
            channel.send(command)
        except ChannelClosed as error:
            log.debug("a rank's pipe is closed", reason=str(error))

    def close(self, grace_s: float) -> None:
        """Let the ranks end, and see to it that they do."""
        self._is_closing = True
        self.send(group_pb2.RankCommand(close=group_pb2.Empty()).SerializeToString())
        deadline = time.monotonic() + grace_s
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for channel in self._channels:
            channel.close()

    def kill(self) -> None:
        """At once."""
        self._is_closing = True
        for process in self._processes:
            process.kill()

    def _watch(self, rank: int, process: subprocess.Popen[bytes], channel: Channel) -> None:
        try:
            while True:
                self._on_event(channel.receive(group_pb2.RankEvent))
        except ChannelClosed:
            pass
        try:
            code = process.wait(_END_LIMIT_S)
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            process.kill()
            how = "its pipe closed"
        if not self._is_closing:
            failure = group_pb2.RankFailure(message=f"its process {process.pid} ended ({how})")
            self._on_event(group_pb2.RankEvent(rank=rank, failure=failure))
