"""What the driver sends to, whichever protocol it speaks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, Self

from load_tests.records import RequestRecord
from load_tests.workload import RequestSpec

MAX_MESSAGE_BYTES = 64 << 20


class TargetError(Exception):
    """The server cannot be measured; one line that says what to do."""


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """Where the requests go, and what they all share."""

    kind: Literal["grpc", "rest"]
    # HOST:PORT or unix:/PATH for gRPC, the URL up to and without /v1 for REST.
    address: str
    model: str = ""
    api_key: str | None = None
    # gRPC: Session streams that the requests are spread over.
    num_streams: int = 1
    temperature: float = 0.6
    # vLLM and stepwire take it over REST; other servers refuse a field that they do not know.
    ignore_eos: bool = True

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class ServedModelFacts:
    """What a server says of its model; None where it does not say."""

    model: str
    max_model_len: int | None = None
    vocab_size: int | None = None


class Target(Protocol):
    """One connection to one server. `encode` is called before the clock starts, `send` while it runs."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc_info: object) -> None: ...

    async def facts(self) -> ServedModelFacts:
        """Raises `TargetError` if the server cannot be asked."""
        ...

    def encode(self, spec: RequestSpec) -> Any:
        """The request as `send` wants it: made ahead, so that sending costs next to nothing."""
        ...

    async def send(self, encoded: Any, record: RequestRecord) -> None:
        """Send one request and fill `record` until its end; what goes wrong is written to `record.error`."""
        ...


def open_target(spec: TargetSpec) -> Target:
    # Each client brings a library that the other does not need.
    if spec.kind == "grpc":
        from load_tests.grpc_target import GrpcTarget

        return GrpcTarget(spec)
    from load_tests.rest_target import RestTarget

    return RestTarget(spec)
