"""Several gateway processes on one port, with the official client: nobody notices which of them answers.

Each operation comes over a new connection, which the kernel gives to any of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from openai import AsyncOpenAI

from tests.system.conftest import LIMIT_S, STOP_LIMIT_S, Stack, read_sample, wait_until
from tests.system.gateway_processes import gateways

NUM_PROCESSES = 3
# With steps of 2 ms a minute.
ENDLESS = 30_000
CHAT = "/v1/chat/completions"
COMPLETIONS = 'stepwire_gateway_http_requests_total{code="200",route="/v1/completions"}'


@pytest.fixture(scope="module")
def several(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    data = tmp_path_factory.mktemp("data")
    flags = ["--gateway-processes", str(NUM_PROCESSES), "--data-dir", str(data), "--batch-concurrency", "4"]
    worker_flags = ["--sim-step-ms", "2", "--sim-max-model-len", "32768"]
    with Stack(tiny_model, gateway_flags=flags, worker_flags=worker_flags) as running:
        wait_until(lambda: len(gateways(running)) == NUM_PROCESSES, LIMIT_S, running.logs, every_s=0.2)
        yield running


@contextlib.asynccontextmanager
async def anybody(stack: Stack) -> AsyncIterator[AsyncOpenAI]:
    """A client with a connection of its own."""
    async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="any", max_retries=0, timeout=120) as client:
        yield client


async def complete(stack: Stack, num_tokens: int = 8) -> str:
    async with anybody(stack) as client:
        answer = await client.completions.create(
            model="tiny", prompt="hello", max_tokens=num_tokens, seed=3, extra_body={"ignore_eos": True}
        )
        return answer.choices[0].text


async def respond(stack: Stack, **fields: Any) -> Any:
    async with anybody(stack) as client:
        return await client.responses.create(
            model="tiny", input="Hello", extra_body={"seed": 7, "ignore_eos": True}, **fields
        )


async def retrieve(stack: Stack, response_id: str) -> Any:
    async with anybody(stack) as client:
        return await client.responses.retrieve(response_id)


async def test_all_take_connections_and_one_page_counts_for_all(several: Stack) -> None:
    texts = [await complete(several) for _ in range(12)]
    assert len(set(texts)) == 1
    assert several.gateway_metric(COMPLETIONS) == 12
    num_streams = 40

    async def stream() -> int:
        async with anybody(several) as client:
            events = await client.completions.create(
                model="tiny", prompt="hello", max_tokens=ENDLESS, stream=True, extra_body={"ignore_eos": True}
            )
            await anext(aiter(events))
            begun.release()
            await over.wait()
            await events.close()
            return 1

    begun, over = asyncio.Semaphore(0), asyncio.Event()
    streams = [asyncio.create_task(stream()) for _ in range(num_streams)]
    for _ in streams:
        await begun.acquire()
    page = (await asyncio.to_thread(httpx.get, f"{several.url}/metrics")).text
    assert read_sample(page, "stepwire_gateway_open_streams") == num_streams
    assert read_sample(page, "stepwire_gateway_control_plane_connected") == 1
    # The page's own request may not have ended yet in the process that answered it.
    async with asyncio.timeout(120):
        while (await asyncio.to_thread(httpx.get, f"{several.url}/load")).json() != {"server_load": num_streams}:
            await asyncio.sleep(0.05)
    found = gateways(several)
    for number, process in found.items():
        taken = [each for each in process.net_connections("tcp") if each.status == psutil.CONN_ESTABLISHED]
        assert taken, f"process {number} has no connection"
        assert read_sample(page, f'process_resident_memory_bytes{{process="{number}"}}') > 2**20
    assert f'process="{NUM_PROCESSES}"' not in page
    over.set()
    assert await asyncio.gather(*streams) == [1] * num_streams
    await asyncio.to_thread(several.wait_idle)
    await asyncio.to_thread(several.wait_streams, 0)


async def test_what_one_has_stored_all_can_read(several: Stack) -> None:
    for _ in range(4):
        whole = await respond(several, max_output_tokens=8)
        assert (await retrieve(several, whole.id)).output_text == whole.output_text
        events = [event async for event in await respond_streaming(several)]
        last = events[-1].response
        # It was stored before its last event could be read.
        assert (await retrieve(several, last.id)).output_text == last.output_text
        following = await respond(several, max_output_tokens=4, previous_response_id=last.id)
        assert following.previous_response_id == last.id
        assert following.usage.input_tokens > whole.usage.input_tokens
        async with anybody(several) as client:
            await client.responses.delete(last.id)
        with pytest.raises(openai.NotFoundError):
            await retrieve(several, last.id)


async def respond_streaming(stack: Stack) -> AsyncIterator[Any]:
    async def events() -> AsyncIterator[Any]:
        async with anybody(stack) as client:
            stream = await client.responses.create(
                model="tiny", input="Hello", max_output_tokens=8, stream=True, extra_body={"seed": 7}
            )
            async for event in stream:
                yield event

    return events()


async def test_a_background_response_is_cancelled_or_deleted_by_whoever_is_asked(several: Stack) -> None:
    """Its generation stops in the process that runs it."""
    for _ in range(4):
        running = [await respond(several, background=True, max_output_tokens=ENDLESS) for _ in range(2)]
        async with anybody(several) as client:
            cancelled = await client.responses.cancel(running[0].id)
        assert cancelled.status == "cancelled"
        async with anybody(several) as client:
            await client.responses.delete(running[1].id)
        await asyncio.to_thread(several.wait_idle)
        assert (await retrieve(several, running[0].id)).status == "cancelled"
        ended = await respond(several, background=True, max_output_tokens=4)
        async with asyncio.timeout(120):
            while (found := await retrieve(several, ended.id)).status in ("queued", "in_progress"):
                await asyncio.sleep(0.02)
        assert (found.status, found.usage.output_tokens) == ("incomplete", 4)
        # What has ended stays as it is.
        async with anybody(several) as client:
            assert (await client.responses.cancel(ended.id)).status == "incomplete"


def batch_line(number: int, max_tokens: int) -> str:
    body = {
        "messages": [{"role": "user", "content": f"question {number}"}],
        "max_tokens": max_tokens,
        "ignore_eos": True,
    }
    return json.dumps({"custom_id": f"r{number}", "method": "POST", "url": CHAT, "body": body})


async def begin_batch(stack: Stack, num_lines: int, max_tokens: int) -> str:
    content = "\n".join(batch_line(number, max_tokens) for number in range(num_lines)).encode()
    async with anybody(stack) as client:
        file = await client.files.create(file=("in.jsonl", content), purpose="batch")
    async with anybody(stack) as client:
        assert (await client.files.content(file.id)).content == content
    async with anybody(stack) as client:
        batch = await client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        return batch.id


async def batch_of(stack: Stack, batch_id: str) -> Any:
    async with anybody(stack) as client:
        return await client.batches.retrieve(batch_id)


async def ended_batch(stack: Stack, batch_id: str) -> Any:
    async with asyncio.timeout(120):
        while (batch := await batch_of(stack, batch_id)).status not in ("completed", "failed", "cancelled"):
            await asyncio.sleep(0.05)
    return batch


async def answered_once(stack: Stack, batch: Any, num_lines: int) -> None:
    async with anybody(stack) as client:
        lines = [json.loads(line) for line in (await client.files.content(batch.output_file_id)).text.splitlines()]
    assert sorted(line["custom_id"] for line in lines) == sorted(f"r{number}" for number in range(num_lines))


async def test_batches_run_once_and_are_cancelled_by_whoever_is_asked(several: Stack) -> None:
    batches = [await begin_batch(several, 10, 4) for _ in range(4)]
    for batch_id in batches:
        batch = await ended_batch(several, batch_id)
        assert (batch.status, batch.request_counts.completed) == ("completed", 10), several.logs()
        await answered_once(several, batch, 10)
    for _ in range(3):
        endless = await begin_batch(several, 8, ENDLESS)
        async with anybody(several) as client:
            assert (await client.batches.cancel(endless)).status in ("cancelling", "cancelled")
        assert (await batch_of(several, endless)).status in ("cancelling", "cancelled")
        batch = await ended_batch(several, endless)
        assert batch.status == "cancelled" and batch.cancelled_at >= batch.cancelling_at
        await asyncio.to_thread(several.wait_idle)


def runner_of_batches(stack: Stack) -> tuple[int, psutil.Process]:
    runners = [
        (number, process)
        for number, process in gateways(stack).items()
        if any(Path(file.path).name == "batches.lock" for file in process.open_files())
    ]
    assert len(runners) == 1, "one runs batches"
    return runners[0]


def running_responses(stack: Stack, number: int) -> set[str]:
    """Those that the store believes one process to be at."""
    with sqlite3.connect(Path(stack.gateway_flags[3]) / "stepwire.sqlite") as connection:
        rows = connection.execute(
            "SELECT id FROM responses WHERE process = ? AND status IN ('queued', 'in_progress')", (number,)
        ).fetchall()
    return {row[0] for row in rows}


async def test_a_process_that_dies_is_started_again_and_what_it_did_goes_on(several: Stack) -> None:
    """The process that runs batches: another one takes the batch over, and no line is answered twice."""
    assert await complete(several)  # something is counted
    batch_id = await begin_batch(several, 40, 40)
    interrupted = [await respond(several, background=True, max_output_tokens=ENDLESS) for _ in range(6)]
    async with asyncio.timeout(120):
        while (await batch_of(several, batch_id)).request_counts.completed < 5:
            await asyncio.sleep(0.1)
    # The batch stands where it is until the process that runs it is gone.
    with several.paused():
        counted = several.gateway_metric(COMPLETIONS)
        number, runner = runner_of_batches(several)
        orphans = running_responses(several, number)
        os.kill(runner.pid, signal.SIGKILL)
    # Those that are left answer meanwhile; a connection that the dead one had not taken is refused or reset.
    for _ in range(8):
        with contextlib.suppress(openai.APIConnectionError):
            assert await complete(several)
    batch = await ended_batch(several, batch_id)
    assert (batch.status, batch.request_counts.completed) == ("completed", 40), several.logs()
    await answered_once(several, batch, 40)

    def is_replaced() -> bool:
        found = gateways(several)
        return len(found) == NUM_PROCESSES and found[number].pid != runner.pid

    # What goes on for long stands still meanwhile: it would only keep the machine busy.
    with several.paused():
        await asyncio.to_thread(wait_until, is_replaced, LIMIT_S, several.logs, every_s=0.2)
    assert [await complete(several) for _ in range(8)]
    # Counts go on where they were.
    assert several.gateway_metric(COMPLETIONS) >= counted + 8
    # Of the responses, those of the dead process have failed; the others are stopped by whoever is asked.
    for response in interrupted:
        async with anybody(several) as client:
            status = (await client.responses.cancel(response.id)).status
        assert status == "failed" if response.id in orphans else status in ("cancelled", "incomplete")
    await asyncio.to_thread(several.wait_idle)
    await asyncio.to_thread(several.wait_streams, 0)


async def test_on_a_signal_all_finish_what_they_are_at(several: Stack) -> None:
    children = list(gateways(several).values())
    with several.paused():
        asking = [asyncio.create_task(complete(several, 100)) for _ in range(9)]
        await asyncio.to_thread(several.wait_open, 9)
        gateway = several.processes.pop("gateway")
        gateway.send_signal(signal.SIGTERM)
    code = await asyncio.to_thread(gateway.wait, STOP_LIMIT_S)
    assert code == 0, several.logs()
    assert len(set(await asyncio.gather(*asking))) == 1
    assert not [child for child in children if child.is_running()]


def test_a_socket_is_not_shared_and_neither_is_a_port_in_use(tmp_path: Path) -> None:
    def refused(*flags: str) -> str:
        command = [sys.executable, "-m", "gateway", "--gateway-processes=2", *flags]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert ended.returncode != 0
        return ended.stderr

    assert "share a port" in refused(f"--uds={tmp_path}/gateway.sock")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "is in use" in refused(f"--port={taken.getsockname()[1]}")
