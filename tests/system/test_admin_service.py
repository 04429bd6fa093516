"""AdminService over gRPC: what WatchSteps shows is what ran, slow readers lose samples, Drain ends the process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
from google.protobuf.duration_pb2 import Duration
from stepwire.v1 import admin_pb2, admin_pb2_grpc

from tests.system.conftest import LIMIT_S, Stack, wait_until
from tests.system.ports import free_port

KEY = (("authorization", "Bearer admin-key"),)


@pytest.fixture
def watched(tiny_model: Path) -> Any:
    stack = Stack(tiny_model, worker_flags=["--sim-step-ms", "1"])
    stack.admin_port = free_port()  # type: ignore[attr-defined]
    stack.control_plane_flags = [
        "--admin-port",
        str(stack.admin_port),  # type: ignore[attr-defined]
        "--admin-api-key",
        "admin-key",
    ]
    with stack:
        yield stack


@pytest.fixture
async def admin(watched: Any) -> AsyncIterator[admin_pb2_grpc.AdminServiceStub]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{watched.admin_port}") as channel:
        yield admin_pb2_grpc.AdminServiceStub(channel)


def is_ready(stack: Stack) -> bool:
    return httpx.get(f"{stack.url}/ready", timeout=LIMIT_S).status_code == 200


async def complete(stack: Stack, **fields: Any) -> httpx.Response:
    body = {"prompt": list(range(10, 60)), "max_tokens": 40, "ignore_eos": True, **fields}
    async with httpx.AsyncClient(timeout=120) as client:
        return await client.post(f"{stack.url}/v1/completions", json=body)


async def test_watched_steps_are_what_ran_and_drain_ends_the_process(
    watched: Stack, admin: admin_pb2_grpc.AdminServiceStub
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await admin.Drain(admin_pb2.DrainRequest())
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    with pytest.raises(grpc.aio.AioRpcError) as wrong:
        async for _ in admin.WatchSteps(admin_pb2.WatchStepsRequest(interval=Duration(seconds=100)), metadata=KEY):
            pass
    assert wrong.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    # The public port does not have it at all.
    async with grpc.aio.insecure_channel(watched.grpc_address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as elsewhere:
            await admin_pb2_grpc.AdminServiceStub(channel).Drain(admin_pb2.DrainRequest(), metadata=KEY)
        assert elsewhere.value.code() is grpc.StatusCode.UNIMPLEMENTED

    # Two watchers: one keeps everything, one has room for a single step and must lose the others.
    request = admin_pb2.WatchStepsRequest(interval=Duration(nanos=20_000_000), max_steps=4096)
    tight = admin_pb2.WatchStepsRequest(interval=Duration(nanos=500_000_000), max_steps=1)
    all_of_it, newest = admin.WatchSteps(request, metadata=KEY), admin.WatchSteps(tight, metadata=KEY)
    await all_of_it.read()
    await newest.read()
    answers = [asyncio.create_task(complete(watched, prompt=list(range(start, start + 50)))) for start in (10, 80, 150)]
    steps: list[Any] = []
    num_first_tokens = num_running = 0
    while not all(task.done() for task in answers) or num_running:
        response = await all_of_it.read()
        assert response.num_lost_steps == 0
        steps += response.steps
        num_first_tokens += sum(response.time_to_first_token.counts)
        num_running = response.state.num_running_sequences
    response = await all_of_it.read()
    steps += response.steps
    num_first_tokens += sum(response.time_to_first_token.counts)
    assert [task.result().status_code for task in answers] == [200] * 3
    ids = [step.step_id for step in steps]
    assert ids == list(range(ids[0], ids[0] + len(ids))), "every step once, in order"
    # Three prompts of 50 tokens; the first token of each comes with its prefill, the other 39 by decoding.
    assert sum(step.num_prefill_tokens for step in steps) == 150
    assert sum(step.num_decode_tokens for step in steps) >= 3 * 39
    assert num_first_tokens == 3
    assert all(step.duration_ns >= step.forward_ns > 0 for step in steps)
    assert response.state.num_generated_tokens == 120 and response.state.num_kv_blocks > 0

    num_lost, num_kept = 0, 0
    while num_lost + num_kept < len(steps):
        response = await newest.read()
        assert len(response.steps) <= 1
        num_lost, num_kept = num_lost + response.num_lost_steps, num_kept + len(response.steps)
    assert num_lost > 0 and num_lost + num_kept == len(steps)
    all_of_it.cancel()
    newest.cancel()

    # A running request finishes, a new one is refused, and then the process is gone.
    with watched.paused():
        long = asyncio.create_task(complete(watched, max_tokens=600))
        await asyncio.to_thread(watched.wait_open, 1)
        draining = asyncio.ensure_future(admin.Drain(admin_pb2.DrainRequest(exit=True), metadata=KEY))
        # Its health says so before anything is refused.
        await asyncio.to_thread(wait_until, lambda: not is_ready(watched), LIMIT_S, watched.logs)
        assert (await complete(watched, max_tokens=1)).status_code == 503
    drained = await draining
    assert drained.is_drained and drained.num_open_requests == 0
    assert (await long).status_code == 200
    process = watched.processes.pop("control_plane")
    wait_until(lambda: process.poll() is not None, LIMIT_S, watched.logs)
    assert process.returncode == 0


def test_an_open_admin_port_needs_a_key() -> None:
    from control_plane.config import ControlPlaneSettings

    with pytest.raises(ValueError, match="--admin-api-key"):
        ControlPlaneSettings(admin_host="0.0.0.0", admin_port=1)
    ControlPlaneSettings(admin_host="0.0.0.0", admin_port=1, admin_api_key=("k",))
    ControlPlaneSettings(admin_host="::1", admin_port=1)
