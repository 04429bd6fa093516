"""CUDA graphs of whole steps, captured while the worker already serves.

A graph holds a step of one shape: a bucket of decodes, or of tokens of decodes and prefills. There are three kinds of
each: `plain` (the common one), `full` (penalties and log-probabilities) and `forward`, which ends at the logits and
leaves sampling to eager launches (token masks come late).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import structlog
import torch

from gpu_worker.cuda.step_layout import StepShape

log = structlog.get_logger(__name__)


class GraphKind(Enum):
    PLAIN = "plain"
    FULL = "full"
    FORWARD = "forward"


@dataclass(frozen=True, slots=True)
class GraphKey:
    shape: StepShape
    kind: GraphKind


class Replayable(Protocol):
    def replay(self) -> None: ...


@dataclass(frozen=True, slots=True)
class CapturedStep:
    """A graph and what it leaves behind for eager launches."""

    graph: Replayable
    logits: torch.Tensor | None  # [num_logits, vocab_size], kind FORWARD only


class GraphCaptureError(RuntimeError):
    """A step cannot be captured. The message says what to set."""


class StepGraphs:
    """The graphs of one runner; all share one memory pool, since they never run at the same time."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[GraphKey, CapturedStep] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Destroy them. A graph that holds NCCL's kernels keeps its communicator from ending."""
        self._graphs.clear()

    def get(self, key: GraphKey) -> CapturedStep | None:
        return self._graphs.get(key)

    def capture(self, key: GraphKey, launch: Callable[[], torch.Tensor | None]) -> CapturedStep:
        """Record what `launch` launches; its kernels must have run before, so that none is compiled here.

        Raises:
            GraphCaptureError: something in the step cannot be captured.
        """
        begun = time.perf_counter()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(self._stream):
                # thread_local: the completion thread waits for events meanwhile.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    logits = launch()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            raise GraphCaptureError(
                f"a step of {key.shape.num_tokens} tokens ({key.kind.value}) cannot be captured as a CUDA graph: "
                f"{error}; --enforce-eager runs without graphs"
            ) from error
        captured = CapturedStep(graph, logits if key.kind is GraphKind.FORWARD else None)
        self._graphs[key] = captured
        log.debug(
            "graph captured",
            num_tokens=key.shape.num_tokens,
            num_runs=key.shape.num_runs,
            kind=key.kind.value,
            ms=round((time.perf_counter() - begun) * 1e3, 1),
        )
        return captured
