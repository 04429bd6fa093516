"""The scheduler under random arrivals, cancels, preemptions, tiny pools and lost workers.

The worker here is a few lines of Python that knows what each block must hold: a token is a pure function of (request
seed, sequence index, position), a slot remembers which prefix was written into it, and a run that reads anything else
fails.
"""

from __future__ import annotations

import hashlib
from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from control_plane.core.policy import BACKGROUND_PRIORITY
from control_plane.core.request import CoreRequest, FinishReason, PoolingParams, PromptLogprobs, SamplingParams
from control_plane.core.scheduler import Scheduler
from control_plane.core.scheduler_config import SchedulerConfig
from control_plane.core.step_plan import StepEvents, StepOutcome, StepPlan

from .conftest import known_ids, outputs_of

VOCAB = 50
EOS = 7


def token_at(seed: int, index: int, position: int) -> int:
    digest = hashlib.blake2b(f"{seed} {index} {position}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % VOCAB


@dataclass
class OracleRow:
    seed: int
    index: int
    tokens: list[int]
    block_ids: list[int]
    next_position: int
    pools: bool = False
    num_prompt_tokens: int = 0
    tells_prompt: bool = False


class OracleWorker:
    """Executes plans strictly in order and remembers, slot by slot, the prefix that was written there."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.rows: dict[int, OracleRow] = {}
        self.slots: dict[int, tuple[int, ...]] = {}

    def execute(self, plan: StepPlan) -> StepOutcome:
        config = self.config
        assert plan.num_tokens == sum(plan.num_run_tokens) <= config.max_num_batched_tokens
        assert len(set(plan.rows)) == len(plan.rows)
        for row in plan.drop_rows:
            del self.rows[row]
        for start in plan.starts:
            assert start.row not in self.rows and 0 <= start.row < config.max_num_seqs
            tokens = known_ids(start.sequence)
            assert start.num_computed_tokens < len(tokens)
            request = start.sequence.request.request
            self.rows[start.row] = OracleRow(
                request.sampling.seed,
                start.sequence.index,
                tokens,
                list(start.block_ids),
                start.num_computed_tokens,
                pools=request.pooling is not None,
                num_prompt_tokens=start.sequence.num_prompt_tokens,
                tells_prompt=start.asks_prompt_logprobs,
            )
            assert not start.asks_prompt_logprobs or start.num_computed_tokens == 0, "tells of what is not run"
            assert request.pooling is None or start.num_computed_tokens == 0, "pools what is not run"
        new_block_ids = deque(plan.new_block_ids)
        sampled_rows, sampled_tokens = [], []
        vectors: dict[int, np.ndarray] = {}
        prompts: dict[int, PromptLogprobs] = {}
        writes: set[int] = set()
        runs = zip(plan.rows, plan.start_positions, plan.num_run_tokens, plan.samples, plan.num_new_blocks, strict=True)
        for row_id, start_position, count, sample, num_new in runs:
            row = self.rows[row_id]
            row.block_ids += [new_block_ids.popleft() for _ in range(num_new)]
            assert start_position == row.next_position and count >= 1
            end = start_position + count
            assert end <= len(row.tokens), "runs a token that does not exist yet"
            for position in range(start_position, end):
                slot = self.slot(row, position)
                assert slot not in writes, "two rows write one slot"
                writes.add(slot)
                for other_id, other in self.rows.items():
                    assert other_id == row_id or row.block_ids[position // config.block_size] not in other.block_ids
                self.slots[slot] = tuple(row.tokens[: position + 1])
            for position in range(end):
                assert self.slots.get(self.slot(row, position)) == tuple(row.tokens[: position + 1]), (
                    "reads a wrong slot"
                )
            row.next_position = end
            stop = min(end + 1, row.num_prompt_tokens)
            if row.tells_prompt and stop > start_position + 1:
                prompts[row_id] = told_of(row.tokens, start_position + 1, stop)
            assert sample == (end == len(row.tokens))
            if row.pools:
                assert not config.whole_prompts or (start_position, end) == (0, len(row.tokens)), "cut into pieces"
                if sample:
                    vectors[row_id] = vector_of(row.tokens)
            elif sample:
                token = token_at(row.seed, row.index, len(row.tokens))
                row.tokens.append(token)
                sampled_rows.append(row_id)
                sampled_tokens.append(token)
        assert not new_block_ids
        return StepOutcome(plan.step_id, sampled_rows, sampled_tokens, vectors=vectors, prompt_logprobs=prompts)

    def slot(self, row: OracleRow, position: int) -> int:
        block_id = row.block_ids[position // self.config.block_size]
        assert self.config.first_block_id <= block_id < self.config.num_blocks
        return block_id * self.config.block_size + position % self.config.block_size


@dataclass
class Client:
    """What came out, request by request."""

    tokens: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    reasons: dict[tuple[str, int], FinishReason] = field(default_factory=dict)
    ended: dict[str, object] = field(default_factory=dict)
    vectors: dict[str, list[float]] = field(default_factory=dict)
    prompts: dict[str, list[float]] = field(default_factory=dict)

    def take(self, events: StepEvents) -> None:
        for state, output in outputs_of(events):
            key = (state.request.request_id, output.index)
            assert key not in self.reasons, "output after the end"
            self.tokens.setdefault(key, []).extend(output.token_ids)
            if output.finish_reason is not None:
                self.reasons[key] = output.finish_reason
            if output.prompt_logprobs is not None:
                part = output.prompt_logprobs
                told = self.prompts.setdefault(state.request.request_id, [])
                assert output.index == 0 and not self.tokens.get(key), "told too late"
                assert part.start_position == len(told) + 1, "a gap, or told twice"
                told += part.logprobs.tolist()
                assert part.ranks.tolist() == part.logprobs.tolist() and part.top_token_ids.shape[1] == 2
            elif output.index == 0 and state.request.sampling.num_prompt_logprobs is not None:
                assert len(self.prompts.get(key[0], ())) == len(state.request.prompt_ids) - 1, "a token came before"
            if output.vector is not None:
                assert state.request.pooling is not None and state.request.request_id not in self.vectors
                self.vectors[state.request.request_id] = output.vector.tolist()
        for state, fault in events.ended:
            assert state.request.request_id not in self.ended, "ended twice"
            self.ended[state.request.request_id] = fault


def blocks_of(plan: StepPlan, block_size: int) -> tuple[set[int], set[int]]:
    """Blocks that get a new owner in this step, and blocks that it writes."""
    fresh = set(plan.new_block_ids)
    for start in plan.starts:
        fresh |= set(start.block_ids[start.num_computed_tokens // block_size :])
    written = set()
    for sequence, start_position, count in zip(plan.sequences, plan.start_positions, plan.num_run_tokens, strict=True):
        first, last = start_position // block_size, (start_position + count - 1) // block_size
        written |= set(sequence.block_ids[first : last + 1])
    return fresh, written


def told_of(tokens: list[int], start: int, stop: int) -> PromptLogprobs:
    """What is said of the tokens from `start` to `stop`: each by its whole prefix."""
    values = np.array([sum(tokens[:position]) * VOCAB + tokens[position] for position in range(start, stop)])
    top = np.zeros((len(values), 2))
    return PromptLogprobs(
        start, values.astype(np.float32), values.astype(np.uint32), top.astype(np.uint32), top.astype(np.float32)
    )


def vector_of(token_ids: list[int]) -> np.ndarray:
    """What a prompt is worth: of every token of it, and of nothing else."""
    return np.array([len(token_ids), *np.cumsum(token_ids)[-2:]], dtype=np.float32)


def expected_output(request: CoreRequest, index: int) -> tuple[list[int], FinishReason]:
    if request.pooling is not None:
        return [], FinishReason.STOP
    tokens: list[int] = []
    start = len(request.prompt_ids)
    for count in range(1, request.max_tokens + 1):
        token = token_at(request.sampling.seed, index, start + count - 1)
        if token in request.stop_token_ids and count > request.min_tokens:
            return tokens, FinishReason.STOP
        tokens.append(token)
    return tokens, FinishReason.LENGTH


requests = st.builds(
    lambda number, prefix, tail, max_tokens, n, priority, eos, salt, seed, pools, tells: CoreRequest(
        request_id=f"r{number}",
        prompt_ids=np.array([1 + (position % 5) for position in range(prefix)] + tail, dtype=np.uint32),
        sampling=SamplingParams(seed=seed, num_prompt_logprobs=2 if tells and not pools else None),
        max_tokens=1 if pools else max_tokens,
        stop_token_ids=frozenset({EOS}) if eos else frozenset(),
        num_sequences=1 if pools else n,
        pooling=PoolingParams() if pools else None,
        priority=priority,
        cache_salt=salt,
    ),
    number=st.just(0),
    prefix=st.integers(0, 20),
    tail=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8),
    max_tokens=st.integers(1, 12),
    n=st.integers(1, 3),
    priority=st.sampled_from([-1, 0, 1, BACKGROUND_PRIORITY]),
    eos=st.booleans(),
    salt=st.sampled_from(["", "a"]),
    seed=st.integers(0, 5),
    pools=st.integers(0, 3).map(lambda draw: draw == 0),
    tells=st.booleans(),
)

configs = st.builds(
    SchedulerConfig,
    first_block_id=st.integers(0, 2),
    num_blocks=st.integers(12, 26),  # 39 tokens, the longest sequence, always fit
    block_size=st.just(4),
    max_num_seqs=st.integers(3, 6),
    max_num_batched_tokens=st.integers(3, 40),
    policy=st.sampled_from(["fcfs", "priority"]),
    enable_prefix_caching=st.booleans(),
    shares_blocks=st.booleans(),
    num_stages=st.integers(1, 3),
).flatmap(
    # A prompt that must run whole has to fit into a step: 28 tokens are the longest.
    lambda config: st.sampled_from(
        [config, replace(config, whole_prompts=True, max_num_batched_tokens=max(28, config.max_num_batched_tokens))]
    )
)

# What happens between two steps: how many requests arrive, what is cancelled, whether the worker dies.
turns = st.lists(
    st.tuples(
        st.lists(requests, max_size=3),
        st.integers(-3, 8),  # >= 0: cancel that request, if there is one
        st.integers(0, 24).map(lambda draw: draw == 0),
        st.integers(-4, 8),  # >= 0: finish the first sequence of that request from outside
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=400, deadline=None)
@given(config=configs, depth=st.integers(1, 3), turns=turns)
def test_every_request_ends_once_with_its_own_output(config: SchedulerConfig, depth: int, turns: list) -> None:
    scheduler, worker, client = Scheduler(config), OracleWorker(config), Client()
    submitted: dict[str, CoreRequest] = {}
    cancelled: set[str] = set()
    cut: dict[str, int] = {}
    in_flight: deque[StepPlan] = deque()
    written: dict[int, set[int]] = {}  # by step id: blocks that the step writes

    def step(now: float) -> bool:
        while len(in_flight) < depth:
            plan = scheduler.plan(now)
            if plan is None:
                break
            fresh, written[plan.step_id] = blocks_of(plan, config.block_size)
            for earlier in in_flight:
                assert not fresh & written[earlier.step_id], "a block changes hands while a step in flight writes it"
            in_flight.append(plan)
        scheduler.check_integrity()
        if not in_flight:
            return False
        client.take(scheduler.apply(worker.execute(in_flight.popleft())))
        scheduler.check_integrity()
        return True

    for now, (arrivals, cancel, lost, cut_number) in enumerate(turns):
        for arrival in arrivals:
            request = CoreRequest(
                request_id=f"r{len(submitted)}",
                **{name: getattr(arrival, name) for name in CoreRequest.__dataclass_fields__ if name != "request_id"},
            )
            submitted[request.request_id] = request
            scheduler.add_request(request, now)
        if f"r{cancel}" in submitted and f"r{cancel}" not in client.ended:
            cancelled.add(f"r{cancel}")
            scheduler.cancel(f"r{cancel}")
        target = f"r{cut_number}"
        if (
            target in submitted
            and target not in client.ended
            and target not in cancelled
            and (target, 0) not in client.reasons
        ):
            cut[target] = len(client.tokens.get((target, 0), []))
            client.reasons[(target, 0)] = FinishReason.STOP
            done = scheduler.finish_sequence(target, 0)
            if done is not None:
                client.take(StepEvents(ended=[(done, None)]))
        if lost:
            in_flight.clear()
            written.clear()
            worker = OracleWorker(config)
            client.take(scheduler.worker_lost())
        step(now)

    for now in range(len(turns), 5000):
        if not step(now):
            break
    else:
        raise AssertionError("some request never ends")

    assert scheduler.num_requests == scheduler.num_running == scheduler.num_waiting == 0
    assert scheduler.num_blocks_held == 0, "blocks leaked"
    for request_id, request in submitted.items():
        if request_id in cancelled:
            assert request_id not in client.ended
            continue
        fault = client.ended[request_id]
        for index in range(request.num_sequences):
            tokens, reason = expected_output(request, index)
            got = client.tokens.get((request_id, index), [])
            if fault is not None or (request_id in cut and index == 0):
                assert got == tokens[: len(got)]
            else:
                assert (got, client.reasons[(request_id, index)]) == (tokens, reason)
        if request.sampling.num_prompt_logprobs is not None and fault is None and request_id not in cut:
            prompt = request.prompt_ids.tolist()
            assert client.prompts.get(request_id, []) == told_of(prompt, 1, len(prompt)).logprobs.tolist()
        if request.pooling is not None and fault is None and request_id not in cut:
            assert client.vectors[request_id] == vector_of(request.prompt_ids.tolist()).tolist()


@settings(max_examples=60, deadline=None)
@given(config=configs, batch=st.lists(requests, min_size=2, max_size=8))
def test_output_does_not_depend_on_the_batch(config: SchedulerConfig, batch: list[CoreRequest]) -> None:
    """All at once on a small pool, and one after the other: the same tokens."""

    def run(groups: list[list[CoreRequest]]) -> Client:
        scheduler, worker, client = Scheduler(config), OracleWorker(config), Client()
        for group in groups:
            for request in group:
                scheduler.add_request(request, 0.0)
            in_flight: deque[StepPlan] = deque()
            while True:
                while len(in_flight) < 2 and (plan := scheduler.plan(0.0)) is not None:
                    in_flight.append(plan)
                if not in_flight:
                    break
                client.take(scheduler.apply(worker.execute(in_flight.popleft())))
        if not any(request.stop_token_ids for group in groups for request in group):
            assert scheduler.counters.num_discarded_tokens == 0, "ran past max_tokens"
        return client

    named = [
        CoreRequest(
            request_id=f"r{number}",
            **{name: getattr(request, name) for name in CoreRequest.__dataclass_fields__ if name != "request_id"},
        )
        for number, request in enumerate(batch)
    ]
    together, apart = run([named]), run([[request] for request in named])
    assert together.tokens == apart.tokens and together.reasons == apart.reasons


@settings(max_examples=60, deadline=None)
@given(depth=st.integers(1, 3), poison=st.integers(0, 5), at=st.integers(0, 6))
def test_a_request_that_kills_its_worker_ends_alone(depth: int, poison: int, at: int) -> None:
    """One of six requests takes the worker down whenever its token `at` is run: it ends with a fault, five do not."""
    config = SchedulerConfig(0, 64, 4, 6, 32)
    scheduler, worker, client = Scheduler(config), OracleWorker(config), Client()
    batch = [
        CoreRequest(f"r{number}", np.arange(1, 4 + number, dtype=np.uint32), SamplingParams(seed=number), max_tokens=9)
        for number in range(6)
    ]
    for request in batch:
        scheduler.add_request(request, 0.0)
    poisonous_position = len(batch[poison].prompt_ids) + at
    in_flight: deque[StepPlan] = deque()
    num_losses = 0
    for _ in range(500):
        while len(in_flight) < depth and (plan := scheduler.plan(0.0)) is not None:
            in_flight.append(plan)
        if not in_flight:
            break
        plan = in_flight.popleft()
        kills = any(
            sequence.request.request.request_id == f"r{poison}" and start <= poisonous_position < start + count
            for sequence, start, count in zip(plan.sequences, plan.start_positions, plan.num_run_tokens, strict=True)
        )
        if kills:
            num_losses += 1
            in_flight.clear()
            worker = OracleWorker(config)
            client.take(scheduler.worker_lost())
        else:
            client.take(scheduler.apply(worker.execute(plan)))
        scheduler.check_integrity()
    else:
        raise AssertionError("the server never comes to rest")
    assert set(client.ended) == {request.request_id for request in batch}
    assert client.ended[f"r{poison}"] is not None
    assert num_losses == 3
    for number, request in enumerate(batch):
        if number != poison:
            assert client.ended[request.request_id] is None
            assert client.tokens[(request.request_id, 0)] == expected_output(request, 0)[0]
