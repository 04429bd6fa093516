"""What reaches the runner of batches from several sides at once, and what it remembers."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any, cast

from gateway.batches.files import FileStore
from gateway.batches.runner import BatchRunner
from gateway.serving import Serving
from gateway.store import Store

LINE = b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "tiny", "prompt": "x"}}'


async def test_batches_that_have_ended_are_not_remembered_and_not_begun_again(tmp_path: Path) -> None:
    """Their input is wrong, so that they end at once and nothing is asked of a control plane."""
    store = Store(tmp_path)
    files = FileStore(store, max_total_bytes=1 << 20, ttl_s=1000)
    runner = BatchRunner(
        store,
        files,
        cast(Serving, None),
        concurrency=1,
        max_lines=10,
        window_s=1000,
        num_interactive=lambda: 0,
        is_one_of_several=True,
    )
    await runner.start()
    try:
        file = await files.create(io.BytesIO(b"no JSON\n"), "lines.jsonl", "batch")
        ids = [(await runner.create(file.id, "/v1/chat/completions", {}))["id"] for _ in range(5)]
        batches = [await runner.get(each) for each in ids]
        while any(batch["status"] != "failed" for batch in batches):
            await asyncio.sleep(0.01)
            batches = [await runner.get(each) for each in ids]
        # The one that follows what other processes were asked for looks several times.
        await asyncio.sleep(0.6)
        assert not runner._begun
        assert batches == [await runner.get(each) for each in ids]
    finally:
        await runner.close()
        store.close()


def runner_on(store: Store, files: FileStore) -> BatchRunner:
    # Nothing is to be answered.
    nobody = cast(Serving, None)
    return BatchRunner(store, files, nobody, concurrency=1, max_lines=9, window_s=60, num_interactive=lambda: 0)


async def test_a_batch_that_is_cancelled_while_it_is_found_is_not_begun(tmp_path: Path) -> None:
    """Another process has made it; the runner is asked to cancel it and reads what there is to begin meanwhile."""
    store = Store(tmp_path)
    files = FileStore(store, max_total_bytes=1 << 20, ttl_s=60)
    runner, other = runner_on(store, files), runner_on(store, files)
    await runner.start()
    file = await files.create(io.BytesIO(LINE), "in.jsonl", "batch")
    batch: dict[str, Any] = await other.create(file.id, "/v1/completions", None)
    cancelling = asyncio.create_task(runner.cancel(batch["id"]))
    # The store answers in turn: what is to begin is read between the two steps of the other.
    await asyncio.gather(cancelling, asyncio.create_task(runner._begin_new()))
    assert cancelling.result()["status"] == "cancelled"
    assert not runner._tasks and not runner._begun
    assert (await runner.get(batch["id"]))["status"] == "cancelled"
    await runner.close()
    store.close()
