"""Bearer keys, checked before anything else of a request is looked at."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.errors import AUTHENTICATION, ApiError
from gateway.middleware import header, send_error

# Probes carry no keys, and tell nothing but whether the process lives. The console's page asks for the key itself.
OPEN_PATHS = frozenset({"/health", "/ready", "/"})


class ApiKeys:
    """The keys that open the server; without any it is open to all."""

    def __init__(self, keys: Iterable[str]) -> None:
        # Digests have one length, so that comparing them says nothing about the key's.
        self._digests: Sequence[bytes] = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accepts(self, authorization: bytes | None) -> bool:
        """Whether an `Authorization` header holds one of the keys; every key is compared, in constant time."""
        scheme, _, key = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer":
            return False
        return self.knows(key)

    def knows(self, key: bytes | None) -> bool:
        """The key itself, as Anthropic's clients send it in `x-api-key`."""
        given = _digest((key or b"").strip())
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(matches)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class ApiKeyMiddleware:
    """Refuses every route but the open ones without a key: a route that is added later is closed by itself."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] != "http"
            or not self._keys
            or scope["path"] in OPEN_PATHS
            or scope["method"] == "OPTIONS"
            or self._keys.accepts(header(scope, b"authorization"))
            or self._keys.knows(header(scope, b"x-api-key"))
        ):
            await self._app(scope, receive, send)
            return
        given = header(scope, b"authorization") is not None or header(scope, b"x-api-key") is not None
        await send_error(send, _unauthorized(given), scope)


def _unauthorized(given: bool) -> ApiError:
    what = "The API key is not one of this server's." if given else "This server needs an API key."
    return ApiError(
        401,
        f"{what} Send it as 'Authorization: Bearer KEY'.",
        type=AUTHENTICATION,
        code="invalid_api_key",
        headers={"www-authenticate": "Bearer"},
    )
