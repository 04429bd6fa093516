"""Structured output where sequences lose their place: the grammar stands where the tokens stand."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from tests.system.conftest import Stack

PATTERN = "[a-f]{60} [0-9]{60}(, [a-f]{20}){4}"


@pytest.fixture(scope="module")
def crowded(tiny_model: Path) -> Iterator[Stack]:
    """A pool for about three of the sequences; a worker that ends if a row reads what it must not."""
    with Stack(tiny_model, worker_flags=["--sim-num-blocks=34", "--sim-strict"]) as running:
        yield running


async def test_preempted_sequences_go_on_in_their_format(crowded: Stack) -> None:
    """Eight at once say what each says alone, and all of it matches."""
    async with AsyncOpenAI(base_url=f"{crowded.url}/v1", api_key="any", max_retries=0, timeout=120) as client:

        async def one(number: int) -> str:
            extra: dict[str, Any] = {"structured_outputs": {"regex": PATTERN}}
            answer = await client.completions.create(
                model="tiny", prompt=f"Number {number}:", max_tokens=400, seed=number, extra_body=extra
            )
            assert answer.choices[0].finish_reason == "stop"
            return answer.choices[0].text

        before = crowded.control_plane_metric("stepwire_preemptions_total")
        with crowded.paused():  # until all of them are there
            asking = [asyncio.create_task(one(number)) for number in range(8)]
            await asyncio.to_thread(crowded.wait_open, 8)
        together = await asyncio.gather(*asking)
        assert crowded.control_plane_metric("stepwire_preemptions_total") > before
        assert all(re.fullmatch(PATTERN, text) for text in together)
        assert len(set(together)) == 8
        for number in (0, 7):
            assert await one(number) == together[number]
    await asyncio.to_thread(crowded.wait_idle)
