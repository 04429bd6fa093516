"""The scheduler: which rows run in the next step, on which blocks.

Pure: no I/O, no clock, no threads. `plan` decides a step, `apply` takes its outcome; several steps may be in flight
between the two. Everything here is counted in tokens and blocks; token values are looked at only to see whether a
sequence has stopped and to name block contents.

The plan runs ahead of what is known. When a step samples a token, the sequence is one token longer at once
(`num_total`), and the next step may run that token before its value has come back. A stop is therefore noticed up to
`steps in flight` late, and what was computed beyond it is thrown away.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import count as counting_up
from itertools import repeat
from operator import attrgetter

from control_plane.core.outcomes import check_rows, fault_of, take_prompt_logprobs
from control_plane.core.policy import mixed_step_size, sort_key
from control_plane.core.prefix_cache import BlockHash, root_hash
from control_plane.core.request import (
    CoreRequest,
    FinishReason,
    RequestFault,
    SequenceOutput,
    TokenLogprobs,
    VectorArray,
)
from control_plane.core.roster import Roster
from control_plane.core.scheduler_config import SchedulerConfig, SchedulerCounters
from control_plane.core.sequence import NO_ROW, RequestState, SequenceState
from control_plane.core.stage_turns import rows_in_turn
from control_plane.core.step_plan import ProtocolError, RowFailure, RowStart, StepEvents, StepOutcome, StepPlan
from control_plane.core.suspects import Suspects

# Starting sequences brings their token ids along: past this many, the next ones wait for the next step, so that a step
# stays far below the size of a message.
_MAX_START_TOKENS = 2**21


class Scheduler:
    def __init__(self, config: SchedulerConfig, arrivals: Iterator[int] | None = None) -> None:
        """`arrivals` numbers the requests; schedulers that hand requests to one another share it."""
        self.counters = SchedulerCounters()
        self._arrivals = counting_up() if arrivals is None else arrivals
        self._requests: dict[str, RequestState] = {}
        self._in_flight: deque[StepPlan] = deque()
        self._roster = Roster(self.counters, self._in_flight)
        # Sequences of which the prefix cache is to be told: `share_computed`.
        self._to_share: list[SequenceState] = []
        self._suspects = Suspects()
        self.reset(config)

    def reset(self, config: SchedulerConfig) -> None:
        """Start over with an empty worker. Nothing may be running; see `worker_lost`."""
        self._roster.reset(config)
        self.config = config
        self._placement = self._roster.placement
        self._next_step_id = 1
        self._in_flight.clear()
        self._num_prefill_tokens = 0

    # ---- what the outside may ask ----

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    @property
    def num_waiting(self) -> int:
        return len(self._roster.waiting)

    @property
    def num_waiting_requests(self) -> int:
        return self._roster.num_waiting_requests

    @property
    def num_waiting_tokens(self) -> int:
        return self._roster.num_waiting_tokens

    @property
    def num_running(self) -> int:
        return len(self._roster.running)

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens that running prefills had left when the last step was planned."""
        return self._num_prefill_tokens

    @property
    def num_suspects(self) -> int:
        """Sequences that are to be tried alone."""
        return self._suspects.num_to_try_alone

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def num_blocks_held(self) -> int:
        return self._placement.num_blocks_held

    @property
    def num_usable_blocks(self) -> int:
        return self._placement.num_usable_blocks

    @property
    def num_cached_blocks(self) -> int:
        self.share_computed()
        return self._placement.num_cached_blocks

    @property
    def num_blank_blocks(self) -> int:
        """Free blocks with nothing in them that the prefix cache knows."""
        return self._placement.num_blank_blocks

    def num_cached_tokens(self, block_hashes: list[BlockHash]) -> int:
        """How many tokens of a prompt with these block hashes are cached, or being computed by a running prefill."""
        self.share_computed()
        return self._placement.num_known_blocks(block_hashes) * self.config.block_size

    # ---- requests come and go ----

    def add_request(
        self, request: CoreRequest, now: float, block_hashes: list[BlockHash] | None = None
    ) -> RequestState:
        """Queue an admitted request. `block_hashes` are those of its prompt, if the caller has them."""
        if request.request_id in self._requests:
            raise ValueError(f"request id {request.request_id} is already in use")
        root, arrival = None, next(self._arrivals)
        if request.pooling is not None:
            pass  # the hidden states of tokens that are not run are not there to be pooled
        elif self.config.enable_prefix_caching:
            root = root_hash(request.tenant, request.cache_salt)
        elif request.num_sequences > 1 and self.config.shares_blocks:
            # No caching, but siblings share their prompt: a chain that nobody else can start.
            root = root_hash(f"fork {arrival}", request.request_id)
        state = RequestState(request, arrival, now, root)
        if block_hashes:
            state.sequences[0].block_hashes = list(block_hashes)
        self.counters.num_prompt_tokens += len(request.prompt_ids)
        self.adopt(state)
        return state

    def adopt(self, state: RequestState) -> None:
        """Queue a request that another scheduler has let go, at the place that its arrival gives it.

        Both must have the same block size: the names of block contents come along. So does suspicion.
        """
        self._requests[state.request.request_id] = state
        for sequence in state.sequences:
            if not sequence.finished:
                sequence.sort_key = sort_key(self.config.policy, sequence)
                sequence.last_step_id = 0
                self._roster.enqueue(sequence)
                self._suspects.adopt(sequence)

    def take_waiting(self) -> list[RequestState]:
        """Let go of the requests that have nothing on the worker, in order of arrival, for others to adopt."""
        self.share_computed()  # what is still to be named is ours
        in_flight = {sequence for plan in self._in_flight for sequence in plan.sequences}
        taken = []
        for state in list(self._requests.values()):
            # A sequence preempted a moment ago may still get tokens from the steps in flight.
            if any(sequence.row != NO_ROW or sequence in in_flight for sequence in state.sequences):
                continue
            del self._requests[state.request.request_id]
            for sequence in state.sequences:
                if not sequence.finished:
                    self._roster.dequeue(sequence)
                    self._suspects.forget(sequence)
            taken.append(state)
        return sorted(taken, key=attrgetter("arrival"))

    def cancel(self, request_id: str) -> None:
        """Forget a request. Unknown ids are ignored: it may have ended by itself."""
        state = self._requests.pop(request_id, None)
        if state is not None:
            for sequence in state.sequences:
                self._end(sequence)

    def finish_sequence(self, request_id: str, index: int) -> RequestState | None:
        """End one sequence from outside (a stop string). Returns its request if this was the last one."""
        state = self._requests.get(request_id)
        if state is None or state.sequences[index].finished:
            return None
        self._end(state.sequences[index])
        return self._close_if_done(state)

    def finish_matched(self, sequence: SequenceState) -> StepEvents:
        """End a sequence whose grammar allows nothing more, as if the model had said so."""
        events = StepEvents()
        if not sequence.finished:
            output = SequenceOutput(sequence.index, [], 0, finish_reason=FinishReason.STOP)
            events.outputs.append((sequence.request, output))
            self._end_well(sequence, events)
        return events

    def fail_sequence(self, sequence: SequenceState, fault: RequestFault) -> StepEvents:
        """End a sequence's request with a fault."""
        events = StepEvents()
        if not sequence.finished:
            self._fail(sequence.request, fault, events)
        return events

    # ---- the step ----

    def plan(self, now: float) -> StepPlan | None:
        """Decide the next step; None if there is nothing to run now."""
        plan = StepPlan(self._next_step_id)
        if self._roster.waiting:
            self.share_computed()
        only, admits = self._suspects.next(), False
        if only is not None:
            if not self._roster.make_alone(only):
                return None
            running = [only] if only.row != NO_ROW else []
            waiting = [only] if only.row == NO_ROW else []
        else:
            self._roster.make_way()
            waiting = self._roster.waiting
            admits = bool(waiting) and self._placement.has_free_row
            running = self._rows_in_turn(admits=admits)
        budget = self.config.max_num_batched_tokens
        num_preemptions = self.counters.num_preemptions

        prefills = self._plan_decodes(plan, running, budget)
        budget -= plan.num_tokens
        if plan.rows and (prefills or (waiting and self._placement.has_free_row)):
            budget = min(budget, self._prompt_share(plan, prefills, waiting))
        for sequence in prefills:
            if budget and sequence.row != NO_ROW:
                budget -= self._plan_prefill(plan, sequence, budget)
        if waiting and self.counters.num_preemptions == num_preemptions:
            self._plan_admissions(plan, waiting, budget, now)
        if admits and not plan.rows:
            # None of those that wait could be placed.
            self._plan_decodes(plan, self._rows_in_turn(admits=False), budget)
        self._num_prefill_tokens = sum(
            sequence.num_total - sequence.num_computed
            for sequence in (*prefills, *(start.sequence for start in plan.starts))
            if sequence.row != NO_ROW and sequence.num_total - sequence.num_computed > 1
        )

        if not plan.rows:
            return None
        plan.drop_rows = self._placement.take_drop_rows()
        self._next_step_id += 1
        self._in_flight.append(plan)
        return plan

    def apply(self, outcome: StepOutcome) -> StepEvents:
        """Take the outcome of the oldest step in flight. Raises `ProtocolError` if it is not that step's."""
        if not self._in_flight or self._in_flight[0].step_id != outcome.step_id:
            expected = self._in_flight[0].step_id if self._in_flight else "none"
            raise ProtocolError(f"the worker answered step {outcome.step_id}, expected {expected}")
        plan = self._in_flight[0]
        failures = {failure.row: failure for failure in outcome.failures}
        check_rows(plan, outcome, failures)
        self._in_flight.popleft()
        # The step's writes are done: deferred blocks are free, contents may enter the prefix cache.
        self.share_computed()
        self._placement.retire(plan.step_id)
        events = StepEvents()
        if plan.prompt_logprob_runs:
            take_prompt_logprobs(plan, outcome, failures, events)
        if len(plan.drawing) < len(plan.sequences):
            self._take_prompt_parts(plan, failures)
        self._take_tokens(plan, outcome, failures, events)
        for sequence, row in zip(plan.pooling, plan.pooling_rows, strict=True):
            if row not in failures and not sequence.finished:
                self._take_vector(sequence, outcome.vectors[row], events)
        if failures:
            for sequence, row in zip(plan.sequences, plan.rows, strict=True):
                if row in failures and not sequence.finished:
                    # What it computed may be as wrong as its logits, and its siblings go on from that: nobody is to
                    # share it from now on.
                    for sibling in sequence.request.sequences:
                        self._placement.forget_contents(sibling)
                    self._fail(sequence.request, fault_of(failures[row]), events)
        if self._suspects:
            self._suspects.note_progress(plan.sequences)
        return events

    def share_computed(self) -> None:
        """Name the blocks that generated tokens have filled, for others to share.

        Steps do not need it: whoever has a result to answer plans first. Done by itself before anybody looks for them.
        """
        to_share, self._to_share = self._to_share, []
        for sequence in to_share:
            if sequence.num_retired >= sequence.next_hash_at:
                self._placement.share_computed_blocks(sequence)
                sequence.look_again()

    def worker_lost(self) -> StepEvents:
        """Everything on the worker is gone: every sequence waits again, to be recomputed from its token ids.

        Sequences that were in the lost worker's batch are remembered; one that was tried alone and lost its worker
        again ends with a fault.
        """
        events = StepEvents()
        in_batch = {sequence for plan in self._in_flight for sequence in plan.sequences if not sequence.finished}
        was_alone = self._suspects.next()
        self.vacate()
        for sequence in in_batch:
            self._suspects.note_loss(sequence)
        if was_alone is not None and was_alone in in_batch:
            fault = RequestFault(
                "INTERNAL",
                f"the worker was lost {was_alone.num_losses} times while this request ran, "
                "the last time with nothing beside it",
                retryable=False,
            )
            self._fail(was_alone.request, fault, events)
        return events

    def vacate(self) -> None:
        """Give the worker up, steps in flight included: every sequence waits again, to be recomputed."""
        self._in_flight.clear()
        self._roster.vacate()
        self.reset(self.config)

    # ---- planning ----

    def _rows_in_turn(self, *, admits: bool) -> list[SequenceState]:
        return rows_in_turn(self._roster.running, self._in_flight, self.config.num_stages, admits=admits)

    def _prompt_share(self, plan: StepPlan, prefills: list[SequenceState], waiting: list[SequenceState]) -> int:
        """Prompt tokens that a step should take in which others generate."""
        if self.config.whole_prompts:
            return self.config.max_num_batched_tokens
        backlog = sum(sequence.num_total - sequence.num_computed for sequence in prefills)
        if waiting:
            # Of those that wait, as many as there are rows for.
            num_next = min(len(waiting), self._placement.num_free_rows)
            backlog += self._roster.num_waiting_tokens * num_next // len(self._roster.waiting)
        num_decodes, decode_cost = len(plan.rows), 0
        if self.config.context_per_prompt_token:
            num_context_tokens = sum(sequence.num_total for sequence in plan.sequences)
            decode_cost = num_context_tokens // self.config.context_per_prompt_token
        return mixed_step_size(num_decodes, decode_cost, backlog, self.config.mixed_step_tokens) - num_decodes

    def _plan_decodes(self, plan: StepPlan, running: Sequence[SequenceState], budget: int) -> list[SequenceState]:
        """Run the newest token of all that wait for nothing else; returns those that have more to run."""
        decodes: list[SequenceState] = []
        prefills: list[SequenceState] = []
        grown: dict[int, int] = {}
        for sequence in running:
            num_computed, num_total = sequence.num_computed, sequence.num_total
            if num_total - num_computed > 1 or sequence.pools:
                if sequence.row != NO_ROW and sequence.may_draw:  # neither preempted a moment ago nor at its end
                    prefills.append(sequence)
            elif num_total < sequence.max_total and len(decodes) < budget:
                if num_computed == sequence.capacity:
                    if not self._roster.make_room(sequence):
                        continue  # no block for it in this step
                    grown[len(decodes)] = self._placement.grow(sequence)
                decodes.append(sequence)
        plan.add_decodes(decodes, grown)
        return prefills

    def _plan_prefill(self, plan: StepPlan, sequence: SequenceState, budget: int) -> int:
        """Run as much of the sequence's prompt as the budget allows; its blocks are reserved already."""
        num_tokens = min(sequence.num_total - sequence.num_computed, budget)
        plan.add_prefill(sequence, num_tokens)
        return num_tokens

    def _plan_admissions(self, plan: StepPlan, waiting: list[SequenceState], budget: int, now: float) -> None:
        """Give rows and blocks to waiting sequences, in order; the first that does not fit ends it."""
        placed = []
        num_start_tokens = 0
        headroom = self._roster.headroom()
        for sequence in waiting:
            if not budget or not self._placement.has_free_row or num_start_tokens > _MAX_START_TOKENS:
                break
            if self.config.whole_prompts and sequence.pools and sequence.num_total > budget:
                break  # of the next step it may have all
            if self._in_flight and sequence.last_step_id >= self._in_flight[0].step_id:
                break  # preempted a moment ago: what it still gets is not known yet
            prefix = self._placement.shared_prefix(sequence)
            if prefix is None:
                continue
            if not self._placement.place(sequence, *prefix, headroom):
                break
            self._note_start(plan, sequence, now)
            placed.append(sequence)
            num_start_tokens += sequence.num_known + len(sequence.request.request.sampling.allowed_token_ids)
            budget -= self._plan_prefill(plan, sequence, budget)
        for sequence in placed:
            self._roster.run(sequence)

    def _note_start(self, plan: StepPlan, sequence: SequenceState, now: float) -> None:
        request = sequence.request
        if self.config.enable_prefix_caching:
            self.counters.num_prefix_queries += sequence.num_total
            self.counters.num_prefix_hits += sequence.num_computed
        if request.first_planned_s is None:
            request.first_planned_s = now
            request.num_cached_tokens = sequence.num_computed
        plan.starts.append(
            RowStart(
                sequence.row,
                sequence,
                sequence.num_computed,
                list(sequence.block_ids),
                sequence.asks_prompt_logprobs,
            )
        )

    # ---- outcomes ----

    def _take_prompt_parts(self, plan: StepPlan, failures: Mapping[int, RowFailure]) -> None:
        """Parts of prompts after which no token was drawn are computed."""
        runs = zip(plan.sequences, plan.rows, plan.start_positions, plan.num_run_tokens, plan.samples, strict=True)
        for sequence, row, start, count, sample in runs:
            if (not sample or sequence.pools) and sequence.row != NO_ROW:
                sequence.num_retired = start + count
                if sequence.num_retired >= sequence.next_hash_at and row not in failures:
                    self._placement.share_computed_blocks(sequence)

    def _take_tokens(
        self, plan: StepPlan, outcome: StepOutcome, failures: Mapping[int, RowFailure], events: StepEvents
    ) -> None:
        """One token for each that drew one. The loop that every token passes: what is rare in it stands elsewhere."""
        drawing = plan.drawing
        if failures:
            drawing = [each for each, row in zip(drawing, plan.drawing_rows, strict=True) if row not in failures]
        num_discarded = 0
        sequences, token_ids = events.sequences, events.token_ids
        logprobs = outcome.logprobs or repeat(None, len(drawing))
        for sequence, token_id, logprob in zip(drawing, outcome.token_ids, logprobs, strict=True):
            output_ids = sequence.output_ids
            if len(output_ids) < sequence.quiet_until and token_id not in sequence.stop_token_ids and logprob is None:
                output_ids.append(token_id)
                sequence.num_retired += 1
                sequences.append(sequence)
                token_ids.append(token_id)
            elif sequence.finished:
                num_discarded += 1
            else:
                self._take_token(sequence, token_id, logprob, events)
        self.counters.num_discarded_tokens += num_discarded
        self.counters.num_generated_tokens += len(drawing) - num_discarded

    def _take_token(
        self, sequence: SequenceState, token_id: int, logprob: TokenLogprobs | None, events: StepEvents
    ) -> None:
        """A token that may complete a block, of which more is to be said than its id, or that may be the last."""
        sequence.output_ids.append(token_id)
        num_known = sequence.num_known
        # All that it knew before was run to draw this one.
        sequence.num_retired = num_known - 1
        if num_known > sequence.next_hash_at:
            self._to_share.append(sequence)
        else:
            sequence.look_again()
        if num_known < sequence.max_total and token_id not in sequence.stop_token_ids and logprob is None:
            events.sequences.append(sequence)
            events.token_ids.append(token_id)
            return
        output = SequenceOutput(sequence.index, [token_id], 1)
        if logprob is not None:
            output.logprobs = [logprob]
        if token_id in sequence.stop_token_ids and self._may_stop(sequence):
            output.token_ids = []
            output.logprobs = None
            output.finish_reason = FinishReason.STOP
            output.stop_token_id = token_id
        elif num_known == sequence.max_total:
            output.finish_reason = FinishReason.LENGTH
        events.outputs.append((sequence.request, output))
        if output.finish_reason is not None:
            self._end_well(sequence, events)

    def _take_vector(self, sequence: SequenceState, vector: VectorArray, events: StepEvents) -> None:
        """A request that pools is over with its prompt."""
        output = SequenceOutput(sequence.index, [], 0, finish_reason=FinishReason.STOP, vector=vector)
        events.outputs.append((sequence.request, output))
        self._end_well(sequence, events)

    def _may_stop(self, sequence: SequenceState) -> bool:
        return len(sequence.output_ids) > sequence.request.request.min_tokens

    # ---- ends ----

    def _fail(self, state: RequestState, fault: RequestFault, events: StepEvents) -> None:
        self._requests.pop(state.request.request_id, None)
        for sequence in state.sequences:
            self._end(sequence)
        events.ended.append((state, fault))

    def _end_well(self, sequence: SequenceState, events: StepEvents) -> None:
        self._end(sequence)
        done = self._close_if_done(sequence.request)
        if done is not None:
            events.ended.append((done, None))

    def _close_if_done(self, state: RequestState) -> RequestState | None:
        if state.num_unfinished:
            return None
        self._requests.pop(state.request.request_id, None)
        return state

    def _end(self, sequence: SequenceState) -> None:
        if sequence.finished:
            return
        sequence.finished = True
        sequence.quiet_until = 0
        sequence.request.num_unfinished -= 1
        self._suspects.forget(sequence)
        self._roster.leave(sequence)

    # ---- integrity ----

    def check_integrity(self) -> None:
        """Raise if the books disagree with one another. Run when idle and after every test."""
        self._roster.check_integrity(self._requests.values())
