"""Streams whose every read is kept with its time, in one process or dealt out among several.

A process that reads a token a time pays about 8 us for each, as much as the gateway that writes it: beyond 100,000
tokens/s one process would be what is measured. Clocks are CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
import uvloop

from load_tests.stamping_worker import delays_ms, stamps_in


class TimedStream(asyncio.Protocol):
    """One stream: whatever comes is kept with its time, and read after the window."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.received: list[tuple[int, bytes]] = []
        self.ended = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        transport.write(self._request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self.received.append((time.monotonic_ns(), data))
        if data.endswith(b"[DONE]\n\n\r\n0\r\n\r\n") or data == b"0\r\n\r\n":
            self.ended.set()

    def connection_lost(self, error: Exception | None) -> None:
        self.ended.set()


def chat_request(port: int, content: str, max_tokens: int) -> bytes:
    messages = [{"role": "user", "content": content}]
    body = json.dumps({"messages": messages, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


@dataclass(frozen=True)
class Received:
    """What came within a window."""

    delays_ms: np.ndarray
    """Of each token, from when it was made."""
    num_reads: int


class StreamReaders:
    """Processes that each hold a share of the streams open, all of which have begun."""

    def __init__(self, pids: list[int], pipes: list[Connection]) -> None:
        self.pids = pids
        self._pipes = pipes

    def received(self, begin_ns: int, end_ns: int) -> Received:
        """Between two times that have passed; ends the streams."""
        for pipe in self._pipes:
            pipe.send((begin_ns, end_ns))
        shares: list[Received] = [pipe.recv() for pipe in self._pipes]
        delays = np.concatenate([share.delays_ms for share in shares])
        return Received(delays, sum(share.num_reads for share in shares))


@contextmanager
def open_streams(port: int, request: bytes, num_streams: int, num_processes: int) -> Iterator[StreamReaders]:
    """Until each stream has sent its head and an event; ends the processes."""
    spawn = multiprocessing.get_context("spawn")
    processes, pipes = [], []
    try:
        for share in range(num_processes):
            ours, theirs = spawn.Pipe()
            num_own = num_streams // num_processes + (share < num_streams % num_processes)
            process = spawn.Process(target=_read, args=(theirs, port, request, num_own), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        for pipe in pipes:
            pipe.recv()
        yield StreamReaders([process.pid for process in processes if process.pid is not None], pipes)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _read(pipe: Connection, port: int, request: bytes, num_streams: int) -> None:
    uvloop.run(_read_streams(pipe, port, request, num_streams))


async def _read_streams(pipe: Connection, port: int, request: bytes, num_streams: int) -> None:
    loop = asyncio.get_running_loop()
    streams = [TimedStream(request) for _ in range(num_streams)]
    for stream in streams:
        await loop.create_connection(lambda stream=stream: stream, "127.0.0.1", port)  # type: ignore[misc]
    while not all(len(stream.received) > 1 for stream in streams):
        await asyncio.sleep(0.05)
    pipe.send("all have begun")
    begin_ns, end_ns = await asyncio.to_thread(pipe.recv)
    for stream in streams:
        stream.transport.abort()  # type: ignore[attr-defined]
    within = [(at_ns, data) for stream in streams for at_ns, data in stream.received if begin_ns <= at_ns < end_ns]
    delays = [delay for at_ns, data in within for delay in delays_ms(at_ns, stamps_in(data))]
    pipe.send(Received(np.array(delays), len(within)))
