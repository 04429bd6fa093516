"""The gateway's settings: flags, STEPWIRE_* variables, a YAML file and defaults, in this precedence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, SecretStr, model_validator
from stepwire.process import settings as process_settings
from stepwire.process.settings import Port, PositiveInt, ProcessSettings, Secrets, Strings

PROGRAM = "python -m gateway"


class GatewaySettings(ProcessSettings):
    """Answers OpenAI's REST API by asking a control plane over gRPC."""

    program: ClassVar[str] = PROGRAM

    # Where it listens, and who may ask.
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for every network")
    port: Port = Field(8000, description="port to listen on; 0: any free one")
    uds: Path | None = Field(None, description="listen on this unix socket instead of host and port")
    api_key: Secrets = Field(
        (), description="key that clients send as 'Authorization: Bearer KEY'; several separated by commas; none: open"
    )
    cors_origins: Strings = Field(
        (), description="origins whose web pages may use the server, separated by commas; * for all; none: closed"
    )
    tls_cert: Path | None = Field(None, description="PEM certificate chain of this server; with tls_key")
    tls_key: Path | None = Field(None, description="PEM private key of tls_cert")

    # Several of them on one port.
    gateway_processes: PositiveInt = Field(
        1, description="processes that answer on the port: each takes connections and asks the control plane by itself"
    )
    gateway_process: Annotated[int, Field(ge=0)] | None = Field(
        None, description="which of several processes this is; given by the one that starts them"
    )
    gateway_run_dir: Path | None = Field(
        None, description="what several processes share while they live; given by the one that starts them"
    )

    # Whom it asks.
    control_plane: str = Field(
        "127.0.0.1:50051", description="the control plane's public gRPC service: HOST:PORT or unix:/PATH"
    )
    control_plane_api_key: SecretStr | None = Field(
        None, description="key that the control plane asks for; default: the first api_key"
    )
    control_plane_tls_ca: Path | None = Field(
        None, description="PEM roots that the control plane's certificate is checked against; turns TLS on"
    )
    control_plane_tls_cert: Path | None = Field(
        None, description="PEM certificate chain that this gateway shows; with control_plane_tls_key"
    )
    control_plane_tls_key: Path | None = Field(None, description="PEM private key of control_plane_tls_cert")

    control_plane_admin: str | None = Field(
        None,
        description="the control plane's AdminService, HOST:PORT or unix:/PATH: the console's live view comes from "
        "there; default: no live view",
    )
    control_plane_admin_api_key: SecretStr | None = Field(None, description="key that AdminService asks for")

    # What it remembers.
    data_dir: Path | None = Field(
        None,
        description="directory for stored responses, files and batches; one gateway each, with all its processes; "
        "default: a temporary one that ends with the gateway",
    )
    responses_store: bool = Field(True, description="keep responses of /v1/responses unless a request says otherwise")
    responses_max: PositiveInt = Field(10_000, description="responses kept; the oldest go first")
    responses_ttl_s: float = Field(30 * 86400.0, gt=0, description="seconds that a response is kept")
    responses_events_max_bytes: PositiveInt = Field(
        2**30,
        description="events of streamed background responses, all together, in bytes; those of the oldest that have "
        "ended go first",
    )

    files_max_bytes: PositiveInt = Field(200 * 2**20, description="largest file of /v1/files, in bytes")
    files_max_total_bytes: PositiveInt = Field(4 * 2**30, description="all files together, in bytes")
    files_ttl_s: float = Field(30 * 86400.0, gt=0, description="seconds that a file is kept")
    batch_concurrency: PositiveInt = Field(
        16, description="requests of batches that run at one time; fewer while other requests are being answered"
    )
    batch_max_requests: PositiveInt = Field(50_000, description="most requests in one batch")
    batch_window_s: float = Field(
        86_400.0, gt=0, description="a batch's completion window, in seconds: what is not answered by then has expired"
    )

    # How strict it is.
    unknown_fields: Literal["ignore", "reject"] = Field(
        "ignore",
        description="a field of a request's body that neither OpenAI's API nor vLLM's extensions know: ignore it, or "
        "reject the request with 400",
    )

    # The console.
    console: bool = Field(True, description="serve the web console at /")

    # Limits.
    max_body_bytes: PositiveInt = Field(8 * 2**20, description="largest request body, in bytes")
    max_concurrent_requests: PositiveInt = Field(
        4096, description="HTTP requests that a process answers at one time; more are refused with 429"
    )
    max_batch_prompts: PositiveInt = Field(1024, description="most prompts in one request to /v1/completions")
    sse_keepalive_s: float = Field(
        0.0, ge=0, description="send a comment on a stream that was silent for so many seconds; 0: never"
    )
    drain_timeout_s: float = Field(
        30.0, ge=0, description="seconds that running requests may still take after SIGTERM before they are cut off"
    )

    @model_validator(mode="after")
    def _check_together(self) -> GatewaySettings:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key belong together: give both, or neither")
        if (self.control_plane_tls_cert is None) != (self.control_plane_tls_key is None):
            raise ValueError(
                "--control-plane-tls-cert and --control-plane-tls-key belong together: give both, or neither"
            )
        if self.control_plane_tls_cert is not None and self.control_plane_tls_ca is None:
            raise ValueError("--control-plane-tls-cert needs --control-plane-tls-ca: without it nothing is encrypted")
        if self.gateway_processes > 1 and self.uds is not None:
            raise ValueError("--gateway-processes share a port, not a socket: leave --uds out, or have one process")
        if (self.gateway_process is None) != (self.gateway_run_dir is None):
            raise ValueError("--gateway-process and --gateway-run-dir are for processes that a gateway has started")
        for flag, address in (
            ("--control-plane", self.control_plane),
            ("--control-plane-admin", self.control_plane_admin),
        ):
            if address is not None and not address.startswith("unix:") and ":" not in address:
                raise ValueError(f"{flag} must be HOST:PORT or unix:/PATH, got {address!r}")
        return self

    @property
    def is_one_of_several(self) -> bool:
        return self.gateway_process is not None

    @property
    def answers_itself(self) -> bool:
        """And does not start others that do."""
        return self.gateway_processes == 1 or self.is_one_of_several

    @property
    def api_keys(self) -> tuple[str, ...]:
        return tuple(key.get_secret_value() for key in self.api_key)

    @property
    def key_for_control_plane(self) -> str | None:
        if self.control_plane_api_key is not None:
            return self.control_plane_api_key.get_secret_value()
        return self.api_keys[0] if self.api_keys else None


def parse_settings(argv: Sequence[str]) -> GatewaySettings:
    """Settings from flags (without the program's name), environment and file; a mistake ends with exit code 2."""
    return process_settings.parse_settings(GatewaySettings, argv)
