"""`stepwire serve`: gateway, control plane and workers as subprocesses over unix sockets, kept running as one.

The launcher imports none of them. It waits until the gateway says that everything behind it is ready, restarts a
process that dies, and ends them in the order in which requests flow, so that what is running can finish. Each of them
ends by itself when the launcher is killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import structlog
from stepwire.process.logs import set_up_logging
from stepwire.process.model_names import name_of_directory
from stepwire.process.settings import parse_settings

from gateway.child_process import ChildFailed, ChildProcess, first_failure, raise_failure, unless
from gateway.launch_settings import CONTROL_PLANE, GATEWAY, WORKER, LaunchSettings
from gateway.worker_processes import TooFewDevices, WorkerStart, worker_starts

log = structlog.get_logger("stepwire")

_POLL_S = 0.05
_ANSWER_TIMEOUT_S = 1.0
# What a process may take to end on top of its time for draining.
_STOP_MARGIN_S = 5.0


class LaunchError(Exception):
    """The stack cannot be started; one line that says what to do."""


def serve(arguments: Sequence[str]) -> int:
    """Run the stack until Ctrl-C or SIGTERM; returns the exit code."""
    settings = parse_settings(LaunchSettings, arguments)
    set_up_logging(settings)
    try:
        asyncio.run(_serve(settings))
    except (LaunchError, ChildFailed) as error:
        print(f"{settings.program}: {error}", file=sys.stderr)
        return 1
    return 0


async def _serve(settings: LaunchSettings) -> None:
    started_s = time.monotonic()
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            hurry.set()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    _check_ports(settings)
    model = await unless(stop, _prepare(settings))
    if model is None:
        return
    with tempfile.TemporaryDirectory(prefix="stepwire-") as directory:
        services = _services(settings, model, Path(directory))
        keepers = [asyncio.create_task(service.keep_running()) for service in services]
        try:
            if await unless(stop, _wait_ready(settings, keepers)):
                for service in services:
                    service.was_ready = True
                print(_banner(settings, model, time.monotonic() - started_s), flush=True)
                await unless(stop, first_failure(keepers))
        finally:
            for keeper in keepers:
                keeper.cancel()
            await asyncio.gather(*keepers, return_exceptions=True)
            for service in services:
                await service.stop(hurry)


def _check_ports(settings: LaunchSettings) -> None:
    """Before anything is started: whoever holds a port may well answer in our place."""
    for flag, port in (
        ("--port", settings.port),
        ("--grpc-port", settings.grpc_port),
        ("--metrics-port", settings.metrics_port),
        *([] if settings.admin_port is None else [("--admin-port", settings.admin_port)]),
    ):
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(settings.host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            what = f"port {port} on {settings.host} cannot be used ({error.strerror})"
            raise LaunchError(f"{what}: stop what listens there, or choose another with {flag}") from error


# What a GGUF file becomes, by device or by what was asked for.
_WEIGHTS_FOR = {"auto": "auto", "cuda": "packed", "packed": "packed", "cpu": "bfloat16", "dequantized": "bfloat16"}


def prepare_command(settings: LaunchSettings) -> list[str]:
    """Turns the model source into what the services read; compiles what the worker would at its first start."""
    command = [sys.executable, "-m", "gpu_worker.prepare", settings.model]
    if settings.cache_dir is not None:
        command += ["--cache-dir", str(settings.cache_dir)]
    is_simulated = settings.runner == "simulated"
    if settings.load_format == "dummy" or is_simulated:
        command.append("--config-only")
    device = settings.device if settings.gguf_weights == "auto" else settings.gguf_weights
    command.append(f"--dtype={_WEIGHTS_FOR[device]}")
    wants_kernels = settings.dtype == "bfloat16" and settings.device != "cuda"
    if wants_kernels and settings.cpu_kernels != "off" and not (is_simulated or settings.deterministic):
        command.append(f"--cpu-kernels={settings.cpu_kernels}")
        if settings.kernel_cache_dir is not None:
            command.append(f"--kernel-cache-dir={settings.kernel_cache_dir}")
    return command


async def _prepare(settings: LaunchSettings) -> Path:
    """Have the model source turned into what the services read; returns the directory."""
    process = await asyncio.create_subprocess_exec(
        *prepare_command(settings), stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    try:
        output, _ = await process.communicate()
    except asyncio.CancelledError:
        process.terminate()
        await process.wait()
        raise
    if process.returncode != 0:
        raise LaunchError(f"{settings.model} cannot be served: the message above says why")
    return Path(output.decode().strip().splitlines()[-1])


def _services(settings: LaunchSettings, model: Path, directory: Path) -> list[ChildProcess]:
    """The processes, in the order in which they are to end: requests stop flowing first."""
    control_plane_socket = f"unix:{directory}/control-plane.sock"
    admin_socket = f"unix:{directory}/admin.sock"
    # The settings file is the launcher's: what it says reaches the processes as flags.
    environment = {name: value for name, value in os.environ.items() if name != "STEPWIRE_CONFIG"}
    if settings.api_key:
        keys = [key.get_secret_value() for key in settings.api_key]
        # Not as flags: anybody on the machine can read those.
        environment["STEPWIRE_API_KEY"] = ",".join(keys)
        environment["STEPWIRE_CONTROL_PLANE_API_KEY"] = keys[0]
    if settings.admin_api_key:
        keys = [key.get_secret_value() for key in settings.admin_api_key]
        environment["STEPWIRE_ADMIN_API_KEY"] = ",".join(keys)
        environment["STEPWIRE_CONTROL_PLANE_ADMIN_API_KEY"] = keys[0]
    try:
        workers = worker_starts(settings, directory, environment)
    except TooFewDevices as error:
        raise LaunchError(str(error)) from None
    common = ["--exit-with-parent", f"--log-level={settings.log_level}", f"--log-format={settings.log_format}"]
    drain = f"--drain-timeout-s={settings.drain_timeout_s}"
    arguments = {
        GATEWAY: [
            f"--host={settings.host}",
            f"--control-plane={control_plane_socket}",
            f"--control-plane-admin={admin_socket}",
            drain,
        ],
        CONTROL_PLANE: [
            f"--model={model}",
            f"--workers={','.join(worker.socket for worker in workers)}",
            f"--listen={control_plane_socket}",
            f"--admin-listen={admin_socket}",
            f"--grpc-host={settings.host}",
            f"--metrics-host={settings.host}",
            drain,
        ],
    }
    if not settings.served_model_name:
        arguments[CONTROL_PLANE].append(f"--served-model-name={_source_name(settings.model)}")
    stop_timeout_s = settings.drain_timeout_s + _STOP_MARGIN_S

    def service(module: str, own: Sequence[str], name: str = "", extra: dict[str, str] | None = None) -> ChildProcess:
        flags = [*own, *settings.flags_for(module), *common]
        return ChildProcess(name or module, module, flags, environment | (extra or {}), stop_timeout_s)

    def worker_service(number: int, worker: WorkerStart) -> ChildProcess:
        own = [f"--model={model}", f"--listen={worker.socket}", *worker.flags]
        name = f"{WORKER} {number}" if len(workers) > 1 else WORKER
        return service(WORKER, own, name, worker.environment)

    return [
        service(GATEWAY, arguments[GATEWAY]),
        service(CONTROL_PLANE, arguments[CONTROL_PLANE]),
        *(worker_service(number, worker) for number, worker in enumerate(workers)),
    ]


def _source_name(source: str) -> str:
    """The name to serve under if nobody chose one: a hub id as it is, a file or directory by its name."""
    path = Path(source)
    if path.exists():
        return path.resolve().stem if path.is_file() else name_of_directory(path)
    return source.removeprefix("pypi:")


async def _wait_ready(settings: LaunchSettings, keepers: Sequence[asyncio.Task[None]]) -> bool:
    """Until the gateway says that it and everything behind it can serve."""
    try:
        async with asyncio.timeout(settings.ready_timeout_s):
            while not await _is_ready(settings):
                raise_failure(keepers)
                await asyncio.sleep(_POLL_S)
            # Whoever answered: if a process of ours has ended meanwhile, it was not ours.
            raise_failure(keepers)
    except TimeoutError:
        raise LaunchError(
            f"not ready after {settings.ready_timeout_s:g} s: the log above says how far it came; "
            "--ready-timeout-s gives it longer"
        ) from None
    return True


async def _is_ready(settings: LaunchSettings) -> bool:
    """The gateway can serve once one group is there; a person who started several waits for all of them."""
    host = _reachable(settings.host)
    if (await _get(host, settings.port, "/ready"))[0] != 200:
        return False
    if settings.data_parallel_size == 1 or not settings.metrics_port:
        return True
    _, page = await _get(host, settings.metrics_port, "/metrics")
    connected = re.findall(r"^stepwire_worker_connected{.*} 1\.0$", page, re.MULTILINE)
    return len(connected) == settings.data_parallel_size


async def _get(host: str, port: int, path: str) -> tuple[int | None, str]:
    """Status and body of a GET; no status if nobody answers, at least not in time: the port may be somebody else's."""
    writer = None
    try:
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
            words = (await reader.readline()).split()
            body = (await reader.read()).decode(errors="replace")
            return int(words[1]) if len(words) > 1 and words[1].isdigit() else None, body
    except (OSError, TimeoutError):
        return None, ""
    finally:
        if writer is not None:
            writer.close()


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)


def _first_request(settings: LaunchSettings, model: Path) -> tuple[str, dict[str, Any]]:
    """Something that the model in this directory is likely to answer."""
    task = settings.task
    if task == "auto":
        names = _read_object(model / "config.json").get("architectures") or [""]
        if str(names[0]).endswith("ForSequenceClassification"):
            task = "score"
        elif (model / "modules.json").exists() or str(names[0]).endswith(("Model", "ForMaskedLM")):
            task = "embed"
    if not (model / "tokenizer.json").exists():
        ids = [1, 2, 3]
        return ("embeddings", {"input": ids}) if task == "embed" else ("completions", {"prompt": ids, "max_tokens": 8})
    if task == "embed":
        return "embeddings", {"input": "What is the capital of France?"}
    if task == "score":
        return "score", {"text_1": "What is the capital of France?", "text_2": ["Paris", "Rome"]}
    has_template = settings.chat_template is not None or (model / "chat_template.jinja").exists()
    files = ("tokenizer_config.json", "chat_template.json")
    if has_template or any(_read_object(model / name).get("chat_template") for name in files):
        return "chat/completions", {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
    return "completions", {"prompt": "The capital of France is", "max_tokens": 8}


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON file of the model; empty where there is none: the processes say what is wrong with it."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _banner(settings: LaunchSettings, model: Path, seconds: float) -> str:
    host = _reachable(settings.host)
    name = settings.served_model_name[0] if settings.served_model_name else _source_name(settings.model)
    base_url = f"http://{f'[{host}]' if ':' in host else host}:{settings.port}/v1"
    path, body = _first_request(settings, model)
    request = json.dumps({"model": name, **body})
    key = ' \\\n    -H "Authorization: Bearer $STEPWIRE_API_KEY"' if settings.api_key else ""
    return f"""
stepwire serves {name}, ready after {seconds:.1f} s (Ctrl-C stops it)

  console      {base_url.removesuffix("v1")}
  OpenAI API   {base_url}
  gRPC         {host}:{settings.grpc_port}
  metrics      http://{host}:{settings.metrics_port}/metrics and http://{host}:{settings.port}/metrics

Try:

  curl {base_url}/{path} -H 'Content-Type: application/json'{key} \\
    -d {shlex.quote(request)}
"""
