"""What a gateway that was killed has left in the data directory: uploads that nobody got an id of, and results of
batches that have ended without them."""

from __future__ import annotations

import contextlib
import re
import sqlite3
import stat
import time
from pathlib import Path

import orjson
import structlog

from gateway.batches.runner import UNFINISHED
from gateway.store import Store

_log = structlog.get_logger(__name__)

# As `new_file_id` makes them. Whatever else lies there is somebody else's.
_OWN_NAME = re.compile(r"file-[0-9a-f]{32}")


async def remove_orphans(store: Store) -> None:
    """To be called while nobody uploads and no batch runs: at the start, by who holds the directory's lock."""
    started_s = time.time()
    removed = await store.run(lambda connection: _remove(connection, store.files, started_s))
    if removed:
        _log.info("removed what an earlier process has left unfinished", num_files=len(removed), num_bytes=sum(removed))


def _remove(connection: sqlite3.Connection, directory: Path, before_s: float) -> list[int]:
    """Sizes of the files that it removed."""
    known = {row[0] for row in connection.execute("SELECT id FROM files")}
    marks = ",".join("?" * len(UNFINISHED))
    for (found,) in connection.execute(f"SELECT object FROM batches WHERE status IN ({marks})", UNFINISHED):
        batch = orjson.loads(found)
        known |= {batch["_output"], batch["_errors"]}
    removed = []
    for path in directory.iterdir():
        status = path.lstat()
        is_ours = _OWN_NAME.fullmatch(path.name) and stat.S_ISREG(status.st_mode)
        if is_ours and path.name not in known and status.st_mtime < before_s:
            with contextlib.suppress(OSError):  # no reason not to start
                path.unlink()
                removed.append(status.st_size)
    return removed
