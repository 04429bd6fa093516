"""/v1/files: contents lie in the data directory under their ids, the rest in SQLite."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gateway.errors import ApiError
from gateway.store import Store

PURPOSES = ("batch", "user_data", "assistants", "fine-tune", "evals", "vision")


@dataclass(frozen=True, slots=True)
class StoredFile:
    id: str
    created_s: float
    expires_s: float | None
    purpose: str
    filename: str
    num_bytes: int

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.num_bytes,
            "created_at": int(self.created_s),
            "expires_at": None if self.expires_s is None else int(self.expires_s),
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
        }


def new_file_id() -> str:
    return f"file-{uuid.uuid4().hex}"


class FileStore:
    """`max_total_bytes` bounds all files together; those that have expired make room."""

    def __init__(self, store: Store, *, max_total_bytes: int, ttl_s: float) -> None:
        self._store = store
        self._max_total_bytes = max_total_bytes
        self._ttl_s = ttl_s

    def path(self, file_id: str) -> Path:
        return self._store.files / file_id

    async def check_room(self, num_bytes: int) -> None:
        """Raises what `create` would for a file of so many bytes, while they are still to come."""
        await self.expire()
        now = time.time()
        used = await self._store.run(lambda connection: _used_bytes(connection, now)) + num_bytes
        if used > self._max_total_bytes:
            raise self._full(used)
        # While it is read it lies in the temporary directory, and for a moment in both.
        await asyncio.to_thread(_check_disks, [Path(tempfile.gettempdir()), self._store.files], num_bytes)

    def _full(self, num_bytes: int) -> ApiError:
        return ApiError(
            413,
            f"The files would be {num_bytes} bytes together, and at most {self._max_total_bytes} are kept "
            "(--files-max-total-bytes): delete some.",
            code="files_full",
        )

    async def create(self, content: BinaryIO, filename: str, purpose: str) -> StoredFile:
        """Raises `ApiError` where there is no room."""
        await self.expire()
        file_id = new_file_id()
        try:
            num_bytes = await asyncio.to_thread(_copy, content, self.path(file_id))
            return await self._enter(self._new(file_id, filename, purpose, num_bytes))
        except BaseException:
            # What nobody has an id of would lie there for ever.
            self.path(file_id).unlink(missing_ok=True)
            raise

    async def _enter(self, file: StoredFile) -> StoredFile:
        """Raises `ApiError` where there is no room for a file whose content is there."""

        def write(connection: sqlite3.Connection) -> int:
            # One transaction: two that come at a time, to two processes, may not both take the last room.
            connection.execute("BEGIN IMMEDIATE")
            try:
                others = _used_bytes(connection, file.created_s)
                if others + file.num_bytes <= self._max_total_bytes:
                    _insert(connection, file)
                connection.execute("COMMIT")
            except BaseException:
                # SQLite does it itself on some errors, a full disk among them.
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            return others + file.num_bytes

        used = await self._store.run(write)
        if used > self._max_total_bytes:
            raise self._full(used)
        return file

    async def register(self, file_id: str, filename: str, purpose: str, num_bytes: int) -> StoredFile:
        """A file whose content is there already."""
        file = self._new(file_id, filename, purpose, num_bytes)
        await self._store.run(lambda connection: _insert(connection, file))
        return file

    def _new(self, file_id: str, filename: str, purpose: str, num_bytes: int) -> StoredFile:
        now = time.time()
        return StoredFile(file_id, now, now + self._ttl_s, purpose, filename, num_bytes)

    async def list_all(self) -> list[StoredFile]:
        """Newest first."""

        def read(connection: sqlite3.Connection) -> list[StoredFile]:
            rows = connection.execute("SELECT * FROM files ORDER BY created_s DESC, rowid DESC").fetchall()
            return [StoredFile(*row) for row in rows]

        now = time.time()
        return [file for file in await self._store.run(read) if file.expires_s is None or file.expires_s > now]

    async def get(self, file_id: str, param: str | None = None) -> StoredFile:
        """Raises `ApiError` (404), naming the parameter that the id came in."""
        found = next((file for file in await self.list_all() if file.id == file_id), None)
        if found is None:
            raise ApiError(404, f"There is no file '{file_id[:80]}'.", param=param, code="file_not_found")
        return found

    async def delete(self, file_id: str) -> None:
        def write(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM files WHERE id = ?", (file_id,))

        await self.get(file_id)
        await self._store.run(write)
        self.path(file_id).unlink(missing_ok=True)

    async def expire(self) -> None:
        def write(connection: sqlite3.Connection) -> list[str]:
            rows = connection.execute("DELETE FROM files WHERE expires_s <= ? RETURNING id", (time.time(),)).fetchall()
            return [row[0] for row in rows]

        for file_id in await self._store.run(write):
            self.path(file_id).unlink(missing_ok=True)


def _insert(connection: sqlite3.Connection, file: StoredFile) -> None:
    connection.execute(
        "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)",
        (file.id, file.created_s, file.expires_s, file.purpose, file.filename, file.num_bytes),
    )


def _used_bytes(connection: sqlite3.Connection, now: float) -> int:
    """Of files that have not expired."""
    query = "SELECT COALESCE(SUM(num_bytes), 0) FROM files WHERE expires_s IS NULL OR expires_s > ?"
    return int(connection.execute(query, (now,)).fetchone()[0])


def _check_disks(directories: Sequence[Path], num_bytes: int) -> None:
    """Raises `OSError` where so many bytes do not fit into all of them, which may lie on one disk."""
    wanted: dict[int, int] = {}
    for directory in directories:
        device = directory.stat().st_dev
        wanted[device] = wanted.get(device, 0) + num_bytes
        if shutil.disk_usage(directory).free < wanted[device]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))


def _copy(content: BinaryIO, path: Path) -> int:
    with path.open("wb") as file:
        shutil.copyfileobj(content, file, 1 << 20)
        return file.tell()
