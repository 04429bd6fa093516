"""Where and with what a number was measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import psutil

_REPOSITORY_ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("grpcio", "protobuf", "uvloop", "aiohttp", "numpy", "fastapi", "uvicorn", "torch", "triton", "vllm")
_COMMAND_TIMEOUT_S = 10.0


def machine_facts() -> dict[str, Any]:
    """CPU, memory and GPUs, and how busy the machine was: a number from a busy machine is not a quiet one's."""
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "num_cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release().partition("-")[0],
        "load_average_1min": round(os.getloadavg()[0], 2),
    }
    gpus = _gpus()
    if gpus:
        facts["gpus"] = gpus
    return facts


def version_facts() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_facts() -> dict[str, Any]:
    """The commit that was measured; `dirty` if files differed from it. Both None outside of a clone."""
    commit = _output("git", "rev-parse", "HEAD")
    status = _output("git", "status", "--porcelain") if commit else None
    return {"commit": commit or None, "dirty": bool(status) if commit else None}


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _gpus() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    lines = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    return lines.splitlines() if lines else []


def _output(*command: str) -> str | None:
    """What a command prints; None if it is not there or fails."""
    try:
        done = subprocess.run(
            command, cwd=_REPOSITORY_ROOT, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def machine_name(machine: dict[str, Any]) -> str:
    """One phrase for a result's `machine`."""
    gpus = machine.get("gpus")
    cpu = f"{machine['num_cores']} cores of {machine['cpu']}"
    return f"{len(gpus)} x {gpus[0].split(',')[0]}, {cpu}" if gpus else cpu
