"""The gateway's side of AdminService: one watch of the steps, shared by every page that shows them.

The watch is open while somebody looks and no longer. Its samples are turned into JSON once, and each reader has a
bounded buffer: a page that is slow loses samples, and neither the others nor the control plane wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import orjson
import structlog
from google.protobuf.duration_pb2 import Duration
from stepwire.v1 import admin_pb2, admin_pb2_grpc

from gateway.client import open_channel, read_credentials, take
from gateway.config import GatewaySettings

_log = structlog.get_logger(__name__)

INTERVAL_S = 0.25
# Steps shown of one interval; the sums are over all that came.
MAX_STEPS = 512
# Samples kept for one reader: at four a second, ten seconds.
MAX_WAITING_SAMPLES = 40
RETRY_PAUSE_S = 1.0

_STEP_FIELDS = (
    "step_id",
    "duration_ns",
    "num_rows",
    "num_prefill_tokens",
    "num_decode_tokens",
    "queue_ns",
    "input_ns",
    "forward_ns",
    "sample_ns",
    "group",
)


class AdminClient:
    """Use between `start` and `close`. Without an address `is_configured` is false and there is nothing to watch."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._address = settings.control_plane_admin
        self._credentials = read_credentials(settings) if self._address is not None else None
        key = settings.control_plane_admin_api_key
        self._metadata = (("authorization", f"Bearer {key.get_secret_value()}"),) if key else ()
        self._readers: list[_Reader] = []
        self._task: asyncio.Task[None] | None = None

    @property
    def is_configured(self) -> bool:
        return self._address is not None

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        for reader in self._readers:
            reader.end()

    async def samples(self) -> AsyncGenerator[bytes]:
        """JSON objects, one an interval, until the gateway stops or the reader is closed."""
        if self._address is None:
            return
        reader = _Reader()
        self._readers.append(reader)
        if self._task is None:
            self._task = asyncio.create_task(self._watch(self._address), name="watch-steps")
        try:
            while (sample := await reader.take()) is not None:
                yield sample
        finally:
            self._readers.remove(reader)
            if not self._readers and self._task is not None:
                self._task.cancel()
                self._task = None

    async def _watch(self, address: str) -> None:
        request = admin_pb2.WatchStepsRequest(interval=Duration(nanos=int(INTERVAL_S * 1e9)), max_steps=MAX_STEPS)
        while True:
            credentials = None if address.startswith("unix:") else take(self._credentials)
            try:
                async with open_channel(address, credentials) as channel:
                    stub = admin_pb2_grpc.AdminServiceStub(channel)  # type: ignore[no-untyped-call]
                    async for response in stub.WatchSteps(request, metadata=self._metadata):
                        self._hand_out(sample_json(response))
            except grpc.aio.AioRpcError as error:
                _log.warning("the steps cannot be watched", code=error.code().name)
                self._hand_out(b'{"connected":false}')
            await asyncio.sleep(RETRY_PAUSE_S)

    def _hand_out(self, sample: bytes) -> None:
        for reader in self._readers:
            reader.put(sample)


class _Reader:
    def __init__(self) -> None:
        self._samples: deque[bytes | None] = deque(maxlen=MAX_WAITING_SAMPLES)
        self._has_news = asyncio.Event()

    def put(self, sample: bytes | None) -> None:
        self._samples.append(sample)
        self._has_news.set()

    def end(self) -> None:
        self.put(None)

    async def take(self) -> bytes | None:
        while not self._samples:
            self._has_news.clear()
            await self._has_news.wait()
        return self._samples.popleft()


def sample_json(response: admin_pb2.WatchStepsResponse) -> bytes:
    """What a page needs of one response: field names as in admin.proto."""
    state = response.state
    shown: dict[str, Any] = _fields(state)
    shown["groups"] = [_fields(group) for group in state.groups]
    return orjson.dumps(
        {
            "connected": True,
            "state": shown,
            "num_lost_steps": response.num_lost_steps,
            "steps": [{name: getattr(step, name) for name in _STEP_FIELDS} for step in response.steps],
            "time_to_first_token": _counts(response.time_to_first_token),
            "inter_token_latency": _counts(response.inter_token_latency),
        }
    )


def _fields(message: admin_pb2.ServerState | admin_pb2.GroupState) -> dict[str, Any]:
    return {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields if field.name != "groups"}


def _counts(counts: admin_pb2.LatencyCounts) -> dict[str, list[Any]]:
    return {"bounds_s": list(counts.bounds_s), "counts": list(counts.counts)}
