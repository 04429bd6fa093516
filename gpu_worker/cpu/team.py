"""The threads that work on a step: the one that runs it, and helpers that watch for its jobs while they come."""

from __future__ import annotations

import threading
import weakref

import numpy as np
import numpy.typing as npt

from gpu_worker.cpu.compiling import CompiledKernels
from gpu_worker.cpu.layout import TEAM

_LINE_BYTES = 64


class Team:
    """`num_threads` with the caller's. One thread at a time may call.

    A helper watches for a fraction of a millisecond after the last job, then waits to be woken: nothing spins between
    requests.
    """

    def __init__(self, kernels: CompiledKernels, num_threads: int) -> None:
        self.kernels = kernels
        self.num_threads = num_threads
        size = TEAM.IS_PARKED + num_threads * TEAM.LINE
        self._memory, self.address = _aligned_int64(size)
        self._memory[TEAM.NUM_THREADS] = num_threads
        self._memory[TEAM.KERNELS : TEAM.KERNELS + len(kernels.items)] = [item.address for item in kernels.items]
        self._num_buffer_bytes = 0
        self._locks = [threading.Lock() for _ in range(num_threads - 1)]
        for index, lock in enumerate(self._locks):
            lock.acquire()
            self._memory[TEAM.IS_PARKED + (index + 1) * TEAM.LINE] = 1
            threading.Thread(
                target=_help,
                args=(kernels, self._memory, self.address, index + 1, lock),
                name=f"cpu-helper-{index + 1}",
                daemon=True,
            ).start()
        self._finalizer = weakref.finalize(self, _end, self._memory, self._locks)

    def reserve(self, num_bytes: int) -> None:
        """Give every thread a buffer of at least this size."""
        if num_bytes <= self._num_buffer_bytes:
            return
        self._num_buffer_bytes = -(-num_bytes // _LINE_BYTES) * _LINE_BYTES
        self._buffers, address = _aligned_int64(self._num_buffer_bytes * self.num_threads // 8)
        self._memory[TEAM.BUFFERS], self._memory[TEAM.BUFFER_BYTES] = address, self._num_buffer_bytes

    def wake(self) -> None:
        """Jobs are about to come."""
        for index, lock in enumerate(self._locks):
            place = TEAM.IS_PARKED + (index + 1) * TEAM.LINE
            if self._memory[place]:
                self._memory[place] = 0
                lock.release()


def _aligned_int64(size: int) -> tuple[npt.NDArray[np.int64], int]:
    """Zeros that begin with a cache line, and their address."""
    raw = np.zeros(size + _LINE_BYTES // 8, dtype=np.int64)
    start = -raw.ctypes.data % _LINE_BYTES // 8
    memory = raw[start : start + size]
    return memory, memory.ctypes.data


def _help(
    kernels: CompiledKernels, memory: npt.NDArray[np.int64], address: int, thread: int, lock: threading.Lock
) -> None:
    help_team = kernels.entry_points.help_team
    while True:
        lock.acquire()
        if memory[TEAM.ENDS]:
            return
        help_team(address, thread)


def _end(memory: npt.NDArray[np.int64], locks: list[threading.Lock]) -> None:
    memory[TEAM.ENDS] = 1
    for lock in locks:
        if lock.locked():
            lock.release()
