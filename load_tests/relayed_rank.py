"""A rank that computes nothing: it takes commands as `gpu_worker.parallel.rank_process` does and notes when each step
came. Started in its place by `load_tests.relay_skew`; its place's settings name the folder for what it noted.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from pathlib import Path
from queue import SimpleQueue

import numpy as np
from stepwire.process.parent import end_with_parent
from stepwire.v1 import group_pb2

from gpu_worker.parallel.frames import Channel, ChannelClosed


def main(argv: list[str]) -> int:
    end_with_parent(9)
    channel = Channel(socket.socket(fileno=int(argv[0])))
    place = channel.receive(group_pb2.RankCommand).place
    commands: SimpleQueue[group_pb2.RankCommand | None] = SimpleQueue()
    threading.Thread(target=_read, args=(channel, commands), daemon=True).start()
    channel.send(group_pb2.RankEvent(rank=place.rank, started=group_pb2.Empty()).SerializeToString())
    arrivals: dict[int, int] = {}
    while (command := commands.get()) is not None and command.WhichOneof("command") != "close":
        if command.WhichOneof("command") == "step":
            arrivals[command.step.step_id] = time.monotonic_ns()
    pairs = np.array(sorted(arrivals.items()), dtype=np.int64)
    np.save(Path(json.loads(place.settings)["arrivals"]) / f"{place.rank}.npy", pairs)
    return 0


def _read(channel: Channel, commands: SimpleQueue[group_pb2.RankCommand | None]) -> None:
    try:
        while True:
            commands.put(channel.receive(group_pb2.RankCommand))
    except ChannelClosed:
        commands.put(None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
