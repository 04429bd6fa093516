"""The gateway's only memory: one SQLite file in its data directory, for stored responses and batches.

Everything else of the gateway is stateless. Without `--data-dir` the directory is a temporary one and ends with the
process. A directory belongs to one gateway at a time: a lock says so. Where a gateway is several processes, the one
that started them has the lock, and all of them the directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import shutil
import sqlite3
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

_Result = TypeVar("_Result")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, created_s REAL NOT NULL, previous_id TEXT, status TEXT NOT NULL,
    answer BLOB NOT NULL, input BLOB NOT NULL, process INTEGER
);
CREATE INDEX IF NOT EXISTS responses_by_age ON responses (created_s);
CREATE TABLE IF NOT EXISTS response_streams (
    id TEXT PRIMARY KEY, created_s REAL NOT NULL, num_events INTEGER NOT NULL, num_bytes INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS response_events (
    id TEXT NOT NULL, first INTEGER NOT NULL, num_events INTEGER NOT NULL, data BLOB NOT NULL, PRIMARY KEY (id, first)
);
CREATE TRIGGER IF NOT EXISTS events_go_with_their_response AFTER DELETE ON responses BEGIN
    DELETE FROM response_streams WHERE id = OLD.id;
    DELETE FROM response_events WHERE id = OLD.id;
END;
CREATE TABLE IF NOT EXISTS files (
    id TEXT PRIMARY KEY, created_s REAL NOT NULL, expires_s REAL, purpose TEXT NOT NULL,
    filename TEXT NOT NULL, num_bytes INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS batches (
    id TEXT PRIMARY KEY, created_s REAL NOT NULL, status TEXT NOT NULL, object BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS batch_cancels (id TEXT PRIMARY KEY, at_s REAL NOT NULL);
"""
# How long a writer waits for another process's write.
_BUSY_LIMIT_S = 10.0
# With less than this on a disk it may be that which keeps the directory from being used.
_FULL_BYTES = 1 << 20
_TEMPORARY_PREFIX = "stepwire-gateway-"
# A gateway that has just made its directory may not have locked it yet.
_SETTLED_S = 60.0
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


class StoreError(Exception):
    """The data directory cannot be used; the message says what to do."""


class StoreGoneError(sqlite3.OperationalError):
    """Somebody has deleted or moved the data directory of a gateway that runs: what is stored now would be lost with
    the process, so nothing is."""


def is_storage_error(error: BaseException) -> bool:
    """Whether it tells of a disk that is full or cannot be used, and not of a defect of ours."""
    if isinstance(error, BaseExceptionGroup):
        return all(is_storage_error(each) for each in error.exceptions)
    if isinstance(error, OSError):
        return error.errno in _DISK_ERRORS
    return isinstance(error, sqlite3.OperationalError)


class Store:
    """`run` executes one function at a time, on a thread of its own, in the order of the calls.

    `shares`: this is one of a gateway's processes, and the directory is theirs already.

    Raises:
        StoreError: the directory cannot be used, or another gateway uses it.
    """

    def __init__(self, directory: Path | None, *, shares: bool = False) -> None:
        self._is_temporary = directory is None
        if directory is None:
            _remove_abandoned(Path(tempfile.gettempdir()))
            directory = Path(tempfile.mkdtemp(prefix=_TEMPORARY_PREFIX))
        self.directory = directory
        self._hold = _keep_from_cleaners(directory) if self._is_temporary else None
        try:
            (self.directory / "files").mkdir(parents=True, exist_ok=True)
            self._lock = (self.directory / "lock").open("w")
            if not shares:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file = self.directory / "stepwire.sqlite"
            self._connection = sqlite3.connect(
                self._file, timeout=_BUSY_LIMIT_S, check_same_thread=False, isolation_level=None
            )
            self._connection.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;" + _SCHEMA)
            _add_missing_columns(self._connection)
            self._opened = self._file.stat()
        except BlockingIOError as error:
            raise StoreError(
                f"--data-dir {self.directory} is in use by another gateway: give each a directory of its own"
            ) from error
        except (OSError, sqlite3.Error) as error:
            raise StoreError(
                f"--data-dir {self.directory} cannot be used: {error}{_space_left(self.directory)}"
            ) from error
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")

    @property
    def files(self) -> Path:
        """Where the contents of files lie, each under its id."""
        directory = self.directory / "files"
        # Whoever clears it away has deleted the files, and not the place for others.
        directory.mkdir(exist_ok=True)
        return directory

    async def run(self, work: Callable[[sqlite3.Connection], _Result]) -> _Result:
        """Raises `StoreGoneError`, another `sqlite3.OperationalError`, and what `work` does."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, work)

    def _run(self, work: Callable[[sqlite3.Connection], _Result]) -> _Result:
        try:
            is_there = os.path.samestat(self._file.stat(), self._opened)
        except (FileNotFoundError, NotADirectoryError):
            is_there = False
        except OSError as error:  # a file system that is away, or that asks for another user
            raise sqlite3.OperationalError(f"{self._file} cannot be looked at: {error.strerror}") from error
        if not is_there:
            raise StoreGoneError(
                f"the data directory {self.directory} was deleted or moved while the gateway runs: start it again"
            )
        return work(self._connection)

    def close(self) -> None:
        self._thread.shutdown(wait=True)
        self._connection.close()
        self._lock.close()
        if self._hold is not None:
            os.close(self._hold)
        if self._is_temporary:
            shutil.rmtree(self.directory, ignore_errors=True)


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All of it or nothing; nobody else writes meanwhile."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        # A full disk may have ended it already.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _keep_from_cleaners(directory: Path) -> int:
    """A descriptor to keep open. Whoever clears old files out of the temporary directory leaves a directory alone that
    somebody has locked (https://www.freedesktop.org/software/systemd/man/latest/tmpfiles.d.html, "Age"): those of a
    gateway that nobody has asked for anything in ten days are as old as what was left behind."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    with contextlib.suppress(OSError):  # file systems without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _remove_abandoned(parent: Path) -> None:
    """Temporary directories of this user's gateways that were killed: nobody holds their locks."""
    for path in parent.glob(f"{_TEMPORARY_PREFIX}*"):
        with contextlib.suppress(OSError):  # no lock, or somebody's
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                continue
            with (path / "lock").open("r+") as lock:
                if time.time() - os.fstat(lock.fileno()).st_mtime > _SETTLED_S:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)


def _space_left(directory: Path) -> str:
    """SQLite calls a full disk an I/O error."""
    there = next((path for path in (directory, *directory.parents) if path.exists()), None)
    free = _FULL_BYTES if there is None else shutil.disk_usage(there).free
    return "" if free >= _FULL_BYTES else f" ({free} bytes are free there)"


def _add_missing_columns(connection: sqlite3.Connection) -> None:
    """Those that a file of an earlier version lacks."""
    if "process" not in {row[1] for row in connection.execute("PRAGMA table_info(responses)")}:
        connection.execute("ALTER TABLE responses ADD COLUMN process INTEGER")
