"""The example clients run as they stand, against the real stack."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from google.rpc import error_details_pb2

from tests.system.conftest import ROOT, Stack

EXAMPLES = ROOT / "examples"


def run(command: list[str], directory: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "proto"), **extra}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=90)


def test_python(stack: Stack) -> None:
    client = [sys.executable, "client.py"]
    told = run([*client, stack.grpc_address, "Hello"], EXAMPLES / "python")
    assert told.returncode == 0 and told.stdout, told.stderr
    assert "health: SERVING" in told.stderr and "tokens" in told.stderr
    refused = run([*client, stack.grpc_address, "word " * 20_000], EXAMPLES / "python")
    assert refused.returncode == 1
    assert "INVALID_ARGUMENT" in refused.stderr and "chat.messages:" in refused.stderr


@pytest.fixture(scope="module")
def node_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with its packages installed beside it."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("no node and npm here (Debian: apt-get install nodejs npm)")
    directory = tmp_path_factory.mktemp("node")
    shutil.copytree(EXAMPLES / "typescript", directory, dirs_exist_ok=True)
    installed = subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund", "--loglevel=error"],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=150,
    )
    if installed.returncode != 0:
        pytest.skip(f"npm cannot install the example's packages: {installed.stderr[-300:]}")
    return directory


def test_node(stack: Stack, node_client: Path) -> None:
    google = Path(error_details_pb2.__file__).parents[2]
    paths = {"PROTO_PATHS": f"{ROOT / 'proto'}:{google}"}
    client = ["node", "client.mjs", stack.grpc_address]
    told = run([*client, "Hello"], node_client, **paths)
    assert told.returncode == 0 and told.stdout and "tokens" in told.stderr, told.stderr
    cancelled = run([*client, "Hello", "cancel"], node_client, **paths)
    assert "CANCELLED" in cancelled.stderr, cancelled.stderr
    stack.wait_idle()
    refused = run([*client, "word " * 20_000], node_client, **paths)
    assert refused.returncode == 1 and "INVALID_ARGUMENT" in refused.stderr
