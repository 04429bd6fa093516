"""What the scheduler decides and what comes back: a step before and after the worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from control_plane.core.request import PromptLogprobs, RequestFault, SequenceOutput, TokenLogprobs, VectorArray
from control_plane.core.sequence import RequestState, SequenceState


@dataclass(frozen=True, slots=True)
class RowStart:
    """A sequence that takes a row in this step."""

    row: int
    sequence: SequenceState
    num_computed_tokens: int
    block_ids: list[int]
    asks_prompt_logprobs: bool = False


@dataclass(frozen=True, slots=True)
class PromptLogprobRun:
    """A run that gives logprobs of `num_tokens` tokens of its prompt, the first at `start_position`."""

    row: int
    sequence: SequenceState
    start_position: int
    num_tokens: int


@dataclass(slots=True)
class StepPlan:
    """One forward pass as decided. Runs are parallel lists, one entry a row that takes part."""

    step_id: int
    num_tokens: int = 0
    drop_rows: list[int] = field(default_factory=list)
    starts: list[RowStart] = field(default_factory=list)
    sequences: list[SequenceState] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    start_positions: list[int] = field(default_factory=list)
    num_run_tokens: list[int] = field(default_factory=list)
    samples: list[bool] = field(default_factory=list)
    num_new_blocks: list[int] = field(default_factory=list)
    new_block_ids: list[int] = field(default_factory=list)
    # Those of `sequences` that sample under a mask.
    masked: list[SequenceState] = field(default_factory=list)
    # Their rows in this step: a sequence may have lost its own by the time the mask is made.
    mask_rows: list[int] = field(default_factory=list)
    prompt_logprob_runs: list[PromptLogprobRun] = field(default_factory=list)

    def add_run(
        self, sequence: SequenceState, num_tokens: int, *, sample: bool, new_block_ids: Sequence[int] = ()
    ) -> None:
        sequence.last_step_id = self.step_id
        self.sequences.append(sequence)
        self.rows.append(sequence.row)
        self.start_positions.append(sequence.num_computed)
        self.num_run_tokens.append(num_tokens)
        self.samples.append(sample)
        self.num_new_blocks.append(len(new_block_ids))
        if new_block_ids:
            self.new_block_ids.extend(new_block_ids)
        self.num_tokens += num_tokens
        if sequence.asks_prompt_logprobs:
            self._add_prompt_logprobs(sequence, num_tokens)
        if sample and sequence.matcher is not None:
            self.masked.append(sequence)
            self.mask_rows.append(sequence.row)

    def _add_prompt_logprobs(self, sequence: SequenceState, num_tokens: int) -> None:
        start = sequence.num_computed + 1
        count = min(start + num_tokens, sequence.num_prompt_tokens) - start
        if count > 0:
            self.prompt_logprob_runs.append(PromptLogprobRun(sequence.row, sequence, start, count))


@dataclass(frozen=True, slots=True)
class RowFailure:
    row: int
    code: str  # RowFaultCode without its prefix
    message: str


@dataclass(slots=True)
class StepOutcome:
    """What a worker made of a step: `rows[i]` sampled `token_ids[i]`."""

    step_id: int
    rows: list[int]
    token_ids: list[int]
    # One entry a row, None where it asked for none; None if no row did.
    logprobs: list[TokenLogprobs | None] | None = None
    failures: list[RowFailure] = field(default_factory=list)
    # Row -> the vector of a sequence that pools, in run order.
    vectors: dict[int, VectorArray] = field(default_factory=dict)
    # Row -> logprobs of the part of its prompt that it ran, in run order.
    prompt_logprobs: dict[int, PromptLogprobs] = field(default_factory=dict)


@dataclass(slots=True)
class StepEvents:
    """What a step means to the outside."""

    outputs: list[tuple[RequestState, SequenceOutput]] = field(default_factory=list)
    # Requests whose last sequence has ended, with the fault that ended them if one did.
    ended: list[tuple[RequestState, RequestFault | None]] = field(default_factory=list)


class ProtocolError(Exception):
    """The worker's answer does not belong to the step that was sent: the session cannot go on."""
