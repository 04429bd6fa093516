"""The control plane's settings: flags, STEPWIRE_* variables, a YAML file and defaults, in this precedence."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from stepwire.process import settings as process_settings
from stepwire.process.settings import Port, PositiveInt, ProcessSettings, Secrets, Strings

from control_plane.frontend.parsers.registry import NONE, REASONING_FORMATS, TOOL_FORMATS

PROGRAM = "python -m control_plane"


class ControlPlaneSettings(ProcessSettings):
    """Schedules every request and drives the workers; serves the public gRPC API."""

    program: ClassVar[str] = PROGRAM

    # What is served.
    model: Path | None = Field(
        None, description="model directory with tokenizer.json and the JSON files beside it; default: token ids only"
    )
    served_model_name: Strings = Field(
        (),
        description="names that clients may use for the model, separated by commas; answers carry the first; "
        "default: the directory's name",
    )
    chat_template: Path | None = Field(None, description="jinja file to use instead of the model's own chat template")

    tool_call_parser: str = Field(
        "auto", description=f"how the model writes tool calls: auto, none, {', '.join(TOOL_FORMATS)}"
    )
    reasoning_parser: str = Field(
        "auto", description=f"how the model marks its reasoning: auto, none, {', '.join(REASONING_FORMATS)}"
    )

    # The workers.
    workers: Strings = Field(
        ("127.0.0.1:50061",),
        description="where the workers listen: HOST:PORT or unix:/PATH, one a worker group, separated by commas",
    )
    worker_tls_ca: Path | None = Field(
        None, description="PEM roots that the workers' certificates are checked against; turns TLS on towards HOST:PORT"
    )
    worker_tls_cert: Path | None = Field(
        None, description="PEM certificate chain shown to the workers; with worker_tls_key"
    )
    worker_tls_key: Path | None = Field(None, description="PEM private key of worker_tls_cert")
    step_timeout_s: float = Field(
        60.0,
        gt=0,
        description="seconds after which a step without a result means a hung worker, until steps were timed",
    )
    steps_in_flight: int = Field(
        2,
        ge=1,
        le=4,
        description="steps sent ahead of their results; 1 waits for each result, 2 keeps the worker busy and becomes 3 "
        "while steps are shorter than 1.5 ms",
    )

    # The public gRPC API.
    grpc_host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for every network")
    grpc_port: Port = Field(50051, description="port of the public gRPC API; 0: any free one")
    listen: str | None = Field(None, description="also listen on this unix socket, written unix:/PATH")
    api_key: Secrets = Field(
        (),
        description="key that calls carry as metadata 'authorization: Bearer KEY'; several separated by commas; "
        "none: open",
    )
    tls_cert: Path | None = Field(None, description="PEM certificate chain of the public port; with tls_key")
    tls_key: Path | None = Field(None, description="PEM private key of tls_cert")
    tls_client_ca: Path | None = Field(
        None, description="PEM roots; only clients with a certificate by them may connect"
    )

    # AdminService, for whoever runs the server.
    admin_host: str = Field("127.0.0.1", description="address that AdminService listens on; with admin_port")
    admin_port: Port | None = Field(
        None, description="port of AdminService (drain, WatchSteps); 0: any free one; default: not served over TCP"
    )
    admin_listen: str | None = Field(None, description="serve AdminService on this unix socket, written unix:/PATH")
    admin_api_key: Secrets = Field(
        (),
        description="key that AdminService's calls carry as metadata 'authorization: Bearer KEY'; several separated "
        "by commas; needed once admin_host is not this machine",
    )

    # Metrics.
    metrics_host: str = Field("127.0.0.1", description="address of the metrics page; 0.0.0.0 for every network")
    metrics_port: Port = Field(8001, description="port of the metrics page (/metrics); 0: any free one")

    # Scheduling and limits.
    max_num_batched_tokens: PositiveInt | None = Field(
        None, description="most tokens one step runs, prefill and decode together; default: what the worker announces"
    )
    mixed_step_tokens: PositiveInt = Field(
        512,
        description="tokens that a step is filled up to with waiting prompts while other requests generate; more if "
        "many wait. Smaller: steadier gaps between tokens; larger: sooner first tokens",
    )
    max_queued_requests: PositiveInt = Field(
        1024, description="requests that may wait; more are refused with RESOURCE_EXHAUSTED and a time to retry"
    )
    max_queued_tokens: PositiveInt = Field(2**20, description="prompt tokens that may wait, all requests together")
    scheduling_policy: Literal["fcfs", "priority"] = Field(
        "fcfs", description="who runs first: who came first, or whose priority number is lower; batches come last"
    )
    enable_prefix_caching: bool = Field(
        True, description="keep the KV of finished requests and reuse it for prompts that begin alike"
    )
    max_n: PositiveInt = Field(128, description="most continuations (n) that one request may ask for")
    tokenizer_threads: PositiveInt = Field(2, description="threads that tokenize prompts and render chat templates")

    # The process.
    drain_timeout_s: float = Field(
        30.0, ge=0, description="seconds that running requests may still take after SIGTERM before they are cut off"
    )

    @field_validator("listen", "admin_listen")
    @classmethod
    def _check_listen(cls, listen: str | None) -> str | None:
        if listen is not None and not listen.removeprefix("unix:").startswith("/"):
            raise ValueError("must be an absolute path, written unix:/PATH")
        return listen

    @field_validator("tool_call_parser")
    @classmethod
    def _check_tool_call_parser(cls, name: str) -> str:
        return _known("tool_call_parser", name, TOOL_FORMATS)

    @field_validator("reasoning_parser")
    @classmethod
    def _check_reasoning_parser(cls, name: str) -> str:
        return _known("reasoning_parser", name, REASONING_FORMATS)

    @field_validator("workers")
    @classmethod
    def _check_workers(cls, workers: tuple[str, ...]) -> tuple[str, ...]:
        if not workers:
            raise ValueError("must name at least one worker, as HOST:PORT or unix:/PATH")
        for worker in workers:
            check_worker_address(worker)
        if len(set(workers)) < len(workers):
            raise ValueError("names a worker twice: each group has a worker of its own")
        return workers

    @model_validator(mode="after")
    def _check_together(self) -> ControlPlaneSettings:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key belong together: give both, or neither")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError(
                "--tls-client-ca needs --tls-cert and --tls-key: without them the connection is not encrypted"
            )
        if (self.worker_tls_cert is None) != (self.worker_tls_key is None):
            raise ValueError("--worker-tls-cert and --worker-tls-key belong together: give both, or neither")
        if self.worker_tls_cert is not None and self.worker_tls_ca is None:
            raise ValueError("--worker-tls-cert needs --worker-tls-ca: without it the connection is not encrypted")
        if self.admin_port is not None and not self.admin_api_key and not _is_this_machine(self.admin_host):
            raise ValueError(
                f"--admin-host {self.admin_host} is reachable from elsewhere and AdminService can end this server: "
                "set --admin-api-key, or leave --admin-host at 127.0.0.1"
            )
        return self


def check_worker_address(worker: str) -> None:
    """Raise `ValueError` for what is not an address."""
    _, colon, port = worker.rpartition(":")
    if not worker.startswith("unix:/") and not (colon and port.isdecimal()):
        raise ValueError(f"{worker} is neither HOST:PORT nor unix:/PATH")


def _known(field: str, name: str, formats: Collection[str]) -> str:
    if name not in ("auto", NONE, *formats):
        raise ValueError(f"{field} {name} is not known; there are auto, none, {', '.join(formats)}")
    return name


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parse_settings(argv: Sequence[str]) -> ControlPlaneSettings:
    """Settings from flags (without the program's name), environment and file; a mistake ends with exit code 2."""
    return process_settings.parse_settings(ControlPlaneSettings, argv)
