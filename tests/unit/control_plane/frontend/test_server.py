"""The real gRPC server over a scripted core: its other calls, who may call it, and where it listens."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client import CollectorRegistry
from stepwire.process.tls import TlsFileError
from stepwire.v1 import inference_pb2 as pb
from stepwire.v1 import inference_pb2_grpc as pb_grpc

from control_plane.config import ControlPlaneSettings
from control_plane.frontend.served_model import ServedModel
from control_plane.frontend.server import FrontendServer, ListenError, create_server
from tests.unit.control_plane.frontend.running_server import (
    LIMIT_S,
    Running,
    error_of,
    ids,
    serving,
    token_request,
)
from tests.unit.control_plane.frontend.scripted_engine import ScriptedEngine


async def test_tokenize_and_detokenize(model: ServedModel) -> None:
    async with serving(model) as running:
        text = "Größe 東京"
        tokens = (await running.stub.Tokenize(pb.TokenizeRequest(text=text))).token_ids
        assert list(tokens) == ids(text)
        assert (await running.stub.Detokenize(pb.DetokenizeRequest(token_ids=tokens))).text == text
        chat = pb.ChatInput(messages=[pb.ChatMessage(role="user", content=[pb.ContentPart(text="a<|im_end|>")])])
        tokens = (await running.stub.Tokenize(pb.TokenizeRequest(chat=chat))).token_ids
        assert list(tokens).count(2) == 1
        for call in (
            running.stub.Tokenize(pb.TokenizeRequest()),
            running.stub.Detokenize(pb.DetokenizeRequest(token_ids=[10**6])),
        ):
            assert (await error_of(call)).code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_models(model: ServedModel) -> None:
    async with serving(model) as running:
        models = (await running.stub.ListModels(pb.ListModelsRequest())).models
        assert [one.id for one in models] == ["tiny", "alias/tiny"]
        one = (await running.stub.GetModel(pb.GetModelRequest(id="alias/tiny"))).model
        assert (one.id, one.max_model_len, one.vocab_size, one.has_tokenizer, one.has_chat_template) == (
            "alias/tiny",
            100,
            1000,
            True,
            True,
        )
        assert (await error_of(running.stub.GetModel(pb.GetModelRequest(id="no")))).code() == grpc.StatusCode.NOT_FOUND


async def test_health_follows_the_worker_and_draining(model: ServedModel) -> None:
    async with serving(model) as running:
        stub = health_pb2_grpc.HealthStub(running.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="stepwire.v1.InferenceService"))

        async def check() -> set[int]:
            services = ("", "stepwire.v1.InferenceService")
            return {(await stub.Check(health_pb2.HealthCheckRequest(service=name))).status for name in services}

        assert await check() == {health_pb2.HealthCheckResponse.NOT_SERVING}
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await running.server.set_serving(True)
        assert await check() == {health_pb2.HealthCheckResponse.SERVING}
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        await running.server.begin_drain()
        await running.server.set_serving(True)
        assert await check() == {health_pb2.HealthCheckResponse.NOT_SERVING}


async def list_services(running: Running, metadata: Sequence[tuple[str, str]] = ()) -> set[str]:
    stub = reflection_pb2_grpc.ServerReflectionStub(running.channel)
    call = stub.ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(list_services="")]), metadata=tuple(metadata)
    )
    return {service.name for service in (await call.read()).list_services_response.service}


async def test_reflection(model: ServedModel) -> None:
    async with serving(model) as running:
        assert {"stepwire.v1.InferenceService", "grpc.health.v1.Health"} <= await list_services(running)


async def test_keys(model: ServedModel) -> None:
    async with serving(model, keys=["first-key", "sécond"]) as running:
        stub, health = running.stub, health_pb2_grpc.HealthStub(running.channel)
        for metadata in (
            (),
            (("authorization", "Bearer wrong"),),
            (("authorization", "Bearer "),),
            (("authorization", "first-key"),),
            (("authorization", "Basic first-key"),),
        ):
            for call in (
                stub.ListModels(pb.ListModelsRequest(), metadata=metadata),
                stub.Generate(token_request(), metadata=metadata),
                stub.Session(metadata=metadata),
                running.channel.unary_unary("/stepwire.v1.InferenceService/NoSuchMethod")(b"", metadata=metadata),
            ):
                error = await error_of(call)
                assert error.code() == grpc.StatusCode.UNAUTHENTICATED
                assert "first-key" not in (error.details() or "")
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await list_services(running, metadata)
            assert raised.value.code() == grpc.StatusCode.UNAUTHENTICATED
        right = (("authorization", "bearer first-key"),)
        assert (await stub.ListModels(pb.ListModelsRequest(), metadata=right)).models
        assert await list_services(running, right)
        assert await health.Check(health_pb2.HealthCheckRequest())


async def test_a_port_in_use_is_one_clear_line(model: ServedModel) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ListenError, match=f"port {port} on 127.0.0.1 is in use") as raised:
            await create_server(ControlPlaneSettings(grpc_port=port), ScriptedEngine(), model, CollectorRegistry())
        assert "\n" not in str(raised.value) and "--grpc-port" in str(raised.value)


async def test_a_second_server_does_not_share_the_port(model: ServedModel) -> None:
    async with serving(model) as running:
        settings = ControlPlaneSettings(grpc_port=running.server.port)
        with pytest.raises(ListenError, match="in use"):
            await create_server(settings, ScriptedEngine(), model, CollectorRegistry())


async def test_unix_sockets(model: ServedModel) -> None:
    with tempfile.TemporaryDirectory(prefix="stepwire-") as directory:
        path = Path(directory) / "public.sock"

        async def listen(where: Path) -> FrontendServer:
            settings = ControlPlaneSettings(grpc_port=0, listen=f"unix:{where}")
            return await create_server(settings, ScriptedEngine(), model, CollectorRegistry())

        # A socket that a process left behind is replaced.
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(path))
        server = await listen(path)
        await server.start()
        async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
            assert await pb_grpc.InferenceServiceStub(channel).ListModels(pb.ListModelsRequest())
        with pytest.raises(ListenError, match="in use"):
            await listen(path)
        await server.stop(0)

        file = Path(directory) / "file"
        file.write_text("precious")
        with pytest.raises(ListenError, match="there is a file"):
            await listen(file)
        with pytest.raises(ListenError, match="directory does not exist"):
            await listen(Path(directory) / "no" / "x.sock")
        with pytest.raises(ListenError, match="longer than 107"):
            await listen(Path(directory) / ("x" * 120))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
async def test_tls(model: ServedModel, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    make = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "1",
        "-keyout",
        str(key),
        "-out",
        str(cert),
    ]
    subprocess.run([*make, *names], check=True, capture_output=True)
    roots, private = cert.read_bytes(), key.read_bytes()
    stranger = grpc.ssl_channel_credentials(roots)
    known = grpc.ssl_channel_credentials(roots, private, roots)

    async def may_call(port: int, credentials: grpc.ChannelCredentials) -> bool:
        async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
            try:
                return bool(
                    await pb_grpc.InferenceServiceStub(channel).ListModels(pb.ListModelsRequest(), timeout=LIMIT_S)
                )
            except grpc.aio.AioRpcError:
                return False

    for client_ca in (None, cert):
        settings = ControlPlaneSettings(grpc_port=0, tls_cert=cert, tls_key=key, tls_client_ca=client_ca)
        server = await create_server(settings, ScriptedEngine(), model, CollectorRegistry())
        await server.start()
        assert await may_call(server.port, known)
        assert await may_call(server.port, stranger) == (client_ca is None)
        await server.stop(0)

    key.write_text("damaged")
    with pytest.raises(TlsFileError, match="--tls-key"):
        await create_server(settings, ScriptedEngine(), model, CollectorRegistry())
    key.unlink()
    with pytest.raises(TlsFileError, match="--tls-key: cannot read"):
        await create_server(settings, ScriptedEngine(), model, CollectorRegistry())
