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

from gpu_worker.prepare.errors import PrepareError
from gpu_worker.prepare.hub_source import choose_gguf
from gpu_worker.prepare.preparation import prepare
from gpu_worker.prepare.progress import SilentProgress
from tests.unit.gpu_worker.loading.synthetic_gguf import write_gguf

REPOSITORY_ROOT = Path(__file__).resolve().parents[4]
COMMIT = "1" * 40


class _Hub(BaseHTTPRequestHandler):
    """Speaks as much of the hub's protocol as a download of one repository needs; counts what is fetched."""

    protocol_version = "HTTP/1.1"
    repos: ClassVar[dict[str, dict[str, bytes]]] = {}
    fetched: ClassVar[list[str]] = []

    @classmethod
    def _repo_of(cls, path: str) -> str:
        return next((name for name in cls.repos if f"/{name}/" in f"{path}/"), "none")

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
                for name, data in self.repos[self._repo_of(path)].items()
            ]
            self._send(200, json.dumps(entries).encode(), {}, with_body)
        elif path.startswith(f"/api/models/{self._repo_of(path)}"):
            names = self.repos[self._repo_of(path)]
            info = {"id": self._repo_of(path), "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            self._send(200, json.dumps(info).encode(), {}, with_body)
        elif f"/resolve/{COMMIT}/" in path:
            name = path.partition(f"/resolve/{COMMIT}/")[2]
            content = self.repos[self._repo_of(path)][name]
            if with_body:
                self.fetched.append(name)
            digest = hashlib.sha1(content).hexdigest()
            self._send(200, content, {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT}, with_body)
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
    files = {path.name: path.read_bytes() for path in made.iterdir()}
    files |= {name: b"not wanted" for name in ("pytorch_model.bin", "README.md", "consolidated.safetensors")}
    files["onnx/model.safetensors"] = b"not wanted"
    packed = (directory / "m.gguf").read_bytes()
    other = {"README.md": b"not wanted", "mmproj-F16.gguf": b"not wanted"}
    _Hub.repos = {
        "org/model": files,
        "org/several": other | {f"m-{kind}.gguf": packed for kind in ("Q8_0", "Q4_K_M", "IQ2_XXS")},
        "org/unusual": other | {"BF16/m-BF16.gguf": packed, "m-Q6_K.gguf": packed, "m-Q6_K_L.gguf": packed},
    }
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
    assert (directory / "model.safetensors").read_bytes() == _Hub.repos["org/model"]["model.safetensors"]
    # what is there is used when the hub cannot be reached any more
    again = _run("http://127.0.0.1:9", tmp_path, "org/model")
    assert again.returncode == 0, again.stderr
    assert again.stdout == result.stdout


def test_one_gguf_file_of_a_repository(hub: str, tmp_path: Path) -> None:
    _Hub.fetched.clear()
    result = _run(hub, tmp_path, "org/several")
    assert result.returncode == 0, result.stderr
    assert _Hub.fetched == ["m-Q4_K_M.gguf"]
    assert "Taking m-Q4_K_M.gguf of org/several: another of its files would be org/several:KIND" in result.stderr
    made = {path.name for path in Path(result.stdout.strip()).iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= made
    # what is there is used when the hub cannot be reached any more
    again = _run("http://127.0.0.1:9", tmp_path, "org/several:Q4_K_M")
    assert (again.returncode, again.stdout) == (0, result.stdout), again.stderr


def test_a_gguf_file_in_a_directory_of_its_own(hub: str, tmp_path: Path) -> None:
    _Hub.fetched.clear()
    result = _run(hub, tmp_path, "org/unusual:bf16")
    assert result.returncode == 0, result.stderr
    assert _Hub.fetched == ["BF16/m-BF16.gguf"]
    assert "Taking" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("org/missing",), "'org/missing' is neither a path that exists nor a repository you can see"),
        (("org/gated",), "'org/gated' is gated: accept its terms on the page of the model, then log in"),
        (("org/unusual",), "has no GGUF files of kind Q4_K_M: name one of BF16/m-BF16, m-Q6_K, m-Q6_K_L"),
        (("org/model", "--revision", "nowhere"), "'org/model' has no revision 'nowhere': check --revision"),
    ],
)
def test_what_the_hub_refuses(hub: str, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    assert message in _error_line(_run(hub, tmp_path, *arguments))


def test_no_network(tmp_path: Path) -> None:
    line = _error_line(_run("http://127.0.0.1:9", tmp_path, "org/model"))
    assert "'org/model' is not on this machine, and the Hugging Face hub cannot be reached" in line
    assert "download the model elsewhere and give its directory" in line


OTHERS = ["README.md", "mmproj-F16.gguf", "imatrix_unsloth.gguf"]


@pytest.mark.parametrize(
    ("files", "kind", "chosen"),
    [
        (["m.gguf"], None, "m.gguf"),
        (["m-Q6_K.gguf"], None, "m-Q6_K.gguf"),
        (["m-Q6_K.gguf", "m-Q6_K_L.gguf"], "q6_k", "m-Q6_K.gguf"),
        (["m_Q4_0.gguf", "m_Q8_0.gguf"], "Q8_0", "m_Q8_0.gguf"),
        (["m.Q5_K_M.gguf", "m.Q4_K_M.gguf"], None, "m.Q4_K_M.gguf"),
        (["m-UD-Q4_K_XL.gguf", "m-Q4_K_XL.gguf"], "m-Q4_K_XL", "m-Q4_K_XL.gguf"),
    ],
)
def test_which_file_is_taken(files: list[str], kind: str | None, chosen: str) -> None:
    assert choose_gguf("org/m", OTHERS + files, kind) == [chosen]


@pytest.mark.parametrize(
    ("files", "kind", "message"),
    [
        ([], "Q4_K_M", "'org/m' has no GGUF file$"),
        (["m-Q8_0.gguf", "m-Q6_K.gguf"], None, "has no GGUF files of kind Q4_K_M: name one of m-Q6_K, m-Q8_0 as"),
        (["m-Q8_0.gguf"], "Q5_K_M", "has no GGUF files of kind Q5_K_M: name one of m-Q8_0 as org/m:KIND"),
        (["m-UD-Q4_K_XL.gguf", "m-Q4_K_XL.gguf"], "Q4_K_XL", "has 2 GGUF files of kind Q4_K_XL"),
        (["m-Q8_0-00001-of-00002.gguf"], "Q8_0", "has 1 of 2 parts of m-Q8_0-00001-of-00002.gguf"),
    ],
)
def test_no_one_file_to_take(files: list[str], kind: str | None, message: str) -> None:
    with pytest.raises(PrepareError, match=message):
        choose_gguf("org/m", OTHERS + files, kind)


def test_files_in_parts_are_one_model() -> None:
    parts = [f"UD/m-Q4_K_XL-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
    assert choose_gguf("org/m", [*OTHERS, *reversed(parts), "m-Q8_0.gguf"], "Q4_K_XL") == parts
