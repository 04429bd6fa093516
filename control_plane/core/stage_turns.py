"""Who runs in the next step of a worker of several stages."""

from __future__ import annotations

from collections.abc import Sequence

from control_plane.core.sequence import SequenceState
from control_plane.core.step_plan import StepPlan


def rows_in_turn(
    running: Sequence[SequenceState], in_flight: Sequence[StepPlan], num_stages: int, *, admits: bool = False
) -> list[SequenceState]:
    """Those of `running` that may run in the next step, in their order.

    A stage must wait for a row's newest token until the last stage has drawn it. So a row that samples sits out the
    next `num_stages - 1` steps, and those that do not are spread evenly over the steps until the first come back.

    Args:
        admits: the step has prompts of sequences that are not running yet.
    """
    if num_stages == 1:
        return list(running)
    recent = list(in_flight)[1 - num_stages :]
    decodes = [sequence for sequence in running if sequence.may_draw and _waits_for_token(sequence)]
    is_decode = set(decodes)
    others = [sequence for sequence in running if sequence.may_draw and sequence not in is_decode]
    rested = _without_sampling_in(recent, decodes)
    while recent and not (rested or others or admits):
        # Nobody else is there: better a stage that waits a little than one that has nothing.
        recent = recent[1:]
        rested = _without_sampling_in(recent, decodes)
    # No more than a fair part of all: where sequences have ended, some of the fuller step wait for the next one. Those
    # are the oldest, since whoever came last would end last anyway.
    share = min(-(-len(rested) // (num_stages - len(recent))), -(-len(decodes) // num_stages))
    in_turn = {*rested[len(rested) - share :], *others}
    return [sequence for sequence in running if sequence in in_turn]


def _waits_for_token(sequence: SequenceState) -> bool:
    """Whether all that it has left to run is its newest token."""
    return sequence.num_total - sequence.num_computed == 1


def _without_sampling_in(plans: list[StepPlan], sequences: list[SequenceState]) -> list[SequenceState]:
    """Those of `sequences` that none of the plans samples."""
    sampling = {
        sequence for plan in plans for sequence, sample in zip(plan.sequences, plan.samples, strict=True) if sample
    }
    return [sequence for sequence in sequences if sequence not in sampling]
