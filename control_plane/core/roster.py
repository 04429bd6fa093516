"""Who waits and who runs: the queue, the sequences on the worker, and the moves between the two.

Pure, and with no opinion on what a step holds: `scheduler` decides that.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from operator import attrgetter

from control_plane.core.placement import Placement
from control_plane.core.policy import choose_victim, is_background
from control_plane.core.scheduler_config import SchedulerConfig, SchedulerCounters
from control_plane.core.sequence import NO_ROW, RequestState, SequenceState
from control_plane.core.step_plan import StepPlan

by_sort_key = attrgetter("sort_key")


class Roster:
    """`in_flight`: the scheduler's steps, oldest first. A sequence that leaves its row may still be in one of them."""

    placement: Placement

    def __init__(self, counters: SchedulerCounters, in_flight: Sequence[StepPlan]) -> None:
        self.waiting: list[SequenceState] = []  # by sort_key
        self.running: list[SequenceState] = []  # by sort_key
        self.num_waiting_requests = 0
        self.num_waiting_tokens = 0
        self._counters = counters
        self._in_flight = in_flight

    def reset(self, config: SchedulerConfig) -> None:
        """Start over with an empty worker. Nothing may be running; see `vacate`."""
        if self.running:
            raise RuntimeError("sequences are still placed on the old worker")
        self._policy = config.policy
        self.placement = Placement(config.first_block_id, config.num_blocks, config.block_size, config.max_num_seqs)

    # ---- moves ----

    def enqueue(self, sequence: SequenceState) -> None:
        insort(self.waiting, sequence, key=by_sort_key)
        self.num_waiting_tokens += sequence.num_prompt_tokens
        self.num_waiting_requests += sequence.request.num_waiting == 0
        sequence.request.num_waiting += 1

    def dequeue(self, sequence: SequenceState) -> None:
        del self.waiting[_index_of(self.waiting, sequence)]
        self.num_waiting_tokens -= sequence.num_prompt_tokens
        sequence.request.num_waiting -= 1
        self.num_waiting_requests -= sequence.request.num_waiting == 0

    def run(self, sequence: SequenceState) -> None:
        """A waiting sequence has got its row and blocks."""
        self.dequeue(sequence)
        insort(self.running, sequence, key=by_sort_key)

    def leave(self, sequence: SequenceState) -> None:
        """Forget a sequence that is over, wherever it is."""
        if sequence.row != NO_ROW:
            self._displace(sequence)
        else:
            self.dequeue(sequence)

    def preempt(self, sequence: SequenceState) -> None:
        """Take a sequence off the worker; it is recomputed when there is room again.

        Which is not before its last steps in flight have retired, and their tokens are known.
        """
        self._counters.num_preemptions += 1
        self._counters.num_recomputed_tokens += sequence.num_retired
        self._displace(sequence)
        sequence.num_computed = sequence.num_retired = 0
        self.enqueue(sequence)

    def vacate(self) -> None:
        """Give the worker up: every sequence waits again, to be recomputed."""
        running, self.running = self.running, []
        for sequence in running:
            self._counters.num_recomputed_tokens += sequence.num_retired
            sequence.forget_placement()
            self.enqueue(sequence)
        for sequence in self.waiting:
            # Preempted while its last samples were in flight: those are lost with the step.
            sequence.forget_placement()

    def _displace(self, sequence: SequenceState) -> None:
        """Take a running sequence off the worker."""
        del self.running[_index_of(self.running, sequence)]
        self.placement.displace(sequence, self._in_flight[-1].step_id if self._in_flight else None)

    # ---- room for somebody ----

    def headroom(self) -> int:
        """Blocks that an admission leaves for running sequences to grow into: preemption would undo it at once."""
        return min(len(self.running), self.placement.num_usable_blocks // 20 + 1)

    def make_room(self, sequence: SequenceState) -> bool:
        """See to it that one block is free, by preempting later sequences; False if not in this step."""
        while not self.placement.has_free_block:
            if self.placement.expects_blocks_back:
                return False  # blocks are on their way back: wait for them
            later = self.running[bisect_left(self.running, sequence.sort_key, key=by_sort_key) + 1 :]
            if not later:
                self.preempt(sequence)
                return False
            self.preempt(choose_victim(self._policy, later))
        return True

    def make_way(self) -> None:
        """Background work leaves the worker where the first in the queue needs its rows or blocks."""
        if not self.waiting or not self.running or not is_background(self.running[-1]):
            return
        first = self.waiting[0]
        # Once blocks are on their way back, the next plan knows whether they are enough.
        if is_background(first) or self.placement.expects_blocks_back:
            return
        num_missing = self.placement.num_missing_blocks(first) + self.headroom()
        while num_missing > 0 or not self.placement.has_free_row:
            last = self.running[-1] if self.running else None
            if last is None or not is_background(last):
                return
            num_missing -= len(last.block_ids)
            self.preempt(last)

    def make_alone(self, suspect: SequenceState) -> bool:
        """Clear the worker of every other sequence; False while steps of theirs are still in flight.

        Alone in flight, so that a loss is the suspect's and nobody else's; alone on the worker, so that it has room.
        """
        if any(sequence is not suspect for step in self._in_flight for sequence in step.sequences):
            return False
        for sequence in list(self.running):
            if sequence is not suspect:
                self.preempt(sequence)
        return True

    # ---- integrity ----

    def check_integrity(self, requests: Iterable[RequestState]) -> None:
        """Raise if the books disagree with one another, or with these requests, which are all there are."""
        self.placement.check_integrity(self.running)
        for sequence in self.running:
            if sequence.finished or sequence.num_computed > min(sequence.num_total, sequence.capacity):
                raise RuntimeError(f"sequence {sequence.sort_key} ran past its end or its blocks")
            look_at = min(sequence.next_hash_at, sequence.max_total - 1) - sequence.num_prompt_tokens
            if sequence.quiet_until > max(look_at, 0):
                raise RuntimeError(f"sequence {sequence.sort_key} is quiet past its next block or its end")
        for sequence in self.waiting:
            if sequence.finished or sequence.row != NO_ROW or sequence.block_ids:
                raise RuntimeError(f"waiting sequence {sequence.sort_key} is finished or still placed")
        if self.num_waiting_tokens != sum(sequence.num_prompt_tokens for sequence in self.waiting):
            raise RuntimeError("the count of waiting tokens is wrong")
        if self.num_waiting_requests != len({id(sequence.request) for sequence in self.waiting}):
            raise RuntimeError("the count of waiting requests is wrong")
        unfinished = sum(state.num_unfinished for state in requests)
        if unfinished != len(self.running) + len(self.waiting):
            raise RuntimeError(
                f"{unfinished} unfinished sequences, {len(self.running)} running, {len(self.waiting)} waiting"
            )


def _index_of(ordered: list[SequenceState], sequence: SequenceState) -> int:
    index = bisect_left(ordered, sequence.sort_key, key=by_sort_key)
    if index == len(ordered) or ordered[index] is not sequence:
        raise RuntimeError(f"sequence {sequence.sort_key} is not where it should be")
    return index
