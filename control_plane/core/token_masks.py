"""Masks for the rows of a step that draw under a grammar: filled on a thread of their own while the worker computes.

A step is sent before the tokens of the step before it are known; its mask follows once they are, which is when it is
the oldest step in flight. The worker has begun its forward pass by then, and waits for the mask only before it draws.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from control_plane.core.request import TokenMatcher
from control_plane.core.sequence import SequenceState
from control_plane.core.step_plan import StepPlan


@dataclass(slots=True)
class FilledMasks:
    """The mask of one step. Rows whose sequence has ended, or ends here, are left out: what they draw is not used."""

    step_id: int
    rows: list[int]
    bitmask: npt.NDArray[np.uint32]  # [num_rows, num_words]
    # Sequences whose grammar allows nothing more.
    over: list[SequenceState] = field(default_factory=list)
    # Sequences whose matcher gave up, and why.
    failed: list[tuple[SequenceState, str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Entry:
    row: int
    sequence: SequenceState
    matcher: TokenMatcher
    new_token_ids: list[int]


class MaskFiller:
    """One thread, so that a matcher is told of its tokens in order."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")

    def begin(self, plan: StepPlan, vocab_size: int, done: Callable[[Future[FilledMasks]], None]) -> None:
        """Fill the masks of a step before which every token is known. `done` is called on the thread."""
        entries = []
        for row, sequence in zip(plan.mask_rows, plan.masked, strict=True):
            if sequence.finished or sequence.matcher is None:
                continue
            new_token_ids = sequence.output_ids[sequence.num_matched :].tolist()
            sequence.num_matched += len(new_token_ids)
            entries.append(_Entry(row, sequence, sequence.matcher, new_token_ids))
        self._thread.submit(_fill, plan.step_id, entries, -(-vocab_size // 32)).add_done_callback(done)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def _fill(step_id: int, entries: list[_Entry], num_words: int) -> FilledMasks:
    bitmask = np.zeros((len(entries), num_words), dtype=np.uint32)
    filled = FilledMasks(step_id, [], bitmask)
    for entry in entries:
        error = _fill_row(entry, bitmask[len(filled.rows)])
        if error:
            filled.failed.append((entry.sequence, error))
        elif entry.matcher.is_over:
            filled.over.append(entry.sequence)
        else:
            filled.rows.append(entry.row)
    filled.bitmask = bitmask[: len(filled.rows)]
    return filled


def _fill_row(entry: _Entry, out: npt.NDArray[np.uint32]) -> str:
    """Why there is no mask, or nothing. Whatever a matcher does wrong is its own request's fault alone."""
    matcher = entry.matcher
    try:
        matcher.accept(entry.new_token_ids)
        if not matcher.error and not matcher.is_over:
            matcher.fill_mask(out)
        return matcher.error
    except BaseException as error:  # a panic of the library is none of Exception
        return f"{type(error).__name__}: {error}"
