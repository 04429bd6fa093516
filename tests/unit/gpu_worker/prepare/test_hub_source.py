"""Hugging Face ids, against a small hub of our own on this machine, and without any network."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from gpu_worker.prepare.preparation import prepare
from gpu_worker.prepare.progress import SilentProgress
from tests.unit.gpu_worker.loading.synthetic_gguf import write_gguf

REPOSITORY_ROOT = Path(__file__).resolve().parents[4]
COMMIT = "1" * 40


class _Hub(BaseHTTPRequestHandler):
    """Speaks as much of the hub's protocol as a download of one repository needs; counts what is fetched."""

    protocol_version = "HTTP/1.1"
    files: ClassVar[dict[str, bytes]] = {}
    fetched: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        if "/org/missing" in path:
            self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body)
        elif "/org/gated" in path:
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"}, with_body)
        elif "/revision/nowhere" in path:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, with_body)
        elif "/tree/" in path:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            self._send(200, json.dumps(entries).encode(), {}, with_body)
        elif path.startswith("/api/models/org/model"):
            info = {"id": "org/model", "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files]}
            self._send(200, json.dumps(info).encode(), {}, with_body)
        elif path.startswith(f"/org/model/resolve/{COMMIT}/"):
            name = path.removeprefix(f"/org/model/resolve/{COMMIT}/")
            if with_body:
                self.fetched.append(name)
            digest = hashlib.sha1(self.files[name]).hexdigest()
            self._send(200, self.files[name], {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT}, with_body)
        else:
            self._send(404, b"{}", {}, with_body)

    def _send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("hub")
    write_gguf(directory / "m.gguf")
    made = prepare(directory / "m.gguf", directory / "cache", progress=SilentProgress()).path
    _Hub.files = {path.name: path.read_bytes() for path in made.iterdir()}
    _Hub.files |= {name: b"not wanted" for name in ("pytorch_model.bin", "README.md", "consolidated.safetensors")}
    _Hub.files["onnx/model.safetensors"] = b"not wanted"
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def _run(endpoint: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the hub's library reads its settings when it is imported."""
    return subprocess.run(
        [sys.executable, "-m", "gpu_worker.prepare", *arguments, "--cache-dir", str(home / "cache")],
        env={
            "PYTHONPATH": str(REPOSITORY_ROOT),
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HOME": str(home),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )


def _error_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 1, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    return errors[0]


def test_weights_and_json_are_downloaded_and_nothing_else(hub: str, tmp_path: Path) -> None:
    _Hub.fetched.clear()
    result = _run(hub, tmp_path, "org/model")
    assert result.returncode == 0, result.stderr
    directory = Path(result.stdout.strip())
    assert {path.name for path in directory.iterdir()} == set(_Hub.fetched)
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= set(_Hub.fetched)
    assert not {"pytorch_model.bin", "README.md", "consolidated.safetensors"} & set(_Hub.fetched)
    assert not any(name.startswith("onnx") for name in _Hub.fetched)
    assert (directory / "model.safetensors").read_bytes() == _Hub.files["model.safetensors"]
    # what is there is used when the hub cannot be reached any more
    again = _run("http://127.0.0.1:9", tmp_path, "org/model")
    assert again.returncode == 0, again.stderr
    assert again.stdout == result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("org/missing",), "'org/missing' is neither a path that exists nor a repository you can see"),
        (("org/gated",), "'org/gated' is gated: accept its terms on the page of the model, then log in"),
        (("org/model", "--revision", "nowhere"), "'org/model' has no revision 'nowhere': check --revision"),
    ],
)
def test_what_the_hub_refuses(hub: str, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    assert message in _error_line(_run(hub, tmp_path, *arguments))


def test_no_network(tmp_path: Path) -> None:
    line = _error_line(_run("http://127.0.0.1:9", tmp_path, "org/model"))
    assert "'org/model' is not on this machine, and the Hugging Face hub cannot be reached" in line
    assert "download the model elsewhere and give its directory" in line
