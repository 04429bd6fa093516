"""One SQLite file for several processes: whose a response is, who may use the directory, files of earlier versions."""

from __future__ import annotations

import asyncio
import io
import os
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway.batches.files import FileStore
from gateway.errors import ApiError
from gateway.responses.store import ResponseStore, StoredResponse
from gateway.responses.stored_events import EventPiece, StoredEvents
from gateway.store import Store, StoreError, StoreGoneError


@contextmanager
def opened(directory: Path, *, shares: bool = False) -> Iterator[Store]:
    store = Store(directory, shares=shares)
    try:
        yield store
    finally:
        store.close()


def response(response_id: str, status: str) -> StoredResponse:
    answer: dict[str, Any] = {"id": response_id, "created_at": 2_000_000_000, "status": status, "output": []}
    return StoredResponse(answer, [], None)


def kept(store: Store, process: int | None = None) -> ResponseStore:
    return ResponseStore(store, max_responses=100, ttl_s=1e9, process=process)


async def status_of(responses: ResponseStore, response_id: str) -> str:
    found = await responses.get(response_id)
    assert found is not None
    return str(found.answer["status"])


def test_a_directory_is_one_gateways_with_all_its_processes(tmp_path: Path) -> None:
    with opened(tmp_path), opened(tmp_path, shares=True), pytest.raises(StoreError, match="another gateway"):
        Store(tmp_path)
    with opened(tmp_path):
        pass


OPEN_FOREVER = """
import time
from gateway.store import Store
store = Store(None)
print(store.directory, flush=True)
time.sleep(600)
"""


def test_temporary_directories_of_killed_gateways_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    command, environment = [sys.executable, "-c", OPEN_FOREVER], {"TMPDIR": str(tmp_path)}
    other = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        directory = Path(other.stdout.readline().decode().strip())
        assert directory.parent == tmp_path
        (directory / "files" / "file-1").write_text("left")
        made_s = (directory / "lock").stat().st_mtime
        strange = tmp_path / "stepwire-gateway-strange"
        strange.mkdir()
        for is_alive, age_s, is_left in ((True, 3600, True), (False, 0, True), (False, 3600, False)):
            if not is_alive:
                other.kill()
                other.wait()
            os.utime(directory / "lock", (made_s - age_s, made_s - age_s))
            Store(None).close()
            assert directory.exists() == is_left
        assert strange.exists()
    finally:
        other.kill()
        other.wait()


async def test_a_process_fails_what_its_earlier_life_was_at_and_nothing_else(tmp_path: Path) -> None:
    with opened(tmp_path, shares=True) as first, opened(tmp_path, shares=True) as second:
        mine, theirs = kept(first, 0), kept(second, 1)
        await mine.put(response("a", "in_progress"))
        await mine.put(response("b", "completed"))
        await theirs.put(response("c", "queued"))
        assert await kept(first, 0).fail_interrupted() == 1
        assert [await status_of(theirs, name) for name in "abc"] == ["failed", "completed", "queued"]
        # Nobody's process lives when a gateway starts.
        assert await kept(first).fail_interrupted() == 1
        assert await status_of(mine, "c") == "failed"


async def test_what_has_ended_is_not_changed_by_who_comes_late(tmp_path: Path) -> None:
    with opened(tmp_path, shares=True) as first, opened(tmp_path, shares=True) as second:
        mine, theirs = kept(first, 0), kept(second, 1)
        for name in "abc":
            await mine.put(response(name, "in_progress"))
        assert await theirs.update(response("a", "cancelled").answer)
        assert await theirs.delete("b")
        assert await mine.still_running(["a", "b", "c", "d"]) == {"c"}
        assert not await mine.update(response("a", "completed").answer)
        assert not await mine.update(response("b", "completed").answer)
        assert await mine.update(response("c", "completed").answer)
        assert await status_of(theirs, "a") == "cancelled" and await status_of(theirs, "c") == "completed"


async def test_two_uploads_at_a_time_do_not_both_take_the_last_room(tmp_path: Path) -> None:
    with opened(tmp_path, shares=True) as first, opened(tmp_path, shares=True) as second:
        stores = [FileStore(store, max_total_bytes=100, ttl_s=60) for store in (first, second) * 8]
        outcomes = await asyncio.gather(
            *(store.create(io.BytesIO(b"x" * 30), "f", "batch") for store in stores), return_exceptions=True
        )
        refused = [each for each in outcomes if isinstance(each, ApiError)]
        assert len(refused) == len(stores) - 3 and {each.code for each in refused} == {"files_full"}
        assert len(await stores[0].list_all()) == len(list((tmp_path / "files").iterdir())) == 3


@pytest.mark.parametrize("process", ["", ", process INTEGER"])
async def test_a_file_of_an_earlier_version_is_read_on(process: str, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "stepwire.sqlite") as connection:
        connection.execute(
            "CREATE TABLE responses (id TEXT PRIMARY KEY, created_s REAL NOT NULL, previous_id TEXT, "
            f"status TEXT NOT NULL, answer BLOB NOT NULL, input BLOB NOT NULL{process})"
        )
        connection.execute(
            "INSERT INTO responses (id, created_s, status, answer, input) "
            "VALUES ('a', 2e9, 'queued', '{\"status\": \"queued\"}', '[]')"
        )
    connection.close()
    with opened(tmp_path) as store:
        responses, events = kept(store), StoredEvents(store, max_bytes=1000)
        assert await responses.fail_interrupted() == 1
        assert await status_of(responses, "a") == "failed"
        assert await events.read("a", -1) is None
        await responses.put(response("b", "queued"), EventPiece("b", 0, 1, b"x\n\n"))
        assert await events.states("ab") == {"b": (1, False)}
        assert await responses.delete("a") and await responses.delete("b")
        assert await events.states("ab") == {}


async def test_a_directory_that_is_another_thing_now_is_gone(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with opened(data) as store:
        data.rename(tmp_path / "moved")
        with pytest.raises(StoreGoneError):
            await kept(store).get("a")
        data.write_text("not a directory")
        with pytest.raises(StoreGoneError):
            await kept(store).get("a")
