"""A caller's trace, from its header to the log lines of both services."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from stepwire.v1 import inference_pb2 as pb
from stepwire.v1 import inference_pb2_grpc as pb_grpc

from tests.system.conftest import LIMIT_S, Stack, wait_until


@pytest.fixture(scope="module")
def logging_stack(tiny_model: Path) -> Iterator[Stack]:
    flags = ["--log-format=json", "--log-level=debug"]
    with Stack(tiny_model, control_plane_flags=flags, gateway_flags=flags) as running:
        yield running


def lines(stack: Stack, name: str, event: str) -> list[dict[str, Any]]:
    found = []
    for line in (stack.directory / f"{name}.log").read_text().splitlines():
        if line.startswith("{"):
            entry = json.loads(line)
            if entry.get("event") == event:
                found.append(entry)
    return found


def a_trace() -> tuple[str, str, str]:
    trace_id, span_id = uuid.uuid4().hex, uuid.uuid4().hex[:16]
    return f"00-{trace_id}-{span_id}-01", trace_id, span_id


def accepted_with(stack: Stack, trace_id: str, num_requests: int) -> list[dict[str, Any]]:
    def entries() -> list[dict[str, Any]]:
        return [e for e in lines(stack, "control_plane", "request accepted") if e.get("trace_id") == trace_id]

    wait_until(lambda: len(entries()) >= num_requests, LIMIT_S, stack.logs)
    return entries()


def test_a_rest_call_is_found_in_both_logs(logging_stack: Stack) -> None:
    header, trace_id, span_id = a_trace()
    body = {"model": "tiny", "prompt": ["one", "two"], "max_tokens": 2}
    with httpx.Client(base_url=logging_stack.url, timeout=LIMIT_S) as http:
        for headers in ({"traceparent": header}, {}, {"traceparent": "00-nonsense"}):
            assert http.post("/v1/completions", json=body, headers=headers).status_code == 200
    entries = accepted_with(logging_stack, trace_id, 2)
    assert len(entries) == 2 and {entry["parent_span_id"] for entry in entries} == {span_id}

    def access_lines() -> list[dict[str, Any]]:
        return [entry for entry in lines(logging_stack, "gateway", "request") if entry["route"] == "/v1/completions"]

    wait_until(lambda: len(access_lines()) >= 3, LIMIT_S, logging_stack.logs)
    access = access_lines()
    # The connection is the same for all three: nothing sticks to it.
    assert [entry.get("trace_id") for entry in access] == [trace_id, None, None]
    assert len([e for e in lines(logging_stack, "control_plane", "request accepted") if "trace_id" not in e]) == 4


def test_grpc_calls_and_requests_of_a_session(logging_stack: Stack) -> None:
    call_header, call_trace, _ = a_trace()
    own_header, own_trace, _ = a_trace()
    request = pb.GenerateRequest(text="hello", stop=pb.StopConditions(max_tokens=1))
    with grpc.insecure_channel(logging_stack.grpc_address) as channel:
        stub = pb_grpc.InferenceServiceStub(channel)
        list(stub.Generate(request, metadata=[("traceparent", call_header)]))
        assert len(accepted_with(logging_stack, call_trace, 1)) == 1
        messages = [
            pb.SessionRequest(tag=1, generate=pb.SessionGenerate(request=request, traceparent=own_header)),
            pb.SessionRequest(tag=2, generate=pb.SessionGenerate(request=request)),
        ]
        ended = set()
        session = stub.Session(iter_and_wait(messages, ended), metadata=[("traceparent", call_header)])
        for response in session:
            ended |= {each.tag for each in response.responses if each.response.HasField("usage")}
    assert len(accepted_with(logging_stack, own_trace, 1)) == 1
    assert len(accepted_with(logging_stack, call_trace, 2)) == 2


def iter_and_wait(messages: list[pb.SessionRequest], ended: set[int]) -> Iterator[pb.SessionRequest]:
    """The stream stays open until every tag has ended."""
    yield from messages
    wait_until(lambda: len(ended) == len(messages), LIMIT_S)
