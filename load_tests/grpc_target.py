"""The public gRPC API, over its `Session` streams: one message carries what a step gave to all requests of a stream.

Per token there is one tagged response to read; text is not decoded and no token id is looked at.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Self

import grpc
from grpc import aio
from stepwire.v1 import inference_pb2 as pb
from stepwire.v1 import inference_pb2_grpc

from load_tests.records import RequestRecord
from load_tests.target import MAX_MESSAGE_BYTES, ServedModelFacts, TargetError, TargetSpec
from load_tests.workload import RequestSpec

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)
_CONNECT_TIMEOUT_S = 10.0
_ERROR_CHARS = 300
# As the gateway asks: most tokens come as lists, not as a tree of messages.
_SESSION_OPTIONS = pb.SessionOptions(packed_texts=True, packed_token_ids=True)
_END_OF_STREAM = aio.EOF  # type: ignore[attr-defined]  # the stubs lack it


class GrpcTarget:
    def __init__(self, spec: TargetSpec) -> None:
        self._spec = spec
        self._metadata = (("authorization", f"Bearer {spec.api_key}"),) if spec.api_key else ()
        self._streams: list[_SessionStream] = []
        self._next_stream = itertools.count()

    async def __aenter__(self) -> Self:
        # A channel a stream: calls of one channel share one connection, and so one flow-control window.
        for index in range(self._spec.num_streams):
            options = (*_OPTIONS, ("grpc.channel_id", index))
            channel = aio.insecure_channel(self._spec.address, options=options)
            self._streams.append(_SessionStream(channel, self._metadata))
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                for stream in self._streams:
                    await stream.channel.channel_ready()
        except TimeoutError:
            await self.__aexit__()
            raise TargetError(
                f"no gRPC server answers at {self._spec.address} within {_CONNECT_TIMEOUT_S:g} s: is it running there?"
            ) from None
        for stream in self._streams:
            stream.open()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for stream in self._streams:
            await stream.close()

    async def facts(self) -> ServedModelFacts:
        stub = inference_pb2_grpc.InferenceServiceStub(self._streams[0].channel)
        try:
            answer = await stub.ListModels(
                pb.ListModelsRequest(), metadata=self._metadata, timeout=_CONNECT_TIMEOUT_S, wait_for_ready=True
            )
        except aio.AioRpcError as error:
            raise TargetError(f"{self._spec.address}: ListModels: {error.code().name}: {error.details()}") from error
        if not answer.models:
            raise TargetError(f"{self._spec.address} serves no model yet: wait until its health is SERVING")
        models = {model.id: model for model in answer.models}
        model = models.get(self._spec.model, answer.models[0]) if self._spec.model else answer.models[0]
        return ServedModelFacts(model.id, model.max_model_len, model.vocab_size)

    def encode(self, spec: RequestSpec) -> pb.GenerateRequest:
        return pb.GenerateRequest(
            model=self._spec.model,
            token_ids=pb.TokenIds(ids=spec.prompt_ids),
            sampling=pb.SamplingParams(temperature=self._spec.temperature),
            stop=pb.StopConditions(max_tokens=spec.max_tokens, ignore_eos=self._spec.ignore_eos),
        )

    async def send(self, encoded: pb.GenerateRequest, record: RequestRecord) -> None:
        stream = self._streams[next(self._next_stream) % len(self._streams)]
        await stream.generate(encoded, record)


class _SessionStream:
    """One Session call: one task writes, one reads, and every open tag has a record and a future."""

    def __init__(self, channel: aio.Channel, metadata: tuple[tuple[str, str], ...]) -> None:
        self.channel = channel
        self._metadata = metadata
        self._tags = itertools.count(1)
        self._open: dict[int, tuple[RequestRecord, asyncio.Future[None]]] = {}
        self._outgoing: asyncio.Queue[pb.SessionRequest] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._broken: str | None = None

    def open(self) -> None:
        stub = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self._call = stub.Session(metadata=self._metadata)
        self._outgoing.put_nowait(pb.SessionRequest(options=_SESSION_OPTIONS))
        self._tasks = [asyncio.create_task(self._write()), asyncio.create_task(self._read())]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await self.channel.close(None)

    async def generate(self, request: pb.GenerateRequest, record: RequestRecord) -> None:
        tag = next(self._tags)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        record.sent_s = time.monotonic()
        if self._broken is not None:
            record.error = self._broken
            return
        self._open[tag] = (record, done)
        self._outgoing.put_nowait(pb.SessionRequest(tag=tag, generate=pb.SessionGenerate(request=request)))
        try:
            await done
        except asyncio.CancelledError:
            if self._open.pop(tag, None) is not None:
                self._outgoing.put_nowait(pb.SessionRequest(tag=tag, cancel=pb.SessionCancel()))
            raise

    async def _write(self) -> None:
        try:
            while True:
                await self._call.write(await self._outgoing.get())
        except (aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the reader learns why, and tells

    async def _read(self) -> None:
        clock, requests = time.monotonic, self._open
        try:
            while (message := await self._call.read()) is not _END_OF_STREAM:
                now_s = clock()
                for packed in (message.texts, message.token_ids):
                    for tag, num_new in zip(packed.tags, packed.num_tokens, strict=True):
                        entry = requests.get(tag)
                        if entry is not None:
                            entry[0].num_tokens += num_new
                            entry[0].arrivals_s.append(now_s)
                for tagged in message.responses:
                    entry = requests.get(tagged.tag)
                    if entry is None:
                        continue  # cancelled, and this was on its way
                    response, record = tagged.response, entry[0]
                    for delta in response.deltas:
                        if num_new := delta.num_tokens:
                            record.num_tokens += num_new
                            record.arrivals_s.append(now_s)
                    if response.HasField("usage"):
                        usage = response.usage
                        record.num_prompt_tokens = usage.num_prompt_tokens
                        record.num_tokens = usage.num_completion_tokens
                        record.num_cached_tokens = usage.num_cached_tokens
                        self._end(tagged.tag, None)
                    elif response.HasField("error"):
                        error = response.error
                        details = "; ".join(f"{v.field}: {v.description}" for v in error.violations)
                        text = f"{grpc_code_name(error.code)}: {error.message}{f' ({details})' if details else ''}"
                        self._end(tagged.tag, text[:_ERROR_CHARS])
            code, details = await self._call.code(), await self._call.details()
            self._break(f"the Session stream ended: {code.name}: {details}")
        except aio.AioRpcError as error:
            self._break(f"the Session stream ended: {error.code().name}: {error.details()}")

    def _end(self, tag: int, error: str | None) -> None:
        record, done = self._open.pop(tag)
        record.ended_s = time.monotonic()
        record.error = error
        if not done.done():
            done.set_result(None)

    def _break(self, reason: str) -> None:
        self._broken = reason
        for tag in list(self._open):
            self._end(tag, reason)


def grpc_code_name(code: int) -> str:
    """google.rpc.Code's name for its number."""
    return next((status.name for status in grpc.StatusCode if status.value[0] == code), f"CODE_{code}")
