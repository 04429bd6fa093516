"""A gateway whose data directory lies on a disk that is full: what needs no disk goes on, the rest waits or is told."""

from __future__ import annotations

import http.client
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.system.conftest import LIMIT_S, Stack, wait_until
from tests.system.http_streams import BODY, CHAT

DISK_BYTES = 2 << 20
FILES_BYTES = 3 << 20
NUM_LINES = 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small one of its own."""
    mount = tmp_path / "disk"
    mount.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(mount)]
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting is not permitted here: {error}")
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True, capture_output=True)


def fill(file: Path) -> None:
    with file.open("wb", buffering=0) as filling, pytest.raises(OSError, match="No space"):
        while True:
            filling.write(bytes(4096))


def announce(stack: Stack, num_bytes: int) -> tuple[int, str]:
    """What an upload is told of which nothing has come but its length."""
    connection = http.client.HTTPConnection("127.0.0.1", stack.port, timeout=LIMIT_S)
    connection.putrequest("POST", "/v1/files")
    connection.putheader("content-type", "multipart/form-data; boundary=x")
    connection.putheader("content-length", str(num_bytes))
    connection.endheaders()
    with connection.getresponse() as answer:
        told = answer.status, json.load(answer)["error"]["code"]
    connection.close()
    return told


def batch_lines() -> bytes:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 8}
    lines = ({"custom_id": str(n), "method": "POST", "url": "/v1/completions", "body": body} for n in range(NUM_LINES))
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def test_a_full_disk(tiny_model: Path, disk: Path) -> None:
    data = disk / "data"
    flags = ["--data-dir", str(data), "--files-max-total-bytes", str(FILES_BYTES)]
    with (
        Stack(tiny_model, worker_flags=["--sim-step-ms", "2"], gateway_flags=flags) as stack,
        openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0, timeout=LIMIT_S) as client,
        httpx.Client(base_url=stack.url, timeout=LIMIT_S) as rest,
    ):
        kept = client.responses.create(model="tiny", input="hi", max_output_tokens=4)
        uploaded = client.files.create(file=("lines.jsonl", batch_lines()), purpose="batch")

        def log() -> str:
            return (stack.directory / "gateway.log").read_text()

        with stack.paused():
            long = {"model": "tiny", "input": "hi", "max_output_tokens": 2000, "extra_body": {"ignore_eos": True}}
            background = client.responses.create(**long, background=True)  # type: ignore[call-overload]
            streamed_later = client.responses.create(**long, background=True, stream=True)  # type: ignore[call-overload]
            first = next(streamed_later)
            batch = client.batches.create(
                input_file_id=uploaded.id, endpoint="/v1/completions", completion_window="24h"
            )
            wait_until(lambda: client.batches.retrieve(batch.id).status == "in_progress", LIMIT_S, stack.logs)
            fill(disk / "fill")
        wait_until(lambda: "a batch waits until its results can be stored" in log(), LIMIT_S, stack.logs)
        assert client.batches.retrieve(batch.id).status == "in_progress"

        contents = sorted(path.name for path in (data / "files").iterdir())
        too_large = {"file": ("large.jsonl", bytes(DISK_BYTES), "application/jsonl")}
        refused = [
            rest.post("/v1/files", files=too_large, data={"purpose": "batch"}),
            *(rest.post("/v1/responses", json={"input": "hi" * 2000, "background": later}) for later in (False, True)),
        ]
        for answer in refused:
            assert (answer.status_code, answer.json()["error"]["code"]) == (507, "storage_unusable")
            assert answer.headers["x-should-retry"] == "false"
        for num_bytes, told in ((FILES_BYTES - (1 << 18), (507, "storage_unusable")), (8 << 20, (413, "files_full"))):
            assert announce(stack, num_bytes) == told
        assert sorted(path.name for path in (data / "files").iterdir()) == contents
        streamed = rest.post("/v1/responses", json={"input": "hi" * 2000, "stream": True, "max_output_tokens": 4})
        assert "response.completed" in streamed.text or "response.incomplete" in streamed.text
        assert rest.post(CHAT, json=BODY).status_code == 200
        assert client.responses.retrieve(kept.id).status == kept.status
        assert rest.get("/ready").status_code == 200

        wait_until(lambda: "background responses wait until they can be stored" in log(), LIMIT_S, stack.logs)
        stack.wait_idle()
        assert client.responses.retrieve(background.id).status in ("queued", "in_progress")

        (disk / "fill").unlink()
        # Those that ended meanwhile are stored late, with all their events.
        wait_until(lambda: client.responses.retrieve(background.id).status == "incomplete", LIMIT_S, stack.logs)
        numbers = [first.sequence_number, *(event.sequence_number for event in streamed_later)]
        assert numbers == list(range(len(numbers)))
        wait_until(lambda: client.batches.retrieve(batch.id).status == "completed", LIMIT_S, stack.logs)
        ended = client.batches.retrieve(batch.id)
        assert ended.request_counts is not None and ended.request_counts.completed == NUM_LINES
        assert ended.output_file_id is not None
        results = client.files.content(ended.output_file_id).text.splitlines()
        assert len({json.loads(line)["custom_id"] for line in results}) == len(results) == NUM_LINES
        assert client.responses.create(model="tiny", input="hi", max_output_tokens=4).id
        assert "Traceback" not in log()
        stack.wait_idle()
