"""What the frontend asks of the core and what the core answers: ids and numbers, never text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import numpy as np
import numpy.typing as npt

TokenIdArray = npt.NDArray[np.uint32]
VectorArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn: validated, and completed with the model's defaults. `RowSampling` in worker.proto."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0  # unsigned 64 bit
    num_logprobs: int | None = None
    # Of the prompt's tokens: None: not wanted; k: each token's own and those of the k best.
    num_prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] = ()


class TokenMatcher(Protocol):
    """What one sequence may still say. Not safe for several threads at a time."""

    def accept(self, token_ids: Sequence[int]) -> None:
        """These were drawn; a token that was not allowed sets `error`."""
        ...

    def fill_mask(self, out: npt.NDArray[np.uint32]) -> None:
        """Set the words of the next token's mask: [ceil(vocab_size / 32)], bit i of word w is token 32 * w + i."""
        ...

    @property
    def is_over(self) -> bool:
        """Nothing may follow but the end of the sequence."""
        ...

    @property
    def error(self) -> str:
        """Why no further mask can be given; empty while all is well."""
        ...


class Grammar(Protocol):
    """What a request's sequences may say."""

    def start(self) -> TokenMatcher:
        """A matcher of one sequence that has said nothing yet."""
        ...


@dataclass(frozen=True, slots=True)
class PoolingParams:
    """A request that is worth one vector instead of tokens."""

    # Where the second text of a pair begins; 0: there is one text.
    second_text_start: int = 0


@dataclass(frozen=True, slots=True)
class CoreRequest:
    """One admitted-or-not request, as the frontend hands it to `EngineClient.submit`."""

    request_id: str
    prompt_ids: TokenIdArray  # [num_prompt_tokens], uint32
    sampling: SamplingParams
    # Most tokens a sequence may generate, >= 1; the frontend has clamped it to what the context leaves.
    max_tokens: int
    min_tokens: int = 0
    # Drawing one of these ends the sequence (end-of-sequence tokens included, unless ignored).
    stop_token_ids: frozenset[int] = frozenset()
    num_sequences: int = 1
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    # None: anything. Sequences end where it ends.
    grammar: Grammar | None = None
    # None: tokens are wanted. Else the prompt is run, nothing is drawn, and `max_tokens` is 1.
    pooling: PoolingParams | None = None


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Logprobs of one generated token."""

    logprob: float
    top_token_ids: Sequence[int]
    top_logprobs: Sequence[float]


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Logprobs of `num_tokens` tokens of a prompt that follow one another."""

    start_position: int  # of the first of them
    logprobs: npt.NDArray[np.float32]  # [num_tokens]
    ranks: npt.NDArray[np.uint32]  # [num_tokens], 1 is the most likely
    top_token_ids: npt.NDArray[np.uint32]  # [num_tokens, num_top]
    top_logprobs: npt.NDArray[np.float32]  # [num_tokens, num_top], most likely first


@dataclass(slots=True)
class SequenceOutput:
    """What one step gave one sequence.

    `token_ids` are to be shown, so a stop token that ended the sequence is not among them, but counts in `num_tokens`.
    """

    index: int
    token_ids: list[int]
    num_tokens: int
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    # The stop token that was drawn, if one was.
    stop_token_id: int | None = None
    # What a request that pools is worth: float32 [dimensions].
    vector: VectorArray | None = None
    # The next part of the prompt's logprobs, where they are wanted: every part comes before the first token.
    prompt_logprobs: PromptLogprobs | None = None


class RequestFault(Exception):
    """A request that ended without finishing, after it was accepted.

    `code` is a google.rpc.Code name ("INTERNAL", "UNAVAILABLE", "CANCELLED"); `retryable` says whether the same request
    may succeed later.
    """

    def __init__(self, code: str, message: str, *, retryable: bool) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retryable = retryable


class AdmissionError(Exception):
    """A request that is refused before anything was done for it.

    `reason` is a stable word ("queue_full", "context_length_exceeded", "draining", "no_worker"); `retry_after_s` is set
    where waiting helps.
    """

    def __init__(
        self, reason: str, message: str, *, code: str, field: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.code = code
        self.field = field
        self.retry_after_s = retry_after_s


class OutputSink(Protocol):
    """Where a request's outputs go. Called on the event loop, in order; must not block and must not raise."""

    def on_token(self, index: int, token_id: int) -> None:
        """A sequence got this token and goes on: `on_output` of nothing else, for which no object is made."""
        ...

    def on_output(self, output: SequenceOutput) -> None: ...

    def on_end(self, num_cached_tokens: int, fault: RequestFault | None) -> None:
        """Exactly once: after every sequence has ended, or with the fault that ended all; never after a cancel."""
        ...


@dataclass(frozen=True, slots=True)
class PoolingFacts:
    """What a model gives for a whole text."""

    # One number that rates a pair of texts, or an embedding.
    is_score: bool
    dimensions: int
    # It draws no tokens.
    only: bool


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the frontend needs to know of the workers' model; from `DescribeResponse`."""

    model: str
    max_model_len: int
    vocab_size: int
    max_num_logprobs: int
    can_mask_tokens: bool
    can_prompt_logprobs: bool = False
    pooling: PoolingFacts | None = None


class EngineClient(Protocol):
    """The one interface between frontend and core. All calls on the core's event loop."""

    @property
    def facts(self) -> ModelFacts: ...

    def submit(self, request: CoreRequest, sink: OutputSink) -> None:
        """Queue a request. Raises `AdmissionError`; afterwards the sink hears exactly one end, unless cancelled."""
        ...

    def cancel(self, request_id: str) -> None:
        """Forget a request: nothing more comes out, its blocks are free within one step. Unknown ids are ignored."""
        ...

    def finish_sequence(self, request_id: str, index: int) -> None:
        """The frontend saw a stop string: end this sequence as if it had stopped by itself.

        No further `on_output` comes for this index; `on_end` still comes once all sequences have ended.
        """
        ...
