"""The workers of `stepwire serve`, one a group: what each of them is started with so that they share the machine.

GPUs are dealt out in order through CUDA_VISIBLE_DEVICES; without GPUs, the groups share the CPU's cores.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gateway.launch_settings import LaunchSettings

_DEVICES = "CUDA_VISIBLE_DEVICES"


class TooFewDevices(Exception):
    """The groups asked for need more GPUs than there are; one line that says what to do."""


@dataclass(frozen=True, slots=True)
class WorkerStart:
    """How one group's worker differs from the others."""

    socket: str
    flags: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)


def worker_starts(settings: LaunchSettings, directory: Path, environment: Mapping[str, str]) -> list[WorkerStart]:
    """One entry a group. Raises `TooFewDevices`."""
    num_groups = settings.data_parallel_size
    if num_groups == 1:
        return [WorkerStart(f"unix:{directory}/worker.sock")]
    sockets = [f"unix:{directory}/worker-{number}.sock" for number in range(num_groups)]
    devices = _visible_gpus(environment) if _may_use_gpus(settings) else []
    if not devices:
        flags = [] if settings.num_threads is not None else [f"--num-threads={_threads(num_groups)}"]
        return [WorkerStart(socket, flags) for socket in sockets]
    each = settings.num_gpus_per_group
    if len(devices) < num_groups * each:
        raise TooFewDevices(
            f"--data-parallel-size {num_groups} needs {num_groups * each} GPUs, and {len(devices)} can be seen: "
            f"ask for fewer groups, or set {_DEVICES}"
        )
    return [
        WorkerStart(socket, environment={_DEVICES: ",".join(devices[number * each : (number + 1) * each])})
        for number, socket in enumerate(sockets)
    ]


def _may_use_gpus(settings: LaunchSettings) -> bool:
    return settings.device != "cpu" and settings.runner == "torch"


def _visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Names of the GPUs that a process started here would see. Asks the driver's files: torch is not ours to import."""
    if _DEVICES in environment:
        return [name for name in environment[_DEVICES].split(",") if name.strip()]
    nodes = Path("/dev").glob("nvidia*")
    return [str(number) for number in range(sum(bool(re.fullmatch(r"nvidia\d+", node.name)) for node in nodes))]


def _threads(num_groups: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // num_groups)
