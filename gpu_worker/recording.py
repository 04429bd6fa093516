"""A file of everything that a worker was sent and answered (`recording.proto`): written beside the steps, read back.

Needs no torch. The writer never holds up a step: messages go into a bounded queue and a thread of its own serializes
and writes them. If that thread cannot keep up, or the disk is full, the recording ends there and says so; the file up
to then stays whole.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import BinaryIO

import structlog
from google.protobuf.message import DecodeError
from stepwire.v1 import worker_pb2
from stepwire.v1.recording_pb2 import RecordingEntry, RecordingHeader

from gpu_worker.errors import LoadError

logger = structlog.get_logger(__name__)

FORMAT_VERSION = 1
# What may wait to be written. A step of 256 decodes has 5 KB.
MAX_WAITING_BYTES = 256 << 20
# Written and not yet given to the system, at most so long.
FLUSH_INTERVAL_S = 0.5
_MAX_ENTRY_BYTES = 1 << 31
_MAX_VARINT_BYTES = 5


class RecordingError(LoadError):
    """A file that is no recording, or cannot be written. The message says what to do."""


class Recorder:
    """Appends to `path`; `model` and `flags` as in `RecordingHeader`.

    All methods but the constructor may be called on any thread, in the order to be kept.

    Raises:
        RecordingError: the file holds something else, or cannot be written.
    """

    def __init__(
        self, path: Path, *, model: str = "", flags: Sequence[str] = (), max_waiting_bytes: int = MAX_WAITING_BYTES
    ) -> None:
        self._path, self._model, self._flags = path, model, flags
        self._max_waiting_bytes = max_waiting_bytes
        self._file = _open_at_end(path)
        self._queue: SimpleQueue[tuple[RecordingEntry, int] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._waiting_bytes = 0
        self._is_over = False
        self._thread = threading.Thread(target=self._write_all, name="recorder", daemon=True)
        self._thread.start()

    def begin(self, worker: worker_pb2.DescribeResponse) -> None:
        """Write the header: comes before everything else."""
        header = RecordingHeader(
            format_version=FORMAT_VERSION, model=self._model, worker=worker, flags=self._flags, began_at_s=time.time()
        )
        self._put(RecordingEntry(header=header))

    def hello(self, message: worker_pb2.SessionHello) -> None:
        self._put(RecordingEntry(hello=message))

    def step(self, message: worker_pb2.StepBatch) -> None:
        self._put(RecordingEntry(step=message))

    def mask(self, message: worker_pb2.TokenMask) -> None:
        self._put(RecordingEntry(mask=message))

    def result(self, message: worker_pb2.StepResult) -> None:
        self._put(RecordingEntry(result=message))

    def close(self, timeout_s: float = 3.0) -> None:
        """Write what waits and close the file."""
        with self._lock:
            self._is_over = True
        self._queue.put(None)
        self._thread.join(timeout_s)

    def _put(self, entry: RecordingEntry) -> None:
        size = entry.ByteSize()
        with self._lock:
            if self._is_over:
                return
            if self._waiting_bytes + size > self._max_waiting_bytes:
                # A gap would make all that follows worthless: sampled tokens live on in later steps.
                self._is_over = True
            else:
                self._waiting_bytes += size
                self._queue.put((entry, size))
                return
        logger.error(
            "the recording ends here: the disk is slower than the steps", file=str(self._path), waiting_bytes=size
        )

    def _write_all(self) -> None:
        flushed_s = time.monotonic()
        try:
            with self._file as file:
                while (item := self._queue.get()) is not None:
                    entry, size = item
                    write_entry(file, entry)
                    with self._lock:
                        self._waiting_bytes -= size
                    if self._queue.empty() or time.monotonic() - flushed_s > FLUSH_INTERVAL_S:
                        file.flush()
                        flushed_s = time.monotonic()
        except OSError as error:
            with self._lock:
                self._is_over = True
            logger.error("the recording ends here", file=str(self._path), reason=error.strerror)


def write_entry(file: BinaryIO, entry: RecordingEntry) -> None:
    data = entry.SerializeToString()
    file.write(_varint(len(data)) + data)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _open_at_end(path: Path) -> BinaryIO:
    """Positioned after the last whole entry: what a crash has cut off is written over."""
    try:
        file = path.open("r+b" if path.exists() else "x+b")
    except OSError as error:
        raise RecordingError(f"--record: cannot write {path}: {error.strerror}") from error
    end = 0
    try:
        for _ in _entries(file, path):
            end = file.tell()
    except RecordingError:
        file.close()
        raise
    file.seek(end)
    file.truncate()
    return file


def read_recording(path: Path) -> Iterator[RecordingEntry]:
    """The entries of a file, in order; a last one that a crash has cut off is left out, with a warning.

    Raises:
        RecordingError: not a recording, of another version, or damaged in the middle.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise RecordingError(f"cannot read {path}: {error.strerror}") from error
    with file:
        end = 0
        for entry in _entries(file, path):
            end = file.tell()
            yield entry
        size = path.stat().st_size
        if end == 0:
            raise RecordingError(f"{path} is empty: --record of a worker writes such a file")
        if end < size:
            logger.warning("the recording's end is cut off", file=str(path), bytes_left_out=size - end)


def _entries(file: BinaryIO, path: Path) -> Iterator[RecordingEntry]:
    """Entries up to the end or to one that is not whole."""
    is_first = True
    while (length := _read_varint(file, path)) is not None:
        data = file.read(length)
        if len(data) < length:
            # A file that is something else begins with a length that it does not have.
            if is_first:
                raise _not_a_recording(path)
            return
        try:
            entry = RecordingEntry.FromString(data)
        except DecodeError as error:
            raise (
                _not_a_recording(path)
                if is_first
                else RecordingError(f"{path} is damaged at byte {file.tell() - length}: record anew")
            ) from error
        kind = entry.WhichOneof("entry")
        if is_first and kind != "header":
            raise _not_a_recording(path)
        if kind == "header" and entry.header.format_version != FORMAT_VERSION:
            raise RecordingError(
                f"{path} is a recording of format {entry.header.format_version}, this release reads {FORMAT_VERSION}"
            )
        is_first = False
        yield entry


def _not_a_recording(path: Path) -> RecordingError:
    return RecordingError(f"{path} is not a recording of steps: name a file that --record wrote, or a new one")


def _read_varint(file: BinaryIO, path: Path) -> int | None:
    value = 0
    for index in range(_MAX_VARINT_BYTES):
        byte = file.read(1)
        if not byte:
            return None
        value |= (byte[0] & 0x7F) << (7 * index)
        if byte[0] < 0x80:
            if value < _MAX_ENTRY_BYTES:
                return value
            break
    raise RecordingError(f"{path} is damaged at byte {file.tell()}: no entry is so long; record anew")


def recorded_flags(flags: Iterable[str], given: Iterable[str]) -> list[str]:
    """The flags of a header that are not given anew."""
    names = {_flag_name(word) for word in given if word.startswith("--")}
    return [flag for flag in flags if _flag_name(flag) not in names]


def _flag_name(flag: str) -> str:
    return flag.partition("=")[0].removeprefix("--").removeprefix("no-")
