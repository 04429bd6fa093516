from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import cast

from gateway.batches.files import FileStore
from gateway.batches.runner import BatchRunner
from gateway.serving import Serving
from gateway.store import Store


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
        assert runner.num_begun == 0
        assert batches == [await runner.get(each) for each in ids]
    finally:
        await runner.close()
        store.close()
