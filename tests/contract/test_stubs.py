"""The committed stubs are what the contracts say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROTO = ROOT / "proto"


def test_generated_stubs_are_current(tmp_path: Path) -> None:
    subprocess.run([sys.executable, PROTO / "generate.py", "--out", tmp_path], check=True)
    fresh = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*_pb2*.py*")}
    committed = {
        path.relative_to(PROTO): path.read_text()
        for path in PROTO.rglob("*_pb2*.py*")
        if "__pycache__" not in path.parts
    }
    assert fresh.keys() == committed.keys()
    stale = [str(path) for path, text in fresh.items() if committed[path] != text]
    assert not stale, f"run `make proto`: {stale}"


def test_source_roots_are_not_packages() -> None:
    """`proto` would shadow proto-plus, and `kernels` Hugging Face's distribution of that name."""
    assert not (PROTO / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("module", ["worker_pb2", "inference_pb2"])
def test_field_numbers_are_never_reused(module: str) -> None:
    """Every enum starts with an unspecified zero, and no message uses a number that it reserves."""
    import importlib

    descriptor = importlib.import_module(f"stepwire.v1.{module}").DESCRIPTOR
    for enum in descriptor.enum_types_by_name.values():
        assert enum.values_by_number[0].name.endswith("_UNSPECIFIED")
    for message in descriptor.message_types_by_name.values():
        numbers = [field.number for field in message.fields]
        assert len(numbers) == len(set(numbers))
