"""`python -m control_plane`: one control plane, from its flags to its exit code."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import sys
import time
from collections.abc import Callable

import structlog
import uvloop
from prometheus_client import CollectorRegistry
from stepwire.process.file_limit import raise_file_limit, watch_file_limit
from stepwire.process.logs import set_up_logging
from stepwire.process.parent import end_with_parent
from stepwire.process.tls import TlsFileError, client_credentials

from control_plane.admin.server import create_admin_server
from control_plane.admin.servicer import AdminServicer
from control_plane.config import PROGRAM, ControlPlaneSettings, parse_settings
from control_plane.core.engine import Engine
from control_plane.core.engine_config import EngineConfig
from control_plane.core.metrics import CoreMetrics
from control_plane.core.worker_link import WorkerAddress
from control_plane.frontend.model_files import ModelFilesError
from control_plane.frontend.served_model import load_served_model
from control_plane.frontend.server import FrontendServer, ListenError, create_server
from control_plane.metrics_page import serve_metrics_page

log = structlog.get_logger("control_plane")

# How long open calls may take to send their last message once everything has ended.
_LAST_MESSAGES_S = 2.0
# Below this many connections a server of many clients is in the way of some.
_NUM_FILES_WANTED = 1024


def main() -> int:
    settings = parse_settings(sys.argv[1:])
    if settings.exit_with_parent:
        end_with_parent()
    set_up_logging(settings)
    raise_file_limit(_NUM_FILES_WANTED)
    # The step loop shares the interpreter with tokenizer threads: let it take over quickly.
    sys.setswitchinterval(1e-4)
    try:
        uvloop.run(_serve(settings))
    except (ListenError, ModelFilesError, TlsFileError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    return 0


async def _serve(settings: ControlPlaneSettings) -> None:
    started_s = time.monotonic()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    model = load_served_model(
        settings.model,
        names=settings.served_model_name,
        chat_template_file=settings.chat_template,
        num_tokenizer_threads=settings.tokenizer_threads,
        tool_call_parser=settings.tool_call_parser,
        reasoning_parser=settings.reasoning_parser,
    )
    registry = CollectorRegistry()
    address_of = _worker_addresses(settings)
    addresses = [address_of(worker) for worker in settings.workers]
    engine = Engine(addresses, _engine_config(settings), CoreMetrics(registry))
    server = await create_server(settings, engine, model, registry)
    admin = create_admin_server(
        settings,
        AdminServicer(
            engine,
            server.metrics,
            drain_timeout_s=settings.drain_timeout_s,
            begin_drain=server.begin_drain,
            exit_process=stop.set,
            address_of=address_of,
        ),
    )
    _serve_metrics(settings, registry)
    await server.start()
    if admin is not None:
        await admin.start()
    # Nothing that lives now becomes garbage, and steps make none in cycles: collections only delay them.
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    log.info(
        "listening", grpc=f"{settings.grpc_host}:{server.port}", socket=settings.listen, workers=list(settings.workers)
    )
    tasks = [
        asyncio.create_task(engine.run()),
        asyncio.create_task(_follow_worker(engine, server, started_s)),
        asyncio.create_task(watch_file_limit()),
    ]
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([*tasks, stopped], return_when=asyncio.FIRST_COMPLETED)
    if stop.is_set():
        await _drain(settings, engine, server, stop)
    if admin is not None:
        await admin.stop(0)
    for task in tasks:
        task.cancel()
    # A task that ended by itself failed: its exception ends the process.
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Exception):
            raise outcome


async def _follow_worker(engine: Engine, server: FrontendServer, started_s: float) -> None:
    """Health says what is true: SERVING while a worker is there, whichever group's it is."""
    while True:
        await engine.wait_connected()
        await server.set_serving(True)
        log.info("ready", seconds=round(time.monotonic() - started_s, 2))
        await engine.wait_lost()
        await server.set_serving(False)


async def _drain(settings: ControlPlaneSettings, engine: Engine, server: FrontendServer, stop: asyncio.Event) -> None:
    """Refuse what is new, let what is admitted finish, end the rest; a second signal ends it at once."""
    log.info("draining", limit_s=settings.drain_timeout_s)
    stop.clear()
    await server.begin_drain()
    drained = asyncio.create_task(engine.drain(settings.drain_timeout_s))
    again = asyncio.create_task(stop.wait())
    await asyncio.wait([drained, again], return_when=asyncio.FIRST_COMPLETED)
    if not drained.done() or not drained.result():
        log.warning("ending requests that are still running")
        engine.abort_all("the server is shutting down")
    for task in (drained, again):
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await server.stop(_LAST_MESSAGES_S)
    log.info("stopped")


def _engine_config(settings: ControlPlaneSettings) -> EngineConfig:
    return EngineConfig(
        max_num_batched_tokens=settings.max_num_batched_tokens,
        mixed_step_tokens=settings.mixed_step_tokens,
        max_queued_requests=settings.max_queued_requests,
        max_queued_tokens=settings.max_queued_tokens,
        scheduling_policy=settings.scheduling_policy,
        enable_prefix_caching=settings.enable_prefix_caching,
        steps_in_flight=settings.steps_in_flight,
        step_timeout_s=settings.step_timeout_s,
    )


def _worker_addresses(settings: ControlPlaneSettings) -> Callable[[str], WorkerAddress]:
    """What makes an address of where a worker listens: all workers are spoken to alike. Raises `TlsFileError`."""
    if settings.worker_tls_ca is None:
        return WorkerAddress
    own_cert, own_key = settings.worker_tls_cert, settings.worker_tls_key
    credentials = client_credentials("--worker-tls", settings.worker_tls_ca, own_cert, own_key)
    return lambda worker: WorkerAddress(worker, credentials)


def _serve_metrics(settings: ControlPlaneSettings, registry: CollectorRegistry) -> None:
    try:
        serve_metrics_page(settings.metrics_host, settings.metrics_port, registry)
    except OSError as error:
        raise ListenError(
            f"port {settings.metrics_port} on {settings.metrics_host} cannot be used for metrics ({error.strerror}): "
            "choose another with --metrics-port"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
