"""A request's state inside the core, and its sequences'."""

from __future__ import annotations

from array import array

from control_plane.core.prefix_cache import BlockHash
from control_plane.core.request import CoreRequest, OutputSink

NO_ROW = -1
# A count of tokens that no sequence reaches.
NEVER = 1 << 62
# A sequence that was in the batch of this many lost workers in a row is tried alone.
LOSSES_UNTIL_ALONE = 2


class RequestState:
    """An admitted request: lives until its last sequence has ended."""

    __slots__ = (
        "arrival",
        "arrival_s",
        "first_planned_s",
        "num_cached_tokens",
        "num_unfinished",
        "num_waiting",
        "request",
        "root_hash",
        "sequences",
        "sink",
    )

    def __init__(self, request: CoreRequest, arrival: int, arrival_s: float, root_hash: BlockHash | None) -> None:
        self.request = request
        self.arrival = arrival  # position in the order of arrivals
        self.arrival_s = arrival_s
        # The engine's: where its outputs go; None once nothing more is to come out.
        self.sink: OutputSink | None = None
        self.first_planned_s: float | None = None
        # Where the prefix chain starts; None if this request neither uses the cache nor forks.
        self.root_hash = root_hash
        self.num_cached_tokens = 0
        self.num_waiting = 0  # sequences in the queue
        self.sequences = [SequenceState(self, index) for index in range(request.num_sequences)]
        self.num_unfinished = len(self.sequences)


class SequenceState:
    """One continuation. Counts of tokens run ahead of what is known: a planned sample counts before its value has come.

    num_prompt_tokens <= num_total; num_computed <= num_total; token values are known up to
    num_prompt_tokens + len(output_ids) <= num_total.
    """

    __slots__ = (
        "asks_prompt_logprobs",
        "block_hashes",
        "block_ids",
        "capacity",
        "computing",
        "finished",
        "index",
        "last_step_id",
        "matcher",
        "max_total",
        "next_hash_at",
        "num_computed",
        "num_losses",
        "num_matched",
        "num_named",
        "num_prompt_logprobs_left",
        "num_prompt_tokens",
        "num_retired",
        "num_total",
        "output_ids",
        "pools",
        "progress_mark",
        "quiet_until",
        "request",
        "row",
        "sort_key",
        "stop_token_ids",
    )

    def __init__(self, request: RequestState, index: int) -> None:
        self.request = request
        self.index = index
        self.num_prompt_tokens = len(request.request.prompt_ids)
        # `num_total` when it has been promised all the tokens that it may generate.
        self.max_total = self.num_prompt_tokens + request.request.max_tokens
        self.stop_token_ids = request.request.stop_token_ids
        # Not a list: four bytes a token, and no object that lives as long as the request.
        self.output_ids = array("I")
        self.finished = False
        # Its sampling run gives a vector, and is its last.
        self.pools = request.request.pooling is not None
        # Tokens of the prompt whose logprobs are wanted and have not come. One sequence speaks for its request.
        wants_logprobs = request.request.sampling.num_prompt_logprobs is not None and index == 0
        self.num_prompt_logprobs_left = self.num_prompt_tokens - 1 if wants_logprobs else 0
        # Told of the first `num_matched` outputs, so that it stands where the token ids stand whatever happens to the
        # worker.
        grammar = request.request.grammar
        self.matcher = None if grammar is None else grammar.start()
        self.num_matched = 0
        # Order among sequences: lower runs first. Set by the scheduler's policy on arrival and never changed.
        self.sort_key: tuple[int, ...] = ()

        # How often it was in the batch of a lost worker without getting past `progress_mark` outputs since.
        self.num_losses = 0
        self.progress_mark = 0

        # While it has fewer outputs, there is no more to say of a token than its id, unless it is a stop token. Set
        # when one is looked at.
        self.quiet_until = 0
        self.block_hashes: list[BlockHash] = []
        self.forget_placement()

    def forget_placement(self) -> None:
        """Not on a worker: no row, no blocks, nothing computed. Token ids and hashes stay."""
        self.row = NO_ROW
        self.block_ids: list[int] = []
        self.capacity = 0  # tokens that block_ids have room for
        self.num_total = self.num_prompt_tokens + len(self.output_ids)
        self.num_computed = 0  # planned or done
        self.num_retired = 0  # done
        self.next_hash_at = NEVER  # num_retired at which the next blocks of ours are to enter the prefix cache
        self.num_named = 0  # blocks that have been through that
        self.computing: list[BlockHash] = []  # hashes that others may wait for
        self.last_step_id = 0  # the last step that it was planned into
        # Placed to compute its prompt from the first token on, with logprobs.
        self.asks_prompt_logprobs = False

    @property
    def may_draw(self) -> bool:
        """Whether it may generate more than it has and what is in flight."""
        return self.num_total < self.max_total

    def look_again(self) -> None:
        """Set `quiet_until`: to where its next blocks are full, or its last token comes."""
        self.quiet_until = min(self.next_hash_at, self.max_total - 1) - self.num_prompt_tokens

    @property
    def is_suspect(self) -> bool:
        return self.num_losses >= LOSSES_UNTIL_ALONE

    @property
    def num_known(self) -> int:
        return self.num_prompt_tokens + len(self.output_ids)

    def token_ids(self, start: int = 0) -> array[int]:
        """Known token ids from position `start` on, prompt then output.

        Costs what it returns, not what came before: a running sequence asks for its newest block only.
        """
        if start >= self.num_prompt_tokens:
            return self.output_ids[start - self.num_prompt_tokens :]
        return array("I", self.request.request.prompt_ids[start:].tobytes()) + self.output_ids
