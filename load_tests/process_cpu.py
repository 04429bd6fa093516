"""CPU time of processes and their threads, from Linux' own books.

`/proc/PID/task/*/schedstat` counts nanoseconds; the ticks of `/proc/PID/stat` are 10 ms, which is coarser than several
steps of a control plane.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = 100  # USER_HZ, the same on every Linux that Python runs on


@dataclass(frozen=True, slots=True)
class CpuReading:
    """CPU seconds since the process started. Threads that have ended are not in it."""

    main_thread_s: float
    other_threads_s: float

    @property
    def total_s(self) -> float:
        return self.main_thread_s + self.other_threads_s

    def __sub__(self, earlier: CpuReading) -> CpuReading:
        return CpuReading(self.main_thread_s - earlier.main_thread_s, self.other_threads_s - earlier.other_threads_s)


def read_cpu(pid: int) -> CpuReading:
    """Raises `ProcessLookupError` if there is no such process."""
    main_s = other_s = 0.0
    tasks = Path(f"/proc/{pid}/task")
    if not tasks.is_dir():
        raise ProcessLookupError(f"there is no process {pid}")
    for task in tasks.iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that ends meanwhile
            seconds = int((task / "schedstat").read_text().split()[0]) * 1e-9
            if task.name == str(pid):
                main_s = seconds
            else:
                other_s += seconds
    return CpuReading(main_s, other_s)


def idle_cpu_s() -> float:
    """Seconds that all cores of the machine together were idle since it started."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()
    return (int(fields[4]) + int(fields[5])) / _TICKS_PER_S
