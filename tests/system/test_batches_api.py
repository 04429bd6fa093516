"""/v1/files and /v1/batches with the official client against the real stack."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from tests.system.conftest import LIMIT_S, Stack

CHAT = "/v1/chat/completions"
# Counts are saved five times a second.
POLL_S = 0.1
ENDED = ("completed", "failed", "expired", "cancelled")


@pytest.fixture(scope="module")
def batching(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    data = tmp_path_factory.mktemp("data")
    flags = ["--data-dir", str(data), "--batch-concurrency", "4", "--files-max-bytes", "1000000"]
    with Stack(tiny_model, gateway_flags=flags, worker_flags=["--sim-step-ms", "10"]) as running:
        yield running


@pytest.fixture
async def client(batching: Stack) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{batching.url}/v1", api_key="any", max_retries=0, timeout=120) as opened:
        yield opened


def line(number: int, url: str = CHAT, **body: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"max_tokens": 8, "seed": number, **body}
    if url == CHAT:
        made.setdefault("messages", [{"role": "user", "content": f"question {number}"}])
    return {"custom_id": f"r{number}", "method": "POST", "url": url, "body": made}


async def begin(client: AsyncOpenAI, lines: list[dict[str, Any]], endpoint: str = CHAT) -> Any:
    content = "\n".join(map(json.dumps, lines)).encode()
    file = await client.files.create(file=("in.jsonl", content), purpose="batch")
    assert (file.bytes, file.filename, file.purpose) == (len(content), "in.jsonl", "batch")
    return await client.batches.create(
        input_file_id=file.id,
        endpoint=endpoint,  # type: ignore[arg-type]
        completion_window="24h",
        metadata={"who": "test"},
    )


async def ended(client: AsyncOpenAI, batch_id: str, limit_s: float = 60) -> Any:
    async with asyncio.timeout(limit_s):
        while (batch := await client.batches.retrieve(batch_id)).status not in ENDED:
            await asyncio.sleep(POLL_S)
    return batch


async def results(client: AsyncOpenAI, file_id: str | None) -> dict[str, Any]:
    assert file_id is not None
    text = (await client.files.content(file_id)).text
    lines = [json.loads(line) for line in text.splitlines()]
    made = {line["custom_id"]: line for line in lines}
    assert len(made) == len(lines), "one result a request"
    return made


async def test_a_batch_gives_what_the_requests_give(client: AsyncOpenAI) -> None:
    lines = [line(number) for number in range(6)] + [line(6, messages=[]), line(7, model="nobody")]
    batch = await begin(client, lines)
    assert batch.status == "validating" and batch.metadata == {"who": "test"}
    batch = await ended(client, batch.id)
    assert batch.status == "completed", batch
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (8, 6, 2)
    good, bad = await results(client, batch.output_file_id), await results(client, batch.error_file_id)
    assert good.keys() == {f"r{number}" for number in range(6)}
    assert {key: value["response"]["status_code"] for key, value in bad.items()} == {"r6": 400, "r7": 404}
    alone = await client.chat.completions.create(**lines[3]["body"], model="tiny")
    told = good["r3"]["response"]["body"]
    assert told["choices"][0]["message"]["content"] == alone.choices[0].message.content
    listed = [item.id async for item in client.batches.list()]
    assert batch.id in listed
    purposes = {file.id: file.purpose async for file in client.files.list()}
    assert purposes[batch.output_file_id] == "batch_output"

    texts = await begin(client, [line(0, "/v1/completions", prompt="The capital")], "/v1/completions")
    texts = await ended(client, texts.id)
    assert (await results(client, texts.output_file_id))["r0"]["response"]["body"]["object"] == "text_completion"


async def test_a_batch_of_responses(client: AsyncOpenAI) -> None:
    """They are in the output file alone."""
    url = "/v1/responses"
    bodies: list[dict[str, Any]] = [{"input": f"question {number}", "max_output_tokens": 8} for number in range(3)]
    bodies += [{"input": "x", "background": True}, {"input": "x", "previous_response_id": "resp_x"}]
    lines = [
        {"custom_id": f"r{number}", "method": "POST", "url": url, "body": {"seed": number, **body}}
        for number, body in enumerate(bodies)
    ]
    batch = await ended(client, (await begin(client, lines, url)).id)
    assert (batch.request_counts.completed, batch.request_counts.failed) == (3, 2)
    good, bad = await results(client, batch.output_file_id), await results(client, batch.error_file_id)
    alone = await client.responses.create(model="tiny", extra_body={"seed": 1}, **bodies[1])
    told = good["r1"]["response"]["body"]
    assert told["output"][0]["content"][0]["text"] == alone.output_text and told["status"] == alone.status
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(told["id"])
    params = {key: value["response"]["body"]["error"]["param"] for key, value in bad.items()}
    assert params == {"r3": "background", "r4": "previous_response_id"}


async def test_wrong_input_files_fail_with_the_lines_named(client: AsyncOpenAI) -> None:
    wrong = [line(1), line(1), {**line(2), "url": "/v1/completions"}, {"custom_id": "x"}]
    batch = await ended(client, (await begin(client, wrong)).id)
    assert batch.status == "failed" and batch.output_file_id is None
    assert [problem.line for problem in batch.errors.data] == [2, 3, 4]
    with pytest.raises(openai.NotFoundError):
        await client.batches.create(input_file_id="file-none", endpoint=CHAT, completion_window="24h")
    with pytest.raises(openai.BadRequestError, match="endpoint"):
        await begin(client, [line(1)], "/v1/moderations")


async def test_a_cancelled_batch_keeps_what_was_answered(client: AsyncOpenAI, batching: Stack) -> None:
    lines = [line(number, max_tokens=4 if number < 4 else 3000, ignore_eos=True) for number in range(40)]
    batch = await begin(client, lines)
    async with asyncio.timeout(120):
        while (counts := (await client.batches.retrieve(batch.id)).request_counts).completed < 4:
            await asyncio.sleep(POLL_S)
    # They are counted while those that take half a minute run on.
    assert counts.completed == 4
    # Bounded: four run at a time, and fewer while others are being answered.
    assert batching.control_plane_metric("stepwire_requests_running") <= 4
    cancelled = await client.batches.cancel(batch.id)
    assert cancelled.status == "cancelled"
    assert len(await results(client, cancelled.output_file_id)) >= 4
    batching.wait_idle()
    with pytest.raises(openai.ConflictError):
        await client.batches.cancel(batch.id)


async def test_a_batch_survives_the_death_of_the_gateway_and_of_the_control_plane(
    client: AsyncOpenAI, batching: Stack
) -> None:
    """Each request is answered once, with the text that it would have had."""
    lines = [line(number, max_tokens=40, ignore_eos=True) for number in range(60)]
    batch = await begin(client, lines)
    for name in ("gateway", "control_plane"):
        async with asyncio.timeout(120):
            before = (await client.batches.retrieve(batch.id)).request_counts.completed
            while (await client.batches.retrieve(batch.id)).request_counts.completed < before + 5:
                await asyncio.sleep(POLL_S)
        with batching.paused():
            assert (await client.batches.retrieve(batch.id)).status == "in_progress"
            batching.kill(name)
        batching.start(name)
        batching.wait_ready()
    batch = await ended(client, batch.id)
    assert (batch.status, batch.request_counts.completed) == ("completed", 60), batching.logs()
    assert (await results(client, batch.output_file_id)).keys() == {f"r{number}" for number in range(60)}


async def test_what_a_killed_gateway_leaves_is_removed_by_the_next(client: AsyncOpenAI, batching: Stack) -> None:
    """Half an upload goes; what is a file's, a running batch's or somebody else's stays."""
    files = Path(batching.gateway_flags[1]) / "files"
    kept = await client.files.create(file=("a.txt", b"abc"), purpose="user_data")
    batch = await begin(client, [line(number, max_tokens=40, ignore_eos=True) for number in range(20)])
    async with asyncio.timeout(120):
        while (await client.batches.retrieve(batch.id)).request_counts.completed < 5:
            await asyncio.sleep(POLL_S)
    with batching.paused():
        batching.kill("gateway")
        before = {path.name for path in files.iterdir()}
        # As kill -9 leaves them between a file's first byte and its place among the files.
        orphans = [files / f"file-{number:032x}" for number in range(2)]
        strangers = [files / name for name in ("notes.txt", "file-short", f"file-{'A' * 32}")]
        for path in (*orphans, *strangers):
            path.write_bytes(b"half")
    batching.start("gateway")
    batching.wait_ready()
    assert not any(path.exists() for path in orphans)
    assert all(path.exists() for path in strangers)
    assert before <= {path.name for path in files.iterdir()}
    assert (await client.files.content(kept.id)).content == b"abc"
    ended_batch = await ended(client, batch.id)
    assert (await results(client, ended_batch.output_file_id)).keys() == {f"r{number}" for number in range(20)}
    (told,) = [text for text in batching.logs().splitlines() if "has left unfinished" in text]
    assert "num_bytes=8 num_files=2" in told
    for path in strangers:
        path.unlink()
    await client.files.delete(kept.id)


async def test_files_are_kept_deleted_and_bounded(client: AsyncOpenAI, batching: Stack) -> None:
    file = await client.files.create(file=("a.txt", b"\x00\xffabc"), purpose="user_data")
    assert (await client.files.content(file.id)).content == b"\x00\xffabc"
    assert (await client.files.retrieve(file.id)).bytes == 5
    other = await client.files.create(file=("b.txt", b"b"), purpose="user_data")
    listed = [each.id async for each in client.files.list(purpose="user_data", order="asc", limit=1)]
    assert listed == [file.id, other.id]
    assert [each.id async for each in client.files.list(purpose="user_data")] == [other.id, file.id]
    assert (await client.files.delete(file.id)).deleted and (await client.files.delete(other.id)).deleted
    with pytest.raises(openai.NotFoundError):
        await client.files.content(file.id)
    # Refused by its announced length, before any of it is read.
    connection = http.client.HTTPConnection("127.0.0.1", batching.port)
    connection.putrequest("POST", "/v1/files")
    connection.putheader("content-type", "multipart/form-data; boundary=x")
    connection.putheader("content-length", "2000000")
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()
    async with httpx.AsyncClient(base_url=batching.url, timeout=LIMIT_S) as raw:
        for answer in (
            await raw.post("/v1/files", json={}),
            await raw.post("/v1/files", files={"file": ("a", b"a")}, data={"purpose": "nothing"}),
            await raw.post("/v1/files", data={"purpose": "batch", "file": "no file"}),
            await raw.post("/v1/files", content=b"broken", headers={"content-type": "multipart/form-data; boundary=x"}),
            await raw.get("/v1/files", params={"limit": "many"}),
            await raw.get("/v1/files/..%2F..%2Fetc%2Fpasswd/content"),
        ):
            assert 400 <= answer.status_code < 500 and "message" in answer.json()["error"], answer.text


def test_a_directory_belongs_to_one_gateway(batching: Stack) -> None:
    from gateway.store import Store, StoreError

    directory = Path(batching.gateway_flags[1])
    with pytest.raises(StoreError, match="another gateway"):
        Store(directory)


async def test_what_is_not_answered_in_time_has_expired(tiny_model: Path) -> None:
    """What was answered is kept; everything else has its line, and nothing of it goes on."""
    flags = ["--batch-concurrency=2", "--batch-window-s=6"]
    with Stack(tiny_model, gateway_flags=flags, worker_flags=["--sim-step-ms", "50"]) as short:
        async with AsyncOpenAI(base_url=f"{short.url}/v1", api_key="any", max_retries=0, timeout=120) as client:
            lines = [line(number, max_tokens=4 if number < 3 else 4000, ignore_eos=True) for number in range(8)]
            batch = await ended(client, (await begin(client, lines)).id)
            assert batch.status == "expired" and batch.expired_at >= batch.expires_at
            assert (batch.request_counts.completed, batch.request_counts.failed) == (3, 5)
            assert (await results(client, batch.output_file_id)).keys() == {"r0", "r1", "r2"}
            bad = await results(client, batch.error_file_id)
            assert bad.keys() == {f"r{number}" for number in range(3, 8)}
            assert {(each["response"], each["error"]["code"]) for each in bad.values()} == {(None, "batch_expired")}
            await asyncio.to_thread(short.wait_idle)


@pytest.mark.parametrize("policy", ["fcfs", pytest.param("priority", marks=pytest.mark.slow)])
async def test_interactive_requests_do_not_wait_for_a_batch(tiny_model: Path, policy: str) -> None:
    """A batch that fills every row and goes on for long; a request that comes later is served before it."""
    crowded = ["--sim-step-ms=40", "--sim-max-num-seqs=4", "--sim-strict"]
    plane = [f"--scheduling-policy={policy}"]
    with Stack(
        tiny_model, worker_flags=crowded, control_plane_flags=plane, gateway_flags=["--batch-concurrency=8"]
    ) as full:
        async with AsyncOpenAI(base_url=f"{full.url}/v1", api_key="any", max_retries=0, timeout=120) as client:
            lines = [line(number, max_tokens=100, ignore_eos=True) for number in range(8)]
            batch = await begin(client, lines)
            async with asyncio.timeout(120):
                while full.control_plane_metric("stepwire_requests_waiting") < 4:
                    await asyncio.sleep(0.02)
            answers = await asyncio.gather(
                *(
                    client.completions.create(model="tiny", prompt=f"{number} asks", max_tokens=4, seed=number)
                    for number in range(4)
                )
            )
            assert all(answer.usage and answer.usage.completion_tokens for answer in answers)
            assert full.control_plane_metric("stepwire_preemptions_total") >= 1
            assert (await client.batches.retrieve(batch.id)).request_counts.completed == 0
            batch = await ended(client, batch.id)
            assert batch.request_counts.completed == 8
            told = (await results(client, batch.output_file_id))["r5"]["response"]["body"]
            assert told["usage"]["completion_tokens"] == 100
