"""Which sequences may be what costs workers their lives: those in the batch of one that was lost.

A sequence that was in several in a row is tried alone. Progress clears it.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter

from control_plane.core.sequence import SequenceState

# How many further tokens clear a sequence of suspicion.
_TOKENS_THAT_CLEAR = 4


class Suspects:
    """Those with `num_losses` > 0 that have neither ended nor cleared themselves."""

    def __init__(self) -> None:
        self._marked: set[SequenceState] = set()

    def __bool__(self) -> bool:
        """Whether there is any, with however few losses."""
        return bool(self._marked)

    @property
    def num_to_try_alone(self) -> int:
        """How many are to be tried alone."""
        return sum(sequence.is_suspect for sequence in self._marked)

    def next(self) -> SequenceState | None:
        """The first that is to be tried alone."""
        if not self._marked:
            return None
        suspects = [sequence for sequence in self._marked if sequence.is_suspect]
        return min(suspects, key=attrgetter("sort_key"), default=None)

    def note_loss(self, sequence: SequenceState) -> None:
        """It was in the batch of a lost worker."""
        sequence.num_losses += 1
        sequence.progress_mark = len(sequence.output_ids) + _TOKENS_THAT_CLEAR
        self._marked.add(sequence)

    def note_progress(self, sequences: Iterable[SequenceState]) -> None:
        for sequence in sequences:
            if sequence in self._marked and len(sequence.output_ids) >= sequence.progress_mark:
                self._marked.discard(sequence)
                sequence.num_losses = 0

    def adopt(self, sequence: SequenceState) -> None:
        """Its losses were another scheduler's."""
        if sequence.num_losses:
            self._marked.add(sequence)

    def forget(self, sequence: SequenceState) -> None:
        self._marked.discard(sequence)
