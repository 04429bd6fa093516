"""A data directory, or what is in it, that somebody deletes under a running gateway."""

from __future__ import annotations

import shutil
from pathlib import Path

import httpx
import openai
import pytest

from tests.system.conftest import LIMIT_S, Stack, wait_until
from tests.system.http_streams import BODY, CHAT

LINES = b'{"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", "max_tokens": 2}}\n'
LONG = {"model": "tiny", "input": "hi", "max_output_tokens": 2000, "background": True, "ignore_eos": True}
UPLOAD = {"file": ("lines.jsonl", LINES, "application/jsonl")}


def test_the_directory_of_the_files_is_cleared_away(tiny_model: Path, tmp_path: Path) -> None:
    """Its files have gone, and others have a place; a connection that was told of it takes the next request."""
    with (
        Stack(tiny_model, gateway_flags=["--data-dir", str(tmp_path)]) as stack,
        httpx.Client(base_url=stack.url, timeout=LIMIT_S) as rest,
    ):
        gone = rest.post("/v1/files", files=UPLOAD, data={"purpose": "batch"}).json()["id"]
        shutil.rmtree(tmp_path / "files")
        told = rest.get(f"/v1/files/{gone}/content")
        assert (told.status_code, told.json()["error"]["code"]) == (404, "file_not_found")
        uploaded = rest.post("/v1/files", files=UPLOAD, data={"purpose": "batch"})
        assert uploaded.status_code == 200
        assert rest.get(f"/v1/files/{uploaded.json()['id']}/content").content == LINES
        assert rest.delete(f"/v1/files/{gone}").status_code == 200


def test_the_whole_directory_is_deleted(tiny_model: Path, tmp_path: Path) -> None:
    """Nothing is taken that would be lost with the process; what stores nothing goes on, and nobody waits for ever."""
    data = tmp_path / "data"
    with (
        Stack(tiny_model, gateway_flags=["--data-dir", str(data)], worker_flags=["--sim-step-ms", "2"]) as stack,
        openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0, timeout=LIMIT_S) as client,
        httpx.Client(base_url=stack.url, timeout=LIMIT_S) as rest,
    ):
        with rest.stream("POST", "/v1/responses", json={**LONG, "stream": True}) as stream:
            lines = stream.iter_lines()
            while "output_text.delta" not in next(lines):
                pass
            shutil.rmtree(data)
            events = [line for line in lines if line.startswith("event: ")]
        assert events[-1] == "event: error"
        for answer in (
            rest.post("/v1/responses", json={"input": "hi", "max_output_tokens": 2}),
            rest.post("/v1/responses", json=LONG),
            rest.post("/v1/files", files=UPLOAD, data={"purpose": "batch"}),
            rest.get("/v1/files"),
            rest.get("/v1/batches"),
        ):
            assert (answer.status_code, answer.json()["error"]["code"]) == (507, "storage_unusable")
        assert rest.post(CHAT, json=BODY).status_code == 200
        assert client.responses.create(model="tiny", input="hi", max_output_tokens=2, store=False).id
        log = (stack.directory / "gateway.log").read_text()
        assert f"the data directory {data} was deleted or moved" in log
        assert "Traceback" not in log
        wait_until(lambda: stack.gateway_metric("stepwire_gateway_open_streams") == 0, LIMIT_S, stack.logs)
        stack.wait_idle()


@pytest.mark.slow
def test_several_processes_say_it_once_each(tiny_model: Path, tmp_path: Path) -> None:
    """Those that only wait for work in the store do not fill the log with it."""
    data = tmp_path / "data"
    flags = ["--data-dir", str(data), "--gateway-processes", "2"]
    with Stack(tiny_model, gateway_flags=flags) as stack:

        def log() -> str:
            return (stack.directory / "gateway.log").read_text()

        wait_until(lambda: "all processes listen" in log(), LIMIT_S, stack.logs)
        shutil.rmtree(data)
        for _ in range(20):
            # Each over a connection of its own: either process.
            assert httpx.get(f"{stack.url}/v1/batches", timeout=LIMIT_S).status_code == 507
        wait_until(lambda: log().count("the stored batches cannot be read") == 2, LIMIT_S, stack.logs)
        assert "Traceback" not in log()
