"""When things happen on the device: step buffers on their way in, steps one after another, results on their way out.

Three parties share a ring of slots. The host writes a step into a slot's page-locked buffer; a copy stream brings it to
the device while the step before still computes; the compute stream moves it to the one place that kernels read. The
step's last kernel writes its results into the slot's page-locked result record. A slot is used again when its results
have been read, and at two steps in flight nobody ever waits for that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

Int32Array = npt.NDArray[np.int32]

NUM_SLOTS = 4


def num_slots(num_stages: int) -> int:
    """One step more than stages is in flight, and a slot's former reads the events of the one after it."""
    return max(NUM_SLOTS, num_stages + 2)


@dataclass(frozen=True, slots=True)
class StepTimes:
    """A finished step on the device's own clock."""

    forward_ns: int  # from its first kernel to the logits, or to the end where a graph holds both
    sample_ns: int
    idle_ns: int  # from the end of the step before to this step's begin; -1: there was none


class Timeline(Protocol):
    """What a runner needs of streams and events. One implementation drives a CUDA device."""

    packed: torch.Tensor  # int32 [capacity]: the step buffer that kernels read
    results: torch.Tensor  # int32 [num_slots, words]: written by the device, read by the host

    def host_buffer(self, slot: int) -> Int32Array:
        """The slot's buffer for the next step, once the device has taken what it held."""
        ...

    def step(self, slot: int, num_words: int) -> AbstractContextManager[None]:
        """Context in which a step's kernels are launched, its buffer in `packed`."""
        ...

    def mark_logits(self, slot: int) -> None:
        """The forward pass ends here, and sampling begins."""
        ...

    def arriving(self, slot: int) -> AbstractContextManager[None]:
        """Context in which the slot's step takes what other ranks computed: beside the steps after it, in order.

        The step has not ended before.
        """
        ...

    def await_arrival(self, slot: int) -> None:
        """What is launched from here on waits for what the slot's step takes."""
        ...

    def wait(self, slot: int) -> StepTimes:
        """Block until the slot's step has ended. Any thread."""
        ...


class CudaTimeline:
    """Implements `Timeline` for one device."""

    def __init__(self, device: torch.device, capacity: int, result_words: int, num_slots: int = NUM_SLOTS) -> None:
        self.device = device
        self.compute = torch.cuda.Stream(device)
        self._copy, self._arrivals = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self.packed = torch.zeros(capacity, dtype=torch.int32, device=device)  # [capacity]
        self._staging = torch.zeros((num_slots, capacity), dtype=torch.int32, device=device)  # [num_slots, capacity]
        self._host = torch.zeros((num_slots, capacity), dtype=torch.int32, pin_memory=True)
        self.results = torch.zeros((num_slots, result_words), dtype=torch.int32, pin_memory=True)
        self._host_view: Int32Array = self._host.numpy()
        self._copied, self._taken, self._arrived = ([torch.cuda.Event() for _ in range(num_slots)] for _ in range(3))
        self._begun, self._computed, self._ended = (
            [torch.cuda.Event(enable_timing=True) for _ in range(num_slots)] for _ in range(3)
        )
        self._has_logits_mark, self._has_arrival = [False] * num_slots, [False] * num_slots
        self._former: list[int | None] = [None] * num_slots
        self._last: int | None = None
        # What the allocations above have queued must not meet the first step.
        torch.cuda.synchronize(device)

    def host_buffer(self, slot: int) -> Int32Array:
        self._copied[slot].synchronize()
        return self._host_view[slot]

    @contextmanager
    def step(self, slot: int, num_words: int) -> Iterator[None]:
        staging = self._staging[slot, :num_words]
        with torch.cuda.stream(self._copy):
            self._copy.wait_event(self._taken[slot])
            staging.copy_(self._host[slot, :num_words], non_blocking=True)
            self._copied[slot].record(self._copy)
        with torch.cuda.stream(self.compute):
            self.compute.wait_event(self._copied[slot])
            self._begun[slot].record(self.compute)
            self.packed[:num_words].copy_(staging, non_blocking=True)
            self._taken[slot].record(self.compute)
            self._has_logits_mark[slot] = self._has_arrival[slot] = False
            yield
            self._ended[slot].record(self.compute)
        self._former[slot], self._last = self._last, slot

    def mark_logits(self, slot: int) -> None:
        self._computed[slot].record(self.compute)
        self._has_logits_mark[slot] = True

    @contextmanager
    def arriving(self, slot: int) -> Iterator[None]:
        with torch.cuda.stream(self._arrivals):
            yield
            self._arrived[slot].record(self._arrivals)
        self._has_arrival[slot] = True

    def await_arrival(self, slot: int) -> None:
        self.compute.wait_event(self._arrived[slot])

    def wait(self, slot: int) -> StepTimes:
        ended = self._ended[slot]
        ended.synchronize()
        if self._has_arrival[slot]:
            self._arrived[slot].synchronize()
        computed = self._computed[slot] if self._has_logits_mark[slot] else ended
        former = self._former[slot]
        idle_ns = -1
        if former is not None and former != slot:
            idle_ns = _ns_between(self._ended[former], self._begun[slot])
        return StepTimes(_ns_between(self._begun[slot], computed), _ns_between(computed, ended), idle_ns)


def _ns_between(first: torch.cuda.Event, second: torch.cuda.Event) -> int:
    return 0 if first is second else int(first.elapsed_time(second) * 1e6)
