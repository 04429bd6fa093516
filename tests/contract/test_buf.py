"""The public contracts by buf's rules: well formed, and compatible with what was released (`proto/released.binpb`)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet

ROOT = Path(__file__).resolve().parents[2]
BUF = Path(sys.executable).parent / "buf"
RELEASED = ROOT / "proto" / "released.binpb"
LINT = {"version": "v1", "lint": {"use": ["STANDARD"], "ignore": ["google"]}}
# The worker's contract is between two processes of one version.
BREAKING = {"version": "v1", "breaking": {"use": ["WIRE_JSON"], "ignore": ["google", "stepwire/v1/worker.proto"]}}

pytestmark = pytest.mark.skipif(not BUF.exists(), reason="buf is not installed (pip install buf-bin)")


@pytest.fixture(scope="module")
def current(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("descriptor") / "current.binpb"
    subprocess.run([sys.executable, ROOT / "proto" / "generate.py", "--descriptor", file], check=True)
    return file


def buf(arguments: Sequence[str | Path], config: dict[str, object]) -> subprocess.CompletedProcess[str]:
    command = [BUF, *arguments, "--config", json.dumps(config)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_contracts_are_lint_clean(current: Path) -> None:
    told = buf(["lint", current], LINT)
    assert told.returncode == 0, told.stdout + told.stderr


def test_nothing_that_was_released_is_broken(current: Path) -> None:
    told = buf(["breaking", current, "--against", RELEASED], BREAKING)
    assert told.returncode == 0, told.stdout + told.stderr


def test_a_broken_contract_is_noticed(current: Path, tmp_path: Path) -> None:
    """A field that changes its type, and one that goes without its number being reserved."""
    files = FileDescriptorSet.FromString(current.read_bytes())
    (inference,) = [file for file in files.file if file.name.endswith("inference.proto")]
    (usage,) = [message for message in inference.message_type if message.name == "Usage"]
    usage.field[0].type = usage.field[0].TYPE_STRING
    del usage.field[1]
    broken = tmp_path / "broken.binpb"
    broken.write_bytes(files.SerializeToString())
    told = buf(["breaking", broken, "--against", RELEASED], BREAKING)
    assert told.returncode != 0
    assert "num_prompt_tokens" in told.stdout and "num_completion_tokens" in told.stdout


def test_everything_public_is_described(current: Path) -> None:
    """Every method, field and value of the public contract has a comment of its own."""
    files = FileDescriptorSet.FromString(current.read_bytes())
    missing = []
    for file in files.file:
        if file.name != "stepwire/v1/inference.proto":
            continue
        comments = {
            tuple(place.path): (place.leading_comments + place.trailing_comments).strip()
            for place in file.source_code_info.location
        }
        named = [
            ((4, outer, 2, inner), f"{message.name}.{each.name}")
            for outer, message in enumerate(file.message_type)
            for inner, each in enumerate(message.field)
        ]
        named += [
            ((5, outer, 2, inner), each.name)
            for outer, enum in enumerate(file.enum_type)
            for inner, each in enumerate(enum.value)
        ]
        named += [
            ((6, outer, 2, inner), each.name)
            for outer, service in enumerate(file.service)
            for inner, each in enumerate(service.method)
        ]
        assert len(named) > 150
        missing += [name for path, name in named if not comments.get(path)]
    assert not missing
