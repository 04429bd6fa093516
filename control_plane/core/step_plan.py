"""What the scheduler decides and what comes back: a step before and after the worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    # Those of `sequences` that draw a token, and their rows; and those whose vector is wanted.
    drawing: list[SequenceState] = field(default_factory=list)
    drawing_rows: list[int] = field(default_factory=list)
    pooling: list[SequenceState] = field(default_factory=list)
    pooling_rows: list[int] = field(default_factory=list)
    # Those of `sequences` that sample under a mask.
    masked: list[SequenceState] = field(default_factory=list)
    # Their rows in this step: a sequence may have lost its own by the time the mask is made.
    mask_rows: list[int] = field(default_factory=list)
    prompt_logprob_runs: list[PromptLogprobRun] = field(default_factory=list)

    def add_decodes(self, sequences: Sequence[SequenceState], grown: Mapping[int, int]) -> None:
        """Each runs its newest token and draws the next. `grown`: index in `sequences` -> the block that it got.

        Columns are made one at a time: this is every row of most steps.
        """
        step_id, count = self.step_id, len(sequences)
        rows = [sequence.row for sequence in sequences]
        num_new_blocks = [0] * count
        for index, block_id in grown.items():
            num_new_blocks[index] = 1
            self.new_block_ids.append(block_id)
        self.sequences += sequences
        self.rows += rows
        self.start_positions += [sequence.num_computed for sequence in sequences]
        self.num_run_tokens += [1] * count
        self.samples += [True] * count
        self.num_new_blocks += num_new_blocks
        self.num_tokens += count
        self.drawing += sequences
        self.drawing_rows += rows
        for sequence in sequences:
            sequence.last_step_id = step_id
            sequence.num_computed += 1
            sequence.num_total += 1
            if sequence.matcher is not None:
                self.masked.append(sequence)
                self.mask_rows.append(sequence.row)

    def add_prefill(self, sequence: SequenceState, num_tokens: int) -> None:
        """It runs so much of its prompt, and gives something if that is all that was left."""
        sample = sequence.num_computed + num_tokens == sequence.num_total
        sequence.last_step_id = self.step_id
        self.sequences.append(sequence)
        self.rows.append(sequence.row)
        self.start_positions.append(sequence.num_computed)
        self.num_run_tokens.append(num_tokens)
        self.samples.append(sample)
        self.num_new_blocks.append(0)
        self.num_tokens += num_tokens
        if sequence.asks_prompt_logprobs:
            self._add_prompt_logprobs(sequence, num_tokens)
        sequence.num_computed += num_tokens
        if sample:
            sequence.num_total += 1
            self._add_sample(sequence)

    def _add_sample(self, sequence: SequenceState) -> None:
        if sequence.pools:
            self.pooling.append(sequence)
            self.pooling_rows.append(sequence.row)
            return
        self.drawing.append(sequence)
        self.drawing_rows.append(sequence.row)
        if sequence.matcher is not None:
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
    # Then, and most of it: sequences that got one token each and go on, nothing else being to be said of it.
    sequences: list[SequenceState] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    # Requests whose last sequence has ended, with the fault that ended them if one did.
    ended: list[tuple[RequestState, RequestFault | None]] = field(default_factory=list)


class ProtocolError(Exception):
    """The worker's answer does not belong to the step that was sent: the session cannot go on."""
