"""The shortest way from a piece of a body to its socket.

Between an ASGI application's `send` and the socket stand as many coroutines as there are middlewares, and for each
piece of a stream all of them are passed: a third of what a token costs the gateway. Only the head of a response is any
of their business. So the HTTP protocol puts an object into the scope by which a response that has begun can write on;
its beginning and its end still go through `send`.
"""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

# Its name among the scope's extensions.
_EXTENSION = "stepwire.response_body"


class ResponseBody:
    """One response's body, in between its first and its last `send`."""

    __slots__ = ("_cycle",)

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    @property
    def may_write(self) -> bool:
        """False while the client is slow: what is written then is only kept."""
        return not self._cycle.flow.write_paused

    async def drain(self) -> None:
        """Until it may be written again, or the client is gone."""
        await self._cycle.flow.drain()

    def write(self, data: bytes) -> None:
        """Some bytes, at least one, in a chunk of their own; thrown away where the client is gone."""
        if not self._cycle.disconnected:
            self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))


class BodyWritingProtocol(HttpToolsProtocol):
    """Uvicorn's, with a `ResponseBody` in each request's scope."""

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if self.cycle is not None and self.cycle.scope is self.scope:
            self.scope["extensions"] = {_EXTENSION: ResponseBody(self.cycle)}  # type: ignore[dict-item]


def response_body(scope: Any) -> ResponseBody:
    """That of an ASGI scope, whose response has begun and says nothing of its length."""
    body: ResponseBody = scope["extensions"][_EXTENSION]
    return body
