"""The real gRPC server over a scripted core, for the tests of what its clients see."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from prometheus_client import CollectorRegistry
from pydantic import SecretStr
from stepwire.v1 import inference_pb2 as pb
from stepwire.v1 import inference_pb2_grpc as pb_grpc

from control_plane.config import ControlPlaneSettings
from control_plane.frontend.served_model import ServedModel
from control_plane.frontend.server import FrontendServer, create_server
from tests.unit.control_plane.frontend import tokenizers_for_tests as kinds
from tests.unit.control_plane.frontend.scripted_engine import ScriptedEngine

# On a machine that may be busy; it only ends a test that has failed.
LIMIT_S = 90.0


class Running:
    def __init__(self, server: FrontendServer, engine: ScriptedEngine, channel: grpc.aio.Channel) -> None:
        self.server = server
        self.engine = engine
        self.channel = channel
        self.stub = pb_grpc.InferenceServiceStub(channel)

    async def request_id(self) -> str:
        """Of the one request that the core has."""
        await until(lambda: len(self.engine.sinks) == 1)
        return self.engine.only()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def serving(
    model: ServedModel, *, engine: ScriptedEngine | None = None, keys: Sequence[str] = ()
) -> AsyncIterator[Running]:
    engine = engine or ScriptedEngine()
    settings = ControlPlaneSettings(grpc_port=0, api_key=tuple(map(SecretStr, keys)))
    server = await create_server(settings, engine, model, CollectorRegistry())
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield Running(server, engine, channel)
    await server.stop(0)


def ids(text: str) -> list[int]:
    return kinds.byte_level().encode(text).ids


def token_request(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6]), **fields)


async def error_of(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        async with asyncio.timeout(LIMIT_S):
            if hasattr(call, "read"):
                await call.read()
            else:
                await call
    return raised.value


async def details_of(call: Any) -> dict[str, Any]:
    """google.rpc details by the name of their message."""
    await error_of(call)
    status = await rpc_status.aio.from_call(call)
    assert status is not None
    found = {}
    for detail in status.details:
        kind = getattr(error_details_pb2, detail.TypeName().rpartition(".")[2])
        message = kind()
        assert detail.Unpack(message)
        found[kind.__name__] = message
    return found


async def open_session(running: Running, tags: Sequence[int], **fields: Any) -> tuple[Any, dict[int, str]]:
    """A session with requests of these tags, all accepted; tag -> request id."""
    session = running.stub.Session()
    request_ids: dict[int, str] = {}
    for tag in tags:
        await session.write(pb.SessionRequest(tag=tag, generate=pb.SessionGenerate(request=token_request(), **fields)))
    while len(request_ids) < len(tags):
        for tagged in (await session.read()).responses:
            request_ids[tagged.tag] = tagged.response.accepted.request_id
    return session, request_ids
