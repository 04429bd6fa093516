"""The gateway's side of InferenceService: one session for all generation, unary calls for the rest.

A session is one bidirectional stream with one reader task and one writer task (grpc.aio ends a stream on two concurrent
writes). When it breaks, its requests end with a retryable error and a new one is opened. Everything runs on one event
loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import structlog
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc
from stepwire.process.connections import KEEPALIVE_OPTIONS, MESSAGE_OPTIONS, NO_PROXY_OPTIONS
from stepwire.process.tls import Renewed, client_credentials
from stepwire.process.traces import HEADER, current_traceparent
from stepwire.v1 import inference_pb2, inference_pb2_grpc

from gateway import errors, field_names
from gateway.config import GatewaySettings
from gateway.errors import ApiError
from gateway.field_names import Names
from gateway.mailbox import Mailbox
from gateway.metrics import GatewayMetrics

_log = structlog.get_logger(__name__)

INFERENCE_SERVICE = "stepwire.v1.InferenceService"
UNARY_TIMEOUT_S = 10.0
HEALTH_TIMEOUT_S = 2.0
# A control plane that restarts is back within seconds; gRPC's own default waits up to two minutes.
RECONNECT_MIN_S = 0.05
RECONNECT_MAX_S = 1.0
# How often TLS files are looked at while there is no connection.
_LOOK_AT_FILES_S = 2.0
# What may be on its way to us unread, a step's message or two. gRPC's own estimate grows to megabytes: seconds
# of tokens. A gateway short of CPU would send each one late; a control plane that has to wait puts more of them
# into one message. A message that is larger than the window is let through whole when it is read.
RECEIVE_WINDOW_BYTES = 4096
CHANNEL_OPTIONS = [
    *MESSAGE_OPTIONS,
    *KEEPALIVE_OPTIONS,
    *NO_PROXY_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", int(RECONNECT_MIN_S * 1000)),
    ("grpc.max_reconnect_backoff_ms", int(RECONNECT_MAX_S * 1000)),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", RECEIVE_WINDOW_BYTES),
]
# One message at a time: while we write its events the control plane puts the next one together. Each one more that may
# be on its way makes every token late by what it takes to write 256 streams.
_SESSION_OPTIONS = inference_pb2.SessionOptions(packed_texts=True, packed_token_ids=True, max_outstanding_messages=1)
_RECEIPT = inference_pb2.SessionRequest(receipt=inference_pb2.SessionReceipt())

_Response = TypeVar("_Response")
_SessionCall = grpc.aio.StreamStreamCall[inference_pb2.SessionRequest, inference_pb2.SessionResponse]


@dataclass(slots=True, eq=False)
class Generation:
    """One HTTP request's generation: its requests of the session and the mailbox that they fill."""

    mailbox: Mailbox
    tags: range
    names: Names
    client: ControlPlaneClient
    # Tells of a client that left; ends with the answer.
    watcher: asyncio.Task[None] | None = None
    # A streaming response answers for it from now on.
    handed_over: bool = False

    def cancel(self) -> None:
        """Forget what is still running; nothing more comes. Harmless after the end."""
        self.client.cancel(self.tags)

    def disconnect(self) -> None:
        """The client is gone."""
        self.mailbox.disconnect()
        self.cancel()


class ControlPlaneClient:
    """Use between `start` and `close`."""

    def __init__(self, settings: GatewaySettings, metrics: GatewayMetrics) -> None:
        self._settings = settings
        self._metrics = metrics
        key = settings.key_for_control_plane
        self._credentials = read_credentials(settings)
        self._metadata: tuple[tuple[str, str], ...] = (("authorization", f"Bearer {key}"),) if key else ()
        # tag -> the generation and which of its prompts the tag is.
        self._running: dict[int, tuple[Generation, int]] = {}
        self._next_tag = itertools.count(1)
        self._outgoing: asyncio.Queue[inference_pb2.SessionRequest] | None = None
        self._down: ApiError = errors.control_plane_unreachable()
        self._task: asyncio.Task[None] | None = None
        self._had_session = asyncio.Event()

    async def start(self) -> None:
        self._open_channel(take(self._credentials))
        self._task = asyncio.create_task(self._keep_session(), name="control-plane-session")

    def _open_channel(self, credentials: grpc.ChannelCredentials | None) -> None:
        self._credentials_in_use = credentials
        self._channel = open_channel(self._settings.control_plane, credentials)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._health = health_pb2_grpc.HealthStub(self._channel)

    async def wait_for_session(self, limit_s: float) -> None:
        """Until the control plane can be asked, or for so long."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._had_session.wait(), limit_s)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self.fail_all(errors.cut_off())
        await self._channel.close(None)

    def generate(
        self,
        requests: Sequence[inference_pb2.GenerateRequest],
        *,
        num_samples: int,
        stream: bool,
        names: Names,
        timeout_s: float | None = None,
    ) -> Generation:
        """Send the requests of one HTTP request. Raises `ApiError` at once while there is no control plane."""
        if self._outgoing is None:
            raise self._down
        tags = [next(self._next_tag) for _ in requests]
        generation = Generation(
            Mailbox(len(requests), num_samples, stream=stream), range(tags[0], tags[-1] + 1), names, self
        )
        traceparent = current_traceparent()
        for prompt, (tag, request) in enumerate(zip(tags, requests, strict=True)):
            self._running[tag] = (generation, prompt)
            message = inference_pb2.SessionRequest(tag=tag)
            # Given to a constructor, a message would be written out and read again.
            message.generate.request.CopyFrom(request)
            if timeout_s is not None:
                message.generate.timeout.CopyFrom(_duration(timeout_s))
            if traceparent:
                message.generate.traceparent = traceparent
            self._outgoing.put_nowait(message)
        return generation

    def cancel(self, tags: range) -> None:
        """Forget these tags; those that still run are cancelled at the control plane."""
        for tag in tags:
            if self._running.pop(tag, None) is not None and self._outgoing is not None:
                self._outgoing.put_nowait(inference_pb2.SessionRequest(tag=tag, cancel=inference_pb2.SessionCancel()))

    def fail_all(self, error: ApiError) -> None:
        """End everything that runs with this error."""
        generations = {generation for generation, _ in self._running.values()}
        for generation in generations:
            generation.mailbox.fail(error)
            generation.cancel()

    async def models(self) -> Sequence[inference_pb2.Model]:
        response: inference_pb2.ListModelsResponse = await self._unary(
            self._stub.ListModels, inference_pb2.ListModelsRequest(), {}
        )
        return response.models

    async def model(self, model_id: str) -> inference_pb2.Model:
        response: inference_pb2.GetModelResponse = await self._unary(
            self._stub.GetModel, inference_pb2.GetModelRequest(id=model_id), {}
        )
        return response.model

    async def tokenize(self, request: inference_pb2.TokenizeRequest, names: Names) -> tuple[list[int], list[bytes]]:
        """Ids, and the tokens' bytes if the request asks for them."""
        response: inference_pb2.TokenizeResponse = await self._unary(self._stub.Tokenize, request, names)
        return list(response.token_ids), list(response.tokens)

    async def detokenize(self, model: str, token_ids: Sequence[int]) -> str:
        request = inference_pb2.DetokenizeRequest(model=model, token_ids=token_ids)
        response: inference_pb2.DetokenizeResponse = await self._unary(
            self._stub.Detokenize, request, field_names.DETOKENIZE
        )
        return response.text

    async def embed(
        self, request: inference_pb2.EmbedRequest, names: Names, timeout_s: float | None
    ) -> inference_pb2.EmbedResponse:
        """Raises `ApiError`, with the fields called by `names`."""
        response: inference_pb2.EmbedResponse = await self._long(self._stub.Embed, request, names, timeout_s)
        return response

    async def score(
        self, request: inference_pb2.ScoreRequest, names: Names, timeout_s: float | None
    ) -> inference_pb2.ScoreResponse:
        """Raises `ApiError`, with the fields called by `names`."""
        response: inference_pb2.ScoreResponse = await self._long(self._stub.Score, request, names, timeout_s)
        return response

    async def _long(
        self,
        method: Callable[..., Awaitable[_Response]],
        request: Any,
        names: Names,
        timeout_s: float | None,
    ) -> _Response:
        """A call that computes: it lasts as long as that takes, and ends with whoever awaits it."""
        if self._outgoing is None:
            raise self._down
        try:
            return await method(request, timeout=timeout_s, metadata=self._traced_metadata())
        except grpc.aio.AioRpcError as error:
            raise errors.from_rpc_error(error, names) from error

    async def serving(self) -> bool:
        """Whether the control plane takes requests now, by grpc.health.v1 and by our own session."""
        if self._outgoing is None:
            return False
        request = health_pb2.HealthCheckRequest(service=INFERENCE_SERVICE)
        try:
            response = await self._health.Check(request, timeout=HEALTH_TIMEOUT_S, metadata=self._metadata)
            if response.status != health_pb2.HealthCheckResponse.SERVING:
                return False
            # The health service is open to all: only another call shows whether our key is accepted.
            await self._stub.ListModels(
                inference_pb2.ListModelsRequest(), timeout=HEALTH_TIMEOUT_S, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            _log.warning("the control plane is not ready for this gateway", code=error.code().name)
            return False
        return True

    async def _unary(
        self,
        method: Callable[..., Awaitable[_Response]],
        request: Any,
        names: Names,
    ) -> _Response:
        try:
            return await method(request, timeout=UNARY_TIMEOUT_S, metadata=self._traced_metadata())
        except grpc.aio.AioRpcError as error:
            raise errors.from_rpc_error(error, names) from error

    def _traced_metadata(self) -> tuple[tuple[str, str], ...]:
        traceparent = current_traceparent()
        return (*self._metadata, (HEADER, traceparent)) if traceparent else self._metadata

    async def _keep_session(self) -> None:
        """Open a session, serve it until it breaks, wait a little, again."""
        num_sessions, wait_s = 0, RECONNECT_MIN_S
        loop = asyncio.get_running_loop()
        while True:
            await self._connect()
            opened_at = loop.time()
            if num_sessions:
                self._metrics.control_plane_reconnects.inc()
            num_sessions += 1
            await self._serve_session()
            lasted_s = loop.time() - opened_at
            wait_s = RECONNECT_MIN_S if lasted_s > RECONNECT_MAX_S else min(wait_s * 2, RECONNECT_MAX_S)
            await asyncio.sleep(wait_s)

    async def _connect(self) -> None:
        """Until there is a connection; by another channel where TLS files have changed, which a channel keeps."""
        while True:
            credentials = take(self._credentials)
            if credentials is not self._credentials_in_use:
                former = self._channel
                self._open_channel(credentials)
                await former.close(None)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_AT_FILES_S if credentials is not None else None):
                    await self._channel.channel_ready()
                return

    async def _serve_session(self) -> None:
        call: _SessionCall = self._stub.Session(metadata=self._metadata)
        outgoing: asyncio.Queue[inference_pb2.SessionRequest] = asyncio.Queue()
        writer = asyncio.create_task(_write_all(call, outgoing), name="control-plane-session-writer")
        outgoing.put_nowait(inference_pb2.SessionRequest(options=_SESSION_OPTIONS))
        self._outgoing = outgoing
        self._had_session.set()
        self._metrics.control_plane_connected.set(1)
        _log.info("session with the control plane opened", control_plane=self._settings.control_plane)
        self._down = errors.control_plane_unreachable()
        lost = errors.control_plane_lost()
        try:
            await self._read_all(call, outgoing)
            _log.warning("the control plane ended the session", num_requests=len(self._running))
        except grpc.aio.AioRpcError as error:
            lost = self._session_error(error)
        except Exception:
            # A message that we cannot handle must not leave the gateway without a session.
            _log.exception("session given up", num_requests=len(self._running))
            lost = errors.internal()
        finally:
            self._outgoing = None
            self._metrics.control_plane_connected.set(0)
            writer.cancel()
            call.cancel()
        self.fail_all(lost)
        self._running.clear()

    def _session_error(self, error: grpc.aio.AioRpcError) -> ApiError:
        _log.warning(
            "session with the control plane broke",
            code=error.code().name,
            details=error.details(),
            num_requests=len(self._running),
        )
        if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            self._down = errors.refused_gateway()
            return self._down
        return errors.control_plane_lost()

    async def _read_all(self, call: _SessionCall, outgoing: asyncio.Queue[inference_pb2.SessionRequest]) -> None:
        """Hand every response to its mailbox. The loop that every token passes."""
        running = self._running
        while True:
            message: Any = await call.read()
            if message is grpc.aio.EOF:  # type: ignore[attr-defined]
                return
            texts = message.texts
            for tag, text, num_tokens in zip(texts.tags, texts.texts, texts.num_tokens, strict=True):
                entry = running.get(tag)
                if entry is not None:
                    entry[0].mailbox.put_text(entry[1], text, num_tokens)
            if message.HasField("token_ids"):
                self._hand_on_ids(message.token_ids)
            for tagged in message.responses:
                tag = tagged.tag
                entry = running.get(tag)
                if entry is None:
                    continue  # cancelled while this was on its way
                generation, prompt = entry
                response = tagged.response
                if response.HasField("error"):
                    del running[tag]
                    self._fail(generation, prompt, response.error)
                elif generation.mailbox.put(prompt, response):
                    del running[tag]
            # Answers are written before the writer's turn comes, whole ones and last events too, which their own tasks
            # write: it says that we have room for the next message.
            await asyncio.sleep(0)
            outgoing.put_nowait(_RECEIPT)

    def _hand_on_ids(self, packed: inference_pb2.PackedTokenIds) -> None:
        running, token_ids, begin = self._running, list(packed.token_ids), 0
        for tag, text, num_tokens in zip(packed.tags, packed.texts, packed.num_tokens, strict=True):
            begin, first = begin + num_tokens, begin
            entry = running.get(tag)
            if entry is not None:
                entry[0].mailbox.put_token_ids(entry[1], text, token_ids[first:begin])

    def _fail(self, generation: Generation, prompt: int, error: inference_pb2.RequestError) -> None:
        """One prompt's error is the whole HTTP request's error: the other prompts are cancelled."""
        names = dict(generation.names)
        if len(generation.tags) > 1:
            names.update(dict.fromkeys(("text", "token_ids", "token_ids.ids"), f"prompt[{prompt}]"))
        generation.mailbox.fail(errors.from_request_error(error, names))
        generation.cancel()


async def _write_all(call: _SessionCall, outgoing: asyncio.Queue[inference_pb2.SessionRequest]) -> None:
    # A broken stream is reported by the reader, with its status.
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        while True:
            await call.write(await outgoing.get())


def _duration(seconds: float) -> Duration:
    fraction, whole = math.modf(seconds)
    return Duration(seconds=int(whole), nanos=int(fraction * 1e9))


def open_channel(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    """A channel to one of the control plane's services, which connects when it is used."""
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    return grpc.aio.secure_channel(address, credentials, options=CHANNEL_OPTIONS)


def take(credentials: Renewed[grpc.ChannelCredentials] | None) -> grpc.ChannelCredentials | None:
    return None if credentials is None else credentials.take()


def read_credentials(settings: GatewaySettings) -> Renewed[grpc.ChannelCredentials] | None:
    """TLS towards the control plane, where it is asked for. Raises `TlsFileError`."""
    if settings.control_plane_tls_ca is None:
        return None
    own_cert, own_key = settings.control_plane_tls_cert, settings.control_plane_tls_key
    return client_credentials("--control-plane-tls", settings.control_plane_tls_ca, own_cert, own_key)
