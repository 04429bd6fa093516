"""`stepwire doctor`: what is installed, what the machine has, and what would go wrong with `stepwire serve`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import stepwire

Level = Literal["ok", "warning", "problem"]

_PACKAGES = {
    "gateway": ("fastapi", "uvicorn", "grpcio", "orjson"),
    "control plane": ("tokenizers", "jinja2", "grpcio"),
    "worker": ("torch", "safetensors", "triton"),
    "prepare": ("gguf", "huggingface_hub", "transformers"),
}
# triton has wheels for Linux on x86-64 only, and a CPU worker does without.
_OPTIONAL = frozenset({"triton"})
_MIN_OPEN_FILES = 4096
_MIN_MEMORY_GIB, _MIN_DISK_GIB = 2.0, 5.0
_ASK_TIMEOUT_S = 60.0
# Asked of another process: this one runs without torch.
_ASK_TORCH = """
import json, torch
devices = [
    {"name": torch.cuda.get_device_name(i), "memory_gib": round(torch.cuda.mem_get_info(i)[1] / 2**30, 1),
     "free_gib": round(torch.cuda.mem_get_info(i)[0] / 2**30, 1),
     "compute_capability": "%d.%d" % torch.cuda.get_device_capability(i)}
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
]
print(json.dumps({"cuda": torch.version.cuda, "devices": devices, "threads": torch.get_num_threads()}))
"""


@dataclass(frozen=True, slots=True)
class Finding:
    subject: str
    level: Level
    text: str
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine(host: str, ports: dict[str, int], cache_dir: Path) -> Iterator[Finding]:
    """Every finding, in the order in which they matter."""
    yield _python()
    yield from _packages()
    yield from _devices()
    yield _memory()
    yield _disk(cache_dir)
    yield _open_files()
    for flag, port in ports.items():
        yield _port(host, flag, port)


def _python() -> Finding:
    version = platform.python_version()
    facts = {"stepwire": stepwire.__version__, "python": version, "system": platform.platform()}
    text = f"stepwire {stepwire.__version__}, Python {version} on {platform.system()} {platform.machine()}"
    if platform.system() != "Linux":
        return Finding("python", "warning", f"{text}: only Linux is tested", facts)
    return Finding("python", "ok", text, facts)


def _packages() -> Iterator[Finding]:
    for service, names in _PACKAGES.items():
        versions: dict[str, str | None] = {name: _version(name) for name in names}
        missing = [name for name, version in versions.items() if version is None and name not in _OPTIONAL]
        shown = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        extra = service.replace(" ", "-")
        if missing:
            text = f"{', '.join(missing)} not installed: pip install 'stepwire[{extra}]'"
            yield Finding(service, "problem", text, versions)
        else:
            yield Finding(service, "ok", shown, versions)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        return
    try:
        answer = subprocess.run(
            [sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, timeout=_ASK_TIMEOUT_S, check=True
        )
        facts = json.loads(answer.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        yield Finding("devices", "problem", f"torch did not answer within {_ASK_TIMEOUT_S:g} s: is a GPU hung?")
        return
    except (subprocess.CalledProcessError, json.JSONDecodeError, IndexError) as error:
        output = getattr(error, "stderr", "") or ""
        yield Finding("devices", "problem", f"torch cannot be imported: {output.strip().splitlines()[-1:]}")
        return
    has_driver = shutil.which("nvidia-smi") is not None
    if facts["devices"]:
        for device in facts["devices"]:
            text = f"{device['name']}, {device['free_gib']} of {device['memory_gib']} GiB free, CUDA {facts['cuda']}"
            is_busy = device["free_gib"] < 0.5 * device["memory_gib"]
            hint = ": another process holds its memory; lower --gpu-memory-utilization" if is_busy else ""
            yield Finding("device", "warning" if is_busy else "ok", text + hint, device)
    elif has_driver and facts["cuda"] is None:
        yield Finding("device", "problem", "there is an NVIDIA driver, but torch was built without CUDA", facts)
    elif has_driver:
        yield Finding("device", "problem", "there is an NVIDIA driver, but torch finds no GPU: see nvidia-smi", facts)
    else:
        yield Finding("device", "ok", f"no GPU: the model runs on the CPU, {facts['threads']} threads", facts)


def _memory() -> Finding:
    fields = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines() if ":" in line
    )
    total, free = (int(fields[name].split()[0]) / 2**20 for name in ("MemTotal", "MemAvailable"))
    facts = {"total_gib": round(total, 1), "available_gib": round(free, 1)}
    text = f"{free:.1f} of {total:.1f} GiB of memory free"
    if free < _MIN_MEMORY_GIB:
        return Finding("memory", "warning", f"{text}: a CPU worker keeps 2 GiB of KV cache (--cpu-kv-cache-gib)", facts)
    return Finding("memory", "ok", text, facts)


def _disk(cache_dir: Path) -> Finding:
    existing = next(path for path in (cache_dir, *cache_dir.parents) if path.exists())
    free = shutil.disk_usage(existing).free / 2**30
    text, facts = f"{free:.1f} GiB free for converted models in {cache_dir}", {"free_gib": round(free, 1)}
    if free < _MIN_DISK_GIB:
        return Finding("disk", "warning", f"{text}: choose another place with --cache-dir", facts)
    return Finding("disk", "ok", text, facts)


def _open_files() -> Finding:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    facts = {"hard_limit": None if hard == resource.RLIM_INFINITY else hard}
    if hard != resource.RLIM_INFINITY and hard < _MIN_OPEN_FILES:
        text = f"at most {shown} open files: about as many connections are answered; raise it with ulimit -Hn"
        return Finding("open files", "warning", text, facts)
    return Finding("open files", "ok", f"at most {shown} open files", facts)


def _port(host: str, flag: str, port: int) -> Finding:
    facts = {"host": host, "port": port}
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        text = f"{host}:{port} cannot be used ({error.strerror}): stop what listens there, or choose another {flag}"
        return Finding(flag, "problem", text, facts)
    return Finding(flag, "ok", f"{host}:{port} is free", facts)
