"""gRPC takes an option that it does not know without a word, and of one that is given twice the last."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from grpc._cython import cygrpc

from control_plane.core import worker_link
from control_plane.frontend import server as frontend
from gateway import client
from gpu_worker import server as worker
from gpu_worker.parallel import nodes

ROOT = Path(__file__).resolve().parents[2]
_OPTION = re.compile(r'\("(grpc\.[a-z0-9_.]+)",')
_SOURCES = ("gateway", "control_plane", "gpu_worker", "proto/stepwire/process", "docker")
_OPTIONS_OF_BOTH_SIDES = {
    "gateway's channel": client.CHANNEL_OPTIONS,
    "control plane": frontend.SERVER_OPTIONS,
    "control plane's channel": worker_link.CHANNEL_OPTIONS,
    "worker": worker.SERVER_OPTIONS,
    "group of nodes": nodes.GROUP_OPTIONS,
}


def test_every_option_is_one_that_grpc_knows() -> None:
    files = [file for source in _SOURCES for file in (ROOT / source).rglob("*.py")]
    names = {name for file in files for name in _OPTION.findall(file.read_text("utf-8"))}
    assert {"grpc.keepalive_time_ms", "grpc.enable_http_proxy"} <= names
    library = Path(cygrpc.__file__).read_bytes()
    assert [name for name in sorted(names) if f"{name}\0".encode() not in library] == []


@pytest.mark.parametrize("side", _OPTIONS_OF_BOTH_SIDES)
def test_options_are_given_once_and_the_other_end_is_known_to_live(side: str) -> None:
    options: Sequence[tuple[str, int | str]] = _OPTIONS_OF_BOTH_SIDES[side]
    times_given = Counter(name for name, _ in options)
    assert [name for name, times in times_given.items() if times > 1] == []
    values = dict(options)
    # The shorter of a keepalive's two limits is not the one that counts.
    assert values["grpc.http2.ping_timeout_ms"] == values["grpc.keepalive_timeout_ms"]
