"""Running batches: one line after another, below interactive traffic, on from where it stopped after a restart.

A result is one line in the output or error file, written whole; the lines that are there are the progress. So a process
that dies loses nothing but the requests in flight, and those are sent again.

Of several processes one runs the batches: the one that holds a lock, which goes to another when it dies. Any may be
asked to create or cancel one; the runner finds it in the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import sqlite3
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import structlog

from gateway.batch_lines import ENDPOINTS, BatchLine, LineError, error_line, read_line, result_line
from gateway.batches.files import FileStore, new_file_id
from gateway.batches.requests import BatchRequests
from gateway.errors import ApiError
from gateway.serving import Serving
from gateway.store import Store, StoreGoneError, is_storage_error

_log = structlog.get_logger(__name__)

MAX_LISTED_ERRORS = 20
UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")
# A batch as it was saved, and when another process than the runner was asked to cancel it.
_Row = tuple[bytes, float | None]
_SELECT = "SELECT object, batch_cancels.at_s FROM batches LEFT JOIN batch_cancels USING (id)"
# How soon the runner notices what other processes were asked for, or that there is no runner any more.
_FOLLOW_S = 0.25
# How soon counts show what has been answered.
_COUNTS_S = 0.2
_YIELD_S = 0.05
_MAX_PAUSE_S = 10.0
# How soon a batch tries again where its results could not be stored.
_STORAGE_PAUSE_S = 5.0


class BatchRunner:
    """`num_interactive` says how many requests of people are being answered, by all processes together."""

    def __init__(
        self,
        store: Store,
        files: FileStore,
        serving: Serving,
        *,
        concurrency: int,
        max_lines: int,
        window_s: float,
        num_interactive: Callable[[], int],
        is_one_of_several: bool = False,
    ) -> None:
        self._store = store
        self._is_one_of_several = is_one_of_several
        self._lock: BinaryIO | None = None
        self._following: asyncio.Task[None] | None = None
        # Those that this process has begun and that have not ended.
        self._begun: set[str] = set()
        self._files = files
        self._requests = BatchRequests(serving)
        self._num_interactive = num_interactive
        self._concurrency = concurrency
        self._max_lines = max_lines
        self._window_s = window_s
        self._num_running = 0
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """Go on with what an earlier process has left, if this is the one that runs batches."""
        if self._become_runner():
            await self._begin_new()
        if self._is_one_of_several:
            self._following = asyncio.create_task(self._follow(), name="batches-follow")

    @property
    def _is_runner(self) -> bool:
        return self._lock is not None

    def _become_runner(self) -> bool:
        """Whether this process runs the batches; it does as soon as no other does."""
        if self._lock is None:
            lock = (self._store.directory / "batches.lock").open("wb")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
            else:
                self._lock = lock
        return self._is_runner

    async def _follow(self) -> None:
        """Take up what other processes were asked for."""
        was_told = False
        while True:
            await asyncio.sleep(_FOLLOW_S)
            try:
                if self._become_runner():
                    await self._begin_new()
                    await self._cancel_wanted()
            except (sqlite3.Error, OSError) as error:
                if not was_told:
                    _log.error("the stored batches cannot be read", error=str(error))
                was_told = True
            else:
                was_told = False

    async def _begin_new(self) -> None:
        for batch in await self._unfinished():
            if batch["id"] in self._begun:
                continue
            # It may have ended since the list was read.
            status = (await self.get(batch["id"]))["status"]
            if status in UNFINISHED and batch["id"] not in self._begun:
                self._begin(batch)

    async def _cancel_wanted(self) -> None:
        def read(connection: sqlite3.Connection) -> list[str]:
            return [row[0] for row in connection.execute("SELECT id FROM batch_cancels")]

        for batch_id in await self._store.run(read):
            with contextlib.suppress(ApiError):  # it has ended
                await self.cancel(batch_id)

            def forget(connection: sqlite3.Connection, batch_id: str = batch_id) -> None:
                connection.execute("DELETE FROM batch_cancels WHERE id = ?", (batch_id,))

            await self._store.run(forget)

    async def close(self) -> None:
        if self._following is not None:
            self._following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._following
        for task in tuple(self._tasks.values()):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        if self._lock is not None:
            self._lock.close()

    # ---- what the routes ask ----

    async def create(self, input_file_id: str, endpoint: str, metadata: dict[str, str] | None) -> dict[str, Any]:
        if endpoint not in ENDPOINTS:
            raise ApiError(400, f"endpoint: must be one of {', '.join(ENDPOINTS)}.", param="endpoint")
        file = await self._files.get(input_file_id, "input_file_id")
        if file.purpose != "batch":
            raise ApiError(400, f"input_file_id: purpose is '{file.purpose}', not 'batch'.", param="input_file_id")
        now = int(time.time())
        batch: dict[str, Any] = {
            "id": f"batch_{uuid.uuid4().hex}",
            "object": "batch",
            "endpoint": endpoint,
            "errors": None,
            "input_file_id": input_file_id,
            "completion_window": "24h",
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": now,
            "in_progress_at": None,
            "expires_at": now + int(self._window_s),
            "finalizing_at": None,
            "completed_at": None,
            "failed_at": None,
            "expired_at": None,
            "cancelling_at": None,
            "cancelled_at": None,
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "metadata": metadata,
            # Ours: where results are collected before they are files.
            "_output": new_file_id(),
            "_errors": new_file_id(),
        }
        if self._is_runner:
            self._begun.add(batch["id"])
            await self._save(batch)
            self._begin(batch)
        else:
            await self._save(batch)
        return batch

    async def get(self, batch_id: str) -> dict[str, Any]:
        def read(connection: sqlite3.Connection) -> _Row | None:
            row: _Row | None = connection.execute(f"{_SELECT} WHERE batches.id = ?", (batch_id,)).fetchone()
            return row

        found = await self._store.run(read)
        if found is None:
            raise ApiError(404, f"There is no batch '{batch_id[:80]}'.", code="batch_not_found")
        return _batch_of(found)

    async def list_all(self) -> list[dict[str, Any]]:
        """Newest first."""

        def read(connection: sqlite3.Connection) -> list[_Row]:
            return connection.execute(f"{_SELECT} ORDER BY created_s DESC, batches.rowid DESC").fetchall()

        return [_batch_of(found) for found in await self._store.run(read)]

    async def _unfinished(self) -> list[dict[str, Any]]:
        """As they were saved."""
        marks = ",".join("?" * len(UNFINISHED))

        def read(connection: sqlite3.Connection) -> list[bytes]:
            rows = connection.execute(f"SELECT object FROM batches WHERE status IN ({marks})", UNFINISHED)
            return [row[0] for row in rows]

        return [orjson.loads(found) for found in await self._store.run(read)]

    async def cancel(self, batch_id: str) -> dict[str, Any]:
        batch = await self.get(batch_id)
        if batch["status"] not in UNFINISHED:
            raise ApiError(409, f"The batch is {batch['status']}; only one that runs can be cancelled.")
        if not self._is_runner:
            await self._want_cancelled(batch_id)
            return await self.get(batch_id)
        # Whoever has just found it unbegun must not begin it over what follows.
        self._begun.add(batch_id)
        task = self._tasks.pop(batch_id, None)
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            batch = await self.get(batch_id)
        if batch["status"] in UNFINISHED:
            batch["cancelling_at"] = int(time.time())
            await self._end(batch, "cancelled")
        self._begun.discard(batch_id)
        return batch

    async def _want_cancelled(self, batch_id: str) -> None:
        def write(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT OR IGNORE INTO batch_cancels VALUES (?, ?)", (batch_id, time.time()))

        await self._store.run(write)

    # ---- the work ----

    def _begin(self, batch: dict[str, Any]) -> None:
        self._begun.add(batch["id"])
        task = asyncio.create_task(self._run(batch), name=batch["id"])
        self._tasks[batch["id"]] = task
        task.add_done_callback(lambda _: self._tasks.pop(batch["id"], None))

    async def _run(self, batch: dict[str, Any]) -> None:
        """Until its end, going on from what has been written whenever nothing could be stored meanwhile."""
        while True:
            try:
                await self._run_once(batch)
                return
            except Exception as error:
                if not is_storage_error(error):
                    raise
                if isinstance(error, StoreGoneError):
                    _log.error("a batch is lost", batch=batch["id"], error=str(error))
                    return
                _log.error("a batch waits until its results can be stored", batch=batch["id"], error=str(error))
            await asyncio.sleep(_STORAGE_PAUSE_S)

    async def _run_once(self, batch: dict[str, Any]) -> None:
        try:
            lines = await asyncio.to_thread(self._read_lines, batch)
            if lines is None:
                await self._fail(batch)
            else:
                await self._run_lines(batch, lines)
        except Exception as error:
            if is_storage_error(error):
                raise
            _log.exception("a batch failed", batch=batch["id"])
            batch["errors"] = _errors([("internal_error", "The server failed to run this batch.", None)])
            await self._fail(batch)

    async def _fail(self, batch: dict[str, Any]) -> None:
        batch["failed_at"] = int(time.time())
        batch["status"] = "failed"
        await self._save(batch)

    def _read_lines(self, batch: dict[str, Any]) -> list[BatchLine] | None:
        """All requests, or None with the batch's `errors` set."""
        lines: list[BatchLine] = []
        wrong: list[tuple[str, str, int | None]] = []
        seen: set[str] = set()
        try:
            with self._files.path(batch["input_file_id"]).open("rb") as file:
                for number, text in enumerate(file, 1):
                    if not text.strip():
                        continue
                    try:
                        line = read_line(text, batch["endpoint"])
                    except LineError as error:
                        wrong.append(("invalid_request", str(error), number))
                    else:
                        if line.custom_id in seen:
                            wrong.append(("duplicate_custom_id", f"'{line.custom_id[:80]}' is used twice", number))
                        seen.add(line.custom_id)
                        lines.append(line)
                    if len(wrong) >= MAX_LISTED_ERRORS or len(lines) > self._max_lines:
                        break
        except OSError:
            wrong.append(("missing_file", "the input file is gone", None))
        if len(lines) > self._max_lines:
            wrong.append(("too_many_requests", f"more than {self._max_lines} requests (--batch-max-requests)", None))
        elif not lines and not wrong:
            wrong.append(("empty_file", "the input file holds no requests", None))
        if wrong:
            batch["errors"] = _errors(wrong)
            return None
        return lines

    async def _run_lines(self, batch: dict[str, Any], lines: list[BatchLine]) -> None:
        output, failures = self._files.path(batch["_output"]), self._files.path(batch["_errors"])
        good, bad = [await asyncio.to_thread(_whole_lines, path) for path in (output, failures)]
        counts = batch["request_counts"] = {"total": len(lines), "completed": len(good), "failed": len(bad)}
        batch["in_progress_at"] = batch["in_progress_at"] or int(time.time())
        batch["status"] = "in_progress"
        await self._save(batch)
        queue = iter([line for line in lines if line.custom_id not in good and line.custom_id not in bad])
        has_expired = False

        async def work() -> None:
            nonlocal has_expired
            for line in queue:
                try:
                    async with asyncio.timeout(max(0.0, batch["expires_at"] - time.time())):
                        is_ok, result = await self._answer(line, batch)
                except TimeoutError:
                    has_expired, is_ok = True, False
                    message = "The batch's completion window has passed before this request was answered."
                    result = error_line(line.custom_id, "batch_expired", message)
                # Writing is one call: a line is there whole, or not at all but for a crash, which `_whole_lines` mends.
                with (output if is_ok else failures).open("ab") as file:
                    file.write(result)
                counts["completed" if is_ok else "failed"] += 1

        async with asyncio.TaskGroup() as beside:
            counting = beside.create_task(self._save_counts(batch))
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._concurrency, len(lines))):
                    group.create_task(work())
            counting.cancel()
        await self._end(batch, "expired" if has_expired else "completed")

    async def _save_counts(self, batch: dict[str, Any]) -> None:
        """Again and again, once they have changed: also while the next request takes long."""
        saved = dict(batch["request_counts"])
        while True:
            await asyncio.sleep(_COUNTS_S)
            if batch["request_counts"] != saved:
                saved = dict(batch["request_counts"])
                await self._save(batch)

    async def _end(self, batch: dict[str, Any], status: str) -> None:
        """Results become files; those that there are, also of a batch that was cut short."""
        batch["status"] = "finalizing"
        batch["finalizing_at"] = int(time.time())
        await self._save(batch)
        for own, public, name in (("_output", "output_file_id", "output"), ("_errors", "error_file_id", "errors")):
            path = self._files.path(batch[own])
            if path.exists() and path.stat().st_size:
                filename = f"{batch['id']}_{name}.jsonl"
                await self._files.register(batch[own], filename, "batch_output", path.stat().st_size)
                batch[public] = batch[own]
        batch[f"{status}_at"] = int(time.time())
        batch["status"] = status
        await self._save(batch)

    async def _save(self, batch: dict[str, Any]) -> None:
        row = (batch["id"], batch["created_at"], batch["status"], orjson.dumps(batch))

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT OR REPLACE INTO batches VALUES (?, ?, ?, ?)", row)

        await self._store.run(write)
        if batch["status"] not in UNFINISHED:
            self._begun.discard(batch["id"])

    # ---- one request ----

    async def _answer(self, line: BatchLine, batch: dict[str, Any]) -> tuple[bool, bytes]:
        """Its result line, and whether it went well. A server that is full or restarting is asked again."""
        request_id = f"{batch['id']}-{uuid.uuid4().hex[:12]}"
        pause_s = 0.1
        while True:
            await self._wait_for_turn()
            self._num_running += 1
            try:
                return True, result_line(line.custom_id, 200, request_id, await self._requests.answer(line, request_id))
            except ApiError as error:
                if error.status not in (429, 503):
                    return False, result_line(line.custom_id, error.status, request_id, error.body())
            finally:
                self._num_running -= 1
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, _MAX_PAUSE_S)

    async def _wait_for_turn(self) -> None:
        """Each interactive request that is being answered takes one of the batches' places; one always remains."""
        while self._num_running >= max(1, self._concurrency - self._num_interactive()):
            await asyncio.sleep(_YIELD_S)


def _batch_of(row: _Row) -> dict[str, Any]:
    batch: dict[str, Any] = orjson.loads(row[0])
    if row[1] is not None and batch["status"] in UNFINISHED:
        batch |= {"status": "cancelling", "cancelling_at": int(row[1])}
    return batch


def public_batch(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if not name.startswith("_")}


def _errors(wrong: list[tuple[str, str, int | None]]) -> dict[str, Any]:
    data = [{"code": code, "message": message, "line": line, "param": None} for code, message, line in wrong]
    return {"object": "list", "data": data}


def _whole_lines(path: Path) -> set[str]:
    """custom_ids of the results that are there; half a line at the end is cut off."""
    if not path.exists():
        return set()
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        with path.open("r+b") as file:
            file.truncate(end)
    return {orjson.loads(line)["custom_id"] for line in content[:end].splitlines()}
