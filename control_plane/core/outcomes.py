"""What a worker's answer to a step is worth: checked against the plan, and told as faults and logprobs."""

from __future__ import annotations

from collections.abc import Mapping

from control_plane.core.request import PromptLogprobs, RequestFault, SequenceOutput
from control_plane.core.step_plan import ProtocolError, RowFailure, StepEvents, StepOutcome, StepPlan


def check_rows(plan: StepPlan, outcome: StepOutcome, failures: Mapping[int, RowFailure]) -> None:
    """Raise `ProtocolError` unless exactly the rows that sample gave a token, and those that pool a vector."""
    rows, pooled = plan.drawing_rows, plan.pooling_rows
    if failures:
        rows, pooled = ([row for row in each if row not in failures] for each in (rows, pooled))
    if rows != outcome.rows:
        raise ProtocolError(
            f"step {plan.step_id} was to sample rows {rows[:8]}..., the worker sampled {outcome.rows[:8]}..."
        )
    if pooled != list(outcome.vectors):
        raise ProtocolError(
            f"step {plan.step_id} was to pool rows {pooled[:8]}..., the worker pooled {list(outcome.vectors)[:8]}..."
        )
    described = {run.row: (run.start_position, run.num_tokens) for run in plan.prompt_logprob_runs}
    given = {row: (part.start_position, len(part.logprobs)) for row, part in outcome.prompt_logprobs.items()}
    if {row: part for row, part in described.items() if row not in failures} != given:
        raise ProtocolError(
            f"step {plan.step_id} was to give prompt logprobs of (start, tokens) {described}, the worker gave {given}"
        )


def take_prompt_logprobs(
    plan: StepPlan, outcome: StepOutcome, failures: Mapping[int, RowFailure], events: StepEvents
) -> None:
    """The parts of prompts that are new: what is computed again after a preemption was told before."""
    for run in plan.prompt_logprob_runs:
        sequence = run.sequence
        if run.row in failures or sequence.finished:
            continue
        num_known = sequence.num_prompt_tokens - sequence.num_prompt_logprobs_left
        num_old = num_known - run.start_position
        if num_old >= run.num_tokens:
            continue
        part = outcome.prompt_logprobs[run.row]
        part = PromptLogprobs(
            num_known,
            part.logprobs[num_old:],
            part.ranks[num_old:],
            part.top_token_ids[num_old:],
            part.top_logprobs[num_old:],
        )
        sequence.num_prompt_logprobs_left -= len(part.logprobs)
        output = SequenceOutput(sequence.index, [], 0, prompt_logprobs=part)
        events.outputs.append((sequence.request, output))


def fault_of(failure: RowFailure) -> RequestFault:
    return RequestFault(
        "INTERNAL", f"the worker refused this request's row ({failure.code}): {failure.message}", retryable=False
    )
