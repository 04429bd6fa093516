"""The real gRPC server over a scripted core: what clients see."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from prometheus_client import CollectorRegistry
from pydantic import SecretStr
from stepwire.process.tls import TlsFileError
from stepwire.v1 import inference_pb2 as pb
from stepwire.v1 import inference_pb2_grpc as pb_grpc

from control_plane.config import ControlPlaneSettings
from control_plane.core.request import AdmissionError, CoreRequest, FinishReason, OutputSink, RequestFault
from control_plane.frontend.output_stream import RequestOutput
from control_plane.frontend.served_model import ServedModel
from control_plane.frontend.server import FrontendServer, ListenError, create_server
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


async def test_generate(model: ServedModel) -> None:
    async with serving(model) as running:
        call = running.stub.Generate(token_request())
        accepted = (await call.read()).accepted
        assert accepted.request_id == await running.request_id() and accepted.model == "tiny"
        running.engine.output(ids("hello"))
        assert (await call.read()).deltas[0].text == "hello"
        running.engine.output([], finish=FinishReason.STOP, stop_token_id=2)
        running.engine.end(num_cached=1)
        last = await call.read()
        assert last.deltas[0].finish_reason == pb.FINISH_REASON_STOP and last.usage.num_cached_tokens == 1
        assert await call.read() is grpc.aio.EOF
        assert await call.code() == grpc.StatusCode.OK


async def test_a_refused_request_has_a_status_with_details(model: ServedModel) -> None:
    async with serving(model) as running:
        call = running.stub.Generate(token_request(sampling=pb.SamplingParams(top_p=3)))
        details = await details_of(call)
        assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT
        [violation] = details["BadRequest"].field_violations
        assert violation.field == "sampling.top_p" and "not 3" in violation.description
        assert details["ErrorInfo"].reason == "invalid_request"

        call = running.stub.Generate(token_request(model="other"))
        assert (await details_of(call))["ErrorInfo"].reason == "model_not_found"
        assert await call.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (
            AdmissionError("queue_full", "the queue is full", code="RESOURCE_EXHAUSTED", retry_after_s=2.5),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
        ),
        (
            AdmissionError("draining", "shutting down", code="UNAVAILABLE", retry_after_s=2.5),
            grpc.StatusCode.UNAVAILABLE,
        ),
    ],
)
async def test_refusals_of_the_core_say_when_to_retry(
    model: ServedModel, error: AdmissionError, code: grpc.StatusCode
) -> None:
    async with serving(model, engine=ScriptedEngine(refusal=error)) as running:
        call = running.stub.Generate(token_request())
        details = await details_of(call)
        assert await call.code() == code
        assert details["ErrorInfo"].reason == error.reason
        assert details["RetryInfo"].retry_delay.ToMilliseconds() == 2500

        session = running.stub.Session()
        await session.write(pb.SessionRequest(tag=1, generate=pb.SessionGenerate(request=token_request())))
        refused = (await session.read()).responses[0].response.error
        assert (refused.reason, refused.retryable, refused.retry_after.ToMilliseconds()) == (error.reason, True, 2500)


async def test_the_core_names_the_input_that_was_sent(model: ServedModel) -> None:
    error = AdmissionError("context_length_exceeded", "too long", code="INVALID_ARGUMENT", field="input")
    async with serving(model, engine=ScriptedEngine(refusal=error)) as running:
        details = await details_of(running.stub.Generate(pb.GenerateRequest(text="hi")))
        assert details["BadRequest"].field_violations[0].field == "text"


async def test_without_a_worker_every_call_is_unavailable(model: ServedModel) -> None:
    engine = ScriptedEngine(
        AdmissionError("no_worker", "no worker is ready yet", code="UNAVAILABLE", retry_after_s=2.0)
    )
    async with serving(model, engine=engine) as running:
        for call in (
            running.stub.Generate(token_request()),
            running.stub.ListModels(pb.ListModelsRequest()),
            running.stub.Tokenize(pb.TokenizeRequest(text="x")),
        ):
            assert (await error_of(call)).code() == grpc.StatusCode.UNAVAILABLE


async def test_a_fault_after_acceptance_ends_the_stream_with_an_error_message(model: ServedModel) -> None:
    async with serving(model) as running:
        call = running.stub.Generate(token_request())
        await call.read()
        await running.request_id()
        running.engine.end(fault=RequestFault("INTERNAL", "row failed", retryable=False))
        error = (await call.read()).error
        assert (error.code, error.message, error.retryable) == (13, "row failed", False)
        assert await call.read() is grpc.aio.EOF
        assert await call.code() == grpc.StatusCode.OK


async def test_cancelling_the_call_cancels_the_request(model: ServedModel) -> None:
    async with serving(model) as running:
        call = running.stub.Generate(token_request())
        await call.read()
        request_id = await running.request_id()
        call.cancel()
        await until(lambda: running.engine.cancelled == [request_id])


async def test_the_calls_deadline_is_the_requests(model: ServedModel) -> None:
    async with serving(model) as running:
        call = running.stub.Generate(token_request(), timeout=1.5)
        await call.read()
        request_id = await running.request_id()
        assert (await error_of(call)).code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: running.engine.cancelled == [request_id])


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


class WritingEngine(ScriptedEngine):
    """Writes a step as the core does: planned in the next turn of the loop, written by a task that this wakes."""

    def __init__(self, order: list[str]) -> None:
        super().__init__()
        self.order = order

    def submit(self, request: CoreRequest, sink: OutputSink) -> None:
        super().submit(request, sink)
        loop = asyncio.get_running_loop()
        loop.call_soon(loop.call_soon, self.order.append, "step")


@pytest.mark.parametrize("way", ["Generate", "Session"])
async def test_the_step_of_a_request_is_written_before_its_acceptance(
    model: ServedModel, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    take = RequestOutput.take

    def noted(self: RequestOutput, response: pb.GenerateResponse, now_s: float) -> None:
        order.append("acceptance")
        take(self, response, now_s)

    monkeypatch.setattr(RequestOutput, "take", noted)
    async with serving(model, engine=WritingEngine(order)) as running:
        if way == "Generate":
            await running.stub.Generate(token_request()).read()
        else:
            await open_session(running, [1])
    assert order == ["step", "acceptance"]


async def test_a_session_sends_a_step_in_one_message(model: ServedModel) -> None:
    async with serving(model) as running:
        session, request_ids = await open_session(running, range(20))
        for request_id in request_ids.values():
            running.engine.output(ids("hello"), request_id=request_id)
        message = await session.read()
        assert {tagged.tag for tagged in message.responses} == set(range(20))
        assert {tagged.response.deltas[0].text for tagged in message.responses} == {"hello"}


async def packed_session(running: Running, tags: Sequence[int]) -> tuple[Any, dict[int, str]]:
    """A session of packed texts, one message at a time; everything is accepted and receipted."""
    session = running.stub.Session()
    options = pb.SessionOptions(packed_texts=True, max_outstanding_messages=1)
    await session.write(pb.SessionRequest(options=options))
    request_ids: dict[int, str] = {}
    for tag in tags:
        await session.write(pb.SessionRequest(tag=tag, generate=pb.SessionGenerate(request=token_request())))
    while len(request_ids) < len(tags):
        for tagged in (await session.read()).responses:
            request_ids[tagged.tag] = tagged.response.accepted.request_id
        await session.write(RECEIPT)
    return session, request_ids


RECEIPT = pb.SessionRequest(receipt=pb.SessionReceipt())


async def test_texts_are_packed_where_a_session_asks_for_it(model: ServedModel) -> None:
    async with serving(model) as running:
        session, request_ids = await packed_session(running, [1, 2, 3])
        for tag, text in ((1, "a"), (2, "hello"), (3, "b")):
            running.engine.output(ids(text), request_id=request_ids[tag])
        running.engine.output([], request_id=request_ids[3], finish=FinishReason.LENGTH)
        message = await session.read()
        packed = message.texts
        assert dict(zip(packed.tags, packed.texts, strict=True)) == {1: "a", 2: "hello"}
        assert list(packed.num_tokens) == [len(ids("a")), len(ids("hello"))]
        # What says more than text says all of it at once.
        [tagged] = message.responses
        delta = tagged.response.deltas[0]
        assert (tagged.tag, delta.text, delta.finish_reason) == (3, "b", pb.FINISH_REASON_LENGTH)


async def test_what_comes_before_a_receipt_grows_together(model: ServedModel) -> None:
    async with serving(model) as running:
        session, request_ids = await packed_session(running, [1, 2])

        async def say(texts: str) -> None:
            for text in texts:
                for request_id in request_ids.values():
                    running.engine.output(ids(text), request_id=request_id)
                await asyncio.sleep(0)

        await say("a")
        first = await session.read()
        await say("bcdef")
        reading = asyncio.ensure_future(session.read())
        done, _ = await asyncio.wait([reading], timeout=0.2)
        assert not done, "the first one is still in the client's hands"
        await session.write(RECEIPT)
        second = await reading
        assert (list(first.texts.texts), list(first.texts.num_tokens)) == (["a", "a"], [1, 1])
        assert (list(second.texts.texts), list(second.texts.num_tokens)) == (["bcdef", "bcdef"], [5, 5])
        # A cancelled request is not spoken of any more, whatever is still to be said.
        running.engine.output(ids("x"), request_id=request_ids[2])
        await session.write(pb.SessionRequest(tag=2, cancel=pb.SessionCancel()))
        await until(lambda: running.engine.cancelled == [request_ids[2]])


async def test_ending_a_session_cancels_what_runs(model: ServedModel) -> None:
    async with serving(model) as running:
        session, request_ids = await open_session(running, [1, 2, 3])
        running.engine.end(request_id=request_ids[2], fault=RequestFault("INTERNAL", "x", retryable=False))
        await session.read()
        await session.done_writing()
        assert await session.read() is grpc.aio.EOF
        assert set(running.engine.cancelled) == {request_ids[1], request_ids[3]}
        assert await session.code() == grpc.StatusCode.OK


async def test_a_client_that_goes_away_frees_its_requests(model: ServedModel) -> None:
    async with serving(model) as running:
        session, request_ids = await open_session(running, [1, 2])
        session.cancel()
        await until(lambda: set(running.engine.cancelled) == set(request_ids.values()))


async def test_cancel_ends_one_request_without_a_word(model: ServedModel) -> None:
    async with serving(model) as running:
        session, request_ids = await open_session(running, [1, 2])
        running.engine.output(ids("a"), request_id=request_ids[1])
        await session.read()
        await session.write(pb.SessionRequest(tag=1, cancel=pb.SessionCancel()))
        await session.write(pb.SessionRequest(tag=9, cancel=pb.SessionCancel()))
        await until(lambda: running.engine.cancelled == [request_ids[1]])
        running.engine.output(ids("b"), request_id=request_ids[2])
        assert [tagged.tag for tagged in (await session.read()).responses] == [2]
        # Its tag is free again.
        await session.write(pb.SessionRequest(tag=1, generate=pb.SessionGenerate(request=token_request())))
        assert (await session.read()).responses[0].response.HasField("accepted")


async def test_a_tag_in_use(model: ServedModel) -> None:
    async with serving(model) as running:
        session, request_ids = await open_session(running, [1, 2])
        await session.write(pb.SessionRequest(tag=1, generate=pb.SessionGenerate(request=token_request())))
        [tagged] = (await session.read()).responses
        assert tagged.tag == 1 and tagged.response.error.violations[0].field == "tag"
        assert running.engine.cancelled == [request_ids[1]]
        running.engine.output(ids("b"), request_id=request_ids[2])
        assert [tagged.tag for tagged in (await session.read()).responses] == [2], "the others go on"


async def test_timeouts_of_a_session(model: ServedModel) -> None:
    async with serving(model) as running:
        generate = pb.SessionGenerate(request=token_request())
        generate.timeout.FromMilliseconds(1500)
        session, request_ids = await open_session(running, [1], timeout=generate.timeout)
        error = (await session.read()).responses[0].response.error
        assert (error.code, error.reason) == (4, "deadline_exceeded")
        assert running.engine.cancelled == [request_ids[1]]

        generate.timeout.FromMilliseconds(-5)
        await session.write(pb.SessionRequest(tag=2, generate=generate))
        error = (await session.read()).responses[0].response.error
        assert error.violations[0].field == "timeout"


async def test_the_timeout_of_an_ended_request_is_not_the_next_ones(model: ServedModel) -> None:
    async with serving(model) as running:
        session = running.stub.Session()
        wrong = pb.SessionGenerate(request=token_request(n=0))
        wrong.timeout.FromMilliseconds(150)
        await session.write(pb.SessionRequest(tag=1, generate=wrong))
        assert (await session.read()).responses[0].response.error.violations[0].field == "n"

        await session.write(pb.SessionRequest(tag=1, generate=pb.SessionGenerate(request=token_request())))
        assert (await session.read()).responses[0].response.HasField("accepted")
        await asyncio.sleep(0.25)
        assert running.engine.cancelled == []
        running.engine.output(ids("still here"))
        assert (await session.read()).responses[0].response.deltas[0].text == "still here"


async def test_errors_of_a_session_leave_it_usable(model: ServedModel) -> None:
    async with serving(model) as running:
        session = running.stub.Session()
        wrong = pb.SessionGenerate(request=token_request(n=0))
        await session.write(pb.SessionRequest(tag=1, generate=wrong))
        await session.write(pb.SessionRequest(tag=2))
        errors: dict[int, pb.RequestError] = {}
        while len(errors) < 2:
            errors |= {tagged.tag: tagged.response.error for tagged in (await session.read()).responses}
        assert errors[1].violations[0].field == "n" and errors[2].violations[0].field == "action"
        await session.write(pb.SessionRequest(tag=1, generate=pb.SessionGenerate(request=token_request())))
        assert (await session.read()).responses[0].response.HasField("accepted")


async def test_a_slow_reader_gets_fewer_larger_messages(model: ServedModel) -> None:
    """The core never waits, and what the reader missed comes joined."""
    async with serving(model) as running:
        session, request_ids = await open_session(running, [1])
        num_outputs = 3000
        chunk = ids("the lazy dog ") * 40
        for _ in range(num_outputs):
            running.engine.output(chunk, request_id=request_ids[1])
            await asyncio.sleep(0)
        running.engine.end(request_id=request_ids[1])
        num_messages = 0
        text = ""
        while True:
            [tagged] = (await session.read()).responses
            num_messages += 1
            text += "".join(delta.text for delta in tagged.response.deltas)
            if tagged.response.HasField("usage"):
                break
        assert text == "the lazy dog " * 40 * num_outputs
        assert num_messages < num_outputs / 2


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
