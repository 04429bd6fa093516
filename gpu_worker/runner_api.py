"""What the worker's server and a runner say to each other: plain arrays, no protobuf, no torch.

The server decodes a step into a `StepBatch`, hands it to `Runner.execute` on the main thread, and takes the
`StepResult` from the returned `PendingStep` on another thread. A runner with a device returns as soon as the step is
launched, so that the next step can be launched behind it; one without may compute everything in `execute`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

UInt32Array = npt.NDArray[np.uint32]
Float32Array = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]


class PoolingKind(IntEnum):
    """What a pooled row is worth; values as in the proto enum of the same name."""

    EMBEDDING = 1
    SCORE = 2


@dataclass(frozen=True, slots=True)
class PoolingFacts:
    """Fields as in the message of the same name."""

    kind: PoolingKind
    dimensions: int
    whole_prompts: bool
    only: bool


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """What a worker is: constant for the life of its process. Fields as in `DescribeResponse`."""

    model: str
    architecture: str
    dtype: str
    kv_cache_dtype: str
    devices: tuple[str, ...]
    num_blocks: int
    first_block_id: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    buckets: tuple[int, ...]
    vocab_size: int
    max_num_logprobs: int
    block_bytes: int
    can_mask_tokens: bool
    can_prompt_logprobs: bool = False
    pooling: PoolingFacts | None = None
    num_stages: int = 1
    """Parts of the worker that work on different steps at a time."""
    weights_per_token: int = 0
    keeps_row_states: bool = False


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How a row's tokens are drawn. Fields as in the message of the same name."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int  # 64 bit, unsigned
    sequence_index: int
    num_logprobs: int | None
    bias_token_ids: UInt32Array  # [num_biases]
    bias_values: Float32Array  # [num_biases]
    min_tokens: int
    suppressed_token_ids: UInt32Array
    allowed_token_ids: UInt32Array  # empty: all
    num_prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class RowPooling:
    """The row is worth a vector. Fields as in the message of the same name."""

    second_text_start: int = 0


@dataclass(frozen=True, slots=True)
class RowAdd:
    """A row that becomes occupied: everything needed to compute it from nothing."""

    row: int
    token_ids: UInt32Array  # [num_tokens]: prompt, then what was generated already
    num_prompt_tokens: int
    num_computed_tokens: int
    block_ids: UInt32Array  # [num_blocks], in position order
    sampling: RowSampling
    pooling: RowPooling | None = None
    """None: the row wants tokens."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One forward pass: drop, add, then run all rows together. Array lengths and row ids are checked by the codec."""

    step_id: int
    bucket: int
    drop_rows: UInt32Array
    adds: tuple[RowAdd, ...]
    run_rows: UInt32Array  # [num_runs]
    run_start_positions: UInt32Array  # [num_runs]
    run_num_tokens: UInt32Array  # [num_runs]
    run_samples: BoolArray  # [num_runs]
    run_num_new_blocks: UInt32Array  # [num_runs]
    new_block_ids: UInt32Array  # [run_num_new_blocks.sum()]
    mask_rows: UInt32Array

    @property
    def num_tokens(self) -> int:
        return int(self.run_num_tokens.sum())


class RowFaultCode(IntEnum):
    """Why a row failed while the rest of its step went on; values as in the proto enum of the same name."""

    POSITION_MISMATCH = 1
    UNKNOWN_ROW = 2
    BAD_BLOCK = 3
    BAD_TOKEN = 4
    NOT_FINITE = 5
    UNSUPPORTED = 6


@dataclass(frozen=True, slots=True)
class RowFault:
    row: int
    code: RowFaultCode
    message: str


@dataclass(frozen=True, slots=True)
class TokenMask:
    """Which tokens may be drawn: bit i of word w of a row is token 32 * w + i."""

    rows: UInt32Array  # [num_rows]
    bitmask: UInt32Array  # [num_rows, ceil(vocab_size / 32)]


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Logprobs of prompt tokens that one run has computed. Fields as in the message of the same name."""

    row: int
    start_position: int
    logprobs: Float32Array  # [num_tokens]
    ranks: UInt32Array  # [num_tokens]
    top_token_ids: UInt32Array  # [num_tokens, num_top]
    top_logprobs: Float32Array  # [num_tokens, num_top], most likely first


@dataclass(slots=True)
class StepResult:
    """What a step produced. Rows with a fault are absent from `rows`."""

    step_id: int
    rows: UInt32Array  # [num_sampled]
    offsets: UInt32Array  # [num_sampled + 1]
    token_ids: UInt32Array  # [offsets[-1]]
    logprobs: Float32Array | None = None  # [offsets[-1]], NaN where not asked for
    top_token_ids: UInt32Array | None = None  # [offsets[-1], num_top]
    top_logprobs: Float32Array | None = None  # [offsets[-1], num_top], most likely first
    pooled_rows: UInt32Array | None = None  # [num_pooled]; None: none
    pooled_values: Float32Array | None = None  # [num_pooled, dimensions]
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    awaits_prompts: bool = False
    """Whether `prompt_logprobs` are still to come from a rank of the group's last stage."""
    faults: list[RowFault] = field(default_factory=list)
    input_ns: int = 0
    forward_ns: int = 0
    sample_ns: int = 0


class StepError(Exception):
    """A step that cannot be run as a whole, through no fault of the worker: malformed, or at odds with `WorkerFacts`.

    The codec raises it, and a runner may from `execute`. The session ends with INVALID_ARGUMENT and this message; the
    worker goes on with the next session.
    """


class SessionEnded(Exception):
    """The session is over, so nobody waits for this step.

    `wait_for_mask` raises it, and a runner lets it pass: `reset` comes next. A runner that raises it by itself ends the
    session with UNAVAILABLE.
    """


class PendingStep(Protocol):
    """A launched step."""

    def result(self) -> StepResult:
        """Block until the step's results are on the host. Called once, in launch order, on the completion thread."""
        ...


@runtime_checkable
class DescribesPrompts(Protocol):
    """A launched step that may hold what somebody else waits for."""

    @property
    def describes_prompts(self) -> bool:
        """Whether log-probabilities of a prompt are among what it computes, if only of rows that fail."""
        ...


@runtime_checkable
class UsesPauses(Protocol):
    """A runner that has something to do while no step waits."""

    def has_pause_work(self) -> bool:
        """Whether `idle` would do anything now."""
        ...

    def idle(self) -> bool:
        """Do a little of it, on the main thread; True: there is more for this pause. An exception as in `execute`."""
        ...


@runtime_checkable
class EndsByItself(Protocol):
    """A runner of several processes, one of which may end while nobody asks for anything."""

    def watch(self, on_failure: Callable[[Exception], None], on_leaving: Callable[[str], None]) -> None:
        """Have it told to `on_failure`, on any thread: the worker is broken then. `on_leaving`: a part of it is told to
        end, and the whole is to end in peace."""
        ...

    def abandon(self) -> None:
        """The worker is broken and ends: end all other parts now, so that no thread of this process waits for them. Any
        thread, any number of times."""
        ...


@runtime_checkable
class WaitsForOthers(Protocol):
    """A runner whose launched steps may wait on the device for other ranks."""

    def give_up(self) -> None:
        """Have them end, one of the others being gone. What they leave is worthless, and so is every later step. Any
        thread, any number of times."""
        ...


class Runner(Protocol):
    """What computes. All methods but `PendingStep.result` are called on the worker's main thread."""

    def describe(self) -> WorkerFacts: ...

    def execute(self, batch: StepBatch, wait_for_mask: Callable[[], TokenMask]) -> PendingStep:
        """Launch one step.

        `wait_for_mask` blocks until the mask of this step's `mask_rows` has come; call it after the forward pass is
        launched, and only if there are such rows. What is wrong with a single row is a `RowFault`. An exception out of
        here (but for `StepError` and `SessionEnded`) or out of `result` is a broken worker: the process ends with a
        message, and the control plane resumes its requests on the next one.
        """
        ...

    def reset(self) -> None:
        """Forget every row and block: a new session begins."""
        ...

    def close(self) -> None: ...
