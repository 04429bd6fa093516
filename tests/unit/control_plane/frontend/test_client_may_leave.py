"""A client that leaves while it is written to leaves no line in the log: against a real gRPC server and client."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc
import grpc.aio
import pytest

from control_plane.frontend.servicer import client_may_leave

# The first message does not fit a client's window that nobody reads from: its write waits until the client leaves.
MESSAGE = bytes(1 << 20)
SMALL_WINDOW = [
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 65536),
    ("grpc.use_local_subchannel_pool", 1),
]
LIMIT_S = 60.0


async def test_a_client_that_leaves_before_the_first_message_has_gone_out(caplog: pytest.LogCaptureFixture) -> None:
    is_written_to, ended = asyncio.Event(), asyncio.Queue[str]()

    async def write(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        is_written_to.set()
        try:
            with client_may_leave():
                await context.write(MESSAGE)
            ended.put_nowait("written")
        except asyncio.CancelledError:
            ended.put_nowait("cancelled")
            raise

    server = grpc.aio.server()
    method = grpc.unary_stream_rpc_method_handler(write)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", {"Write": method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    with caplog.at_level(logging.WARNING):
        for _ in range(20):
            is_written_to.clear()
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=SMALL_WINDOW) as channel:
                call = channel.unary_stream("/test/Write", None, None)(b"")
                await asyncio.wait_for(is_written_to.wait(), LIMIT_S)
                await asyncio.sleep(0.002)
                call.cancel()
            assert await asyncio.wait_for(ended.get(), LIMIT_S) == "cancelled"
        await server.stop(LIMIT_S)
    assert not caplog.records
