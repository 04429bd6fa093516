"""A request's mailbox: what its sequences have said and nobody has fetched yet.

The core puts outputs in, step after step, and never waits; a writer takes all that has come since its last write. So
a stream whose reader is slow gets fewer and larger messages, and no step is ever late because of it.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog
from stepwire.v1 import inference_pb2 as pb

from control_plane.core.request import EngineClient, FinishReason, RequestFault, SequenceOutput
from control_plane.frontend.detokenizer import Detokenization
from control_plane.frontend.errors import RequestRefused, to_request_error
from control_plane.frontend.metrics import FrontendMetrics
from control_plane.frontend.packed_texts import Columns, PackedColumns, PackedTexts
from control_plane.frontend.prompt_output import PromptAssembly, no_bytes
from control_plane.frontend.request_builder import BuiltRequest
from control_plane.frontend.sequence_stream import SequenceStream

log = structlog.get_logger(__name__)


class RequestOutput:
    """The mailbox (an `OutputSink`). All calls on the event loop.

    `on_ready` is called when there is something to fetch, once until it is fetched.
    """

    __slots__ = (
        "_arrival_s",
        "_built",
        "_columns",
        "_detokenization",
        "_engine",
        "_error",
        "_has_begun",
        "_has_ended",
        "_is_accepted_sent",
        "_is_ready",
        "_metrics",
        "_num_cached_tokens",
        "_num_held",
        "_num_packed",
        "_num_reasoning_tokens",
        "_on_ready",
        "_packable",
        "_packed",
        "_place",
        "_plain",
        "_prompt",
        "_push_token",
        "_sends_token_ids",
        "_sequences",
        "is_closed",
        "sends_logprobs",
        "tag",
    )

    def __init__(
        self,
        built: BuiltRequest,
        engine: EngineClient,
        detokenization: Detokenization | None,
        metrics: FrontendMetrics,
        on_ready: Callable[[RequestOutput], None],
        *,
        arrival_s: float,
        tag: int = 0,
        packed: PackedTexts | None = None,
    ) -> None:
        """`packed`: where a Session packs texts."""
        self.tag = tag
        # Whether its messages may be large.
        self.sends_logprobs = built.output.sends_logprobs or built.core.sampling.num_prompt_logprobs is not None
        # Nothing more will come out: the last message was taken, or the request was cancelled.
        self.is_closed = False
        self._built = built
        self._engine = engine
        self._detokenization = detokenization
        self._metrics = metrics
        self._on_ready = on_ready
        self._arrival_s = arrival_s
        self._is_ready = False
        self._is_accepted_sent = False
        self._has_ended = False
        self._error: RequestRefused | None = None
        self._has_begun = False
        self._num_reasoning_tokens = 0
        self._num_cached_tokens = 0
        self._prompt = None if built.output.prompt is None else PromptAssembly(built, detokenization)
        self._sequences = [SequenceStream.start(built.output, detokenization) for _ in range(built.core.num_sequences)]
        # The one sequence of a request of which nothing but its text and its ids is wanted: most are.
        self._plain = self._sequences[0] if self._is_plain(built) else None
        self._sends_token_ids = built.output.sends_token_ids
        # Where a plain one's tokens are packed: once the client knows of the request, and while nothing else waits.
        self._packable: PackedColumns | None = None
        self._packed: PackedColumns | None = None
        # The rest is looked at for every token that is packed: here, and not in objects further away.
        self._push_token: Callable[[int], str] | None = None
        if packed is not None and self._plain is not None:
            self._packable = packed.token_ids if self._sends_token_ids else packed.texts
            if self._plain.detokenizer is not None:
                self._push_token = self._plain.detokenizer.push_token
        # Where its newest tokens are, once they go that way.
        self._columns: Columns | None = None
        self._place = 0
        # Tokens since that began: those that were packed, and those after them that are no text yet.
        self._num_packed = 0
        self._num_held = 0

    def _is_plain(self, built: BuiltRequest) -> bool:
        plan, first = built.output, self._sequences[0]
        return (
            len(self._sequences) == 1
            and (plan.sends_token_ids or first.detokenizer is not None)
            and first.matcher is None
            and first.parser is None
            and self._prompt is None
            and not (self.sends_logprobs or plan.generates_nothing)
        )

    @property
    def request_id(self) -> str:
        return self._built.core.request_id

    # ---- in: from the core ----

    def on_accepted(self) -> None:
        """The core has queued the request: its first message may go."""
        self._metrics.num_running_requests += 1
        self._notify()

    def on_token(self, index: int, token_id: int) -> None:
        packed = self._packed
        if packed is None or not packed.is_wanted:
            self._end_packing()
            self._on_unpacked_token(index, token_id)
            return
        text = "" if self._push_token is None else self._push_token(token_id)
        last = self._columns
        if last is packed.columns:
            self._num_packed += 1
            last.grow(self._place, text, 1, token_id)
            return
        num_new = self._num_held + 1
        if not (text or self._sends_token_ids):
            self._num_held = num_new
            return
        self._num_held = 0
        self._num_packed += num_new
        since_s = self._begun_s() if last is None else last.taken_s
        self._columns = packed.columns
        self._place = packed.add(self.tag, text, num_new, since_s, token_id)

    def _begun_s(self) -> float:
        """When text of it was last taken; if none was, its arrival, negated."""
        return self._sequences[0].last_taken_s or -self._arrival_s

    def _on_unpacked_token(self, index: int, token_id: int) -> None:
        sequence = self._plain
        if sequence is None:
            self.on_output(SequenceOutput(index, [token_id], 1))
            return
        if self._has_ended:
            return
        sequence.num_tokens += 1
        sequence.num_new += 1
        text = "" if sequence.detokenizer is None else sequence.detokenizer.push_token(token_id)
        # There may be news already: what was taken back when packing ended.
        if not (text or self._sends_token_ids or sequence.has_news):
            return
        if text:
            sequence.texts.append(text)
        if self._sends_token_ids:
            sequence.token_ids.append(token_id)
        sequence.has_news = True
        if not self._is_ready:
            self._notify()

    def _begin_packing(self, packed: PackedColumns) -> None:
        """From here on: everything before was taken, but for tokens that are no text yet."""
        self._packed, sequence = packed, self._sequences[0]
        self._num_held, sequence.num_new = sequence.num_new, 0
        sequence.num_tokens -= self._num_held

    def _end_packing(self) -> None:
        """Take back what waits to be packed: it goes with what else there is to say."""
        packed, self._packed = self._packed, None
        if packed is None:
            return
        sequence = self._sequences[0]
        sequence.num_tokens += self._num_packed + self._num_held
        sequence.num_new += self._num_held
        self._num_packed = self._num_held = 0
        columns, self._columns = self._columns, None
        if columns is None:
            return
        if columns is packed.columns:
            text, token_ids, num_tokens, since_s = packed.withdraw(self._place)
            if text:
                sequence.texts.append(text)
            sequence.token_ids += token_ids
            sequence.num_new += num_tokens
            sequence.last_taken_s = max(since_s, 0.0)
            sequence.has_news = True
        else:
            sequence.last_taken_s = columns.taken_s

    def on_output(self, output: SequenceOutput) -> None:
        sequence = self._sequences[output.index]
        if sequence.has_ended or self._has_ended:
            return
        self._end_packing()
        if output.prompt_logprobs is not None and self._prompt is not None:
            self._prompt.add(output.prompt_logprobs)
            if self._prompt.is_complete:
                self._notify_once()
            return
        if self._built.output.generates_nothing:
            self._end_with_nothing(sequence, output)
            return
        was_reasoning = sequence.parser is not None and sequence.parser.is_reasoning
        has_news = sequence.push(output, self._built.output)
        if was_reasoning:
            self._num_reasoning_tokens += output.num_tokens
        if sequence.has_ended and output.finish_reason is None:  # by a stop string
            self._engine.finish_sequence(self.request_id, output.index)
        if has_news:
            self._notify_once()

    def _end_with_nothing(self, sequence: SequenceStream, output: SequenceOutput) -> None:
        """Only the prompt was wanted: the token that the core drew is nobody's."""
        sequence.has_ended = sequence.has_news = True
        sequence.finish_reason = FinishReason.LENGTH
        if output.finish_reason is None:
            self._engine.finish_sequence(self.request_id, output.index)
        self._notify_once()

    def on_end(self, num_cached_tokens: int, fault: RequestFault | None) -> None:
        if fault is not None and not self._has_ended:
            log.warning(
                "request ended with an error",
                request_id=self.request_id,
                client_request_id=self._built.client_request_id,
                code=fault.code,
                message=fault.message,
            )
        self._end(None if fault is None else RequestRefused.from_fault(fault), num_cached_tokens)

    # ---- in: from the stream's side ----

    def fail(self, error: RequestRefused) -> None:
        """End the request from this side, with an error that the client is told of."""
        if not self._has_ended:
            self._engine.cancel(self.request_id)
            self._end(error, 0)

    def cancel(self) -> None:
        """Forget the request: nobody listens any more. Harmless on one whose last message was taken."""
        if self.is_closed:
            return
        self.is_closed = True
        self._end_packing()
        if not self._has_ended:
            self._has_ended = True
            self._engine.cancel(self.request_id)
            self._metrics.num_running_requests -= 1
        self._metrics.count_end("CANCELLED")

    def _end(self, error: RequestRefused | None, num_cached_tokens: int) -> None:
        if self._has_ended:
            return
        self._end_packing()
        self._has_ended = True
        self._error = error
        self._num_cached_tokens = num_cached_tokens
        self._metrics.num_running_requests -= 1
        if not self._is_ready:
            self._notify()

    def _notify_once(self) -> None:
        # Nothing is said before the prompt is: another sequence may be ahead of the one that computes its logprobs.
        if not self._is_ready and (self._prompt is None or self._prompt.is_complete):
            self._notify()

    def _notify(self) -> None:
        self._is_ready = True
        self._on_ready(self)

    # ---- out ----

    def take(self, response: pb.GenerateResponse, now_s: float) -> None:
        """Move everything that has come into one message; sets `is_closed` with the last one."""
        self._is_ready = False
        if not self._is_accepted_sent:
            self._is_accepted_sent = True
            accepted = response.accepted
            accepted.request_id = self.request_id
            accepted.model = self._built.model
            accepted.num_prompt_tokens = len(self._built.core.prompt_ids)
        if self._prompt is not None and self._prompt.is_complete:
            self._prompt.write(response)
            self._prompt = None
        for index, sequence in enumerate(self._sequences if self._prompt is None else ()):
            if sequence.has_news:
                self._take_sequence(index, sequence, response, now_s)
        if self._has_ended:
            self.is_closed = True
            self._take_end(response, now_s)
        elif self._packed is None and self._packable is not None and self._packable.is_wanted:
            self._begin_packing(self._packable)

    def _take_sequence(self, index: int, sequence: SequenceStream, response: pb.GenerateResponse, now_s: float) -> None:
        delta = response.deltas.add()
        if index:
            delta.index = index
        token_bytes = no_bytes if self._detokenization is None else self._detokenization.token_bytes
        num_new = sequence.take(delta, token_bytes)
        if num_new:
            self._observe(sequence, num_new, now_s)

    def _observe(self, sequence: SequenceStream, num_new: int, now_s: float) -> None:
        metrics = self._metrics
        if sequence.last_taken_s:
            metrics.inter_token_latency.observe((now_s - sequence.last_taken_s) / num_new, num_new)
        elif not self._has_begun:
            metrics.time_to_first_token.observe(now_s - self._arrival_s)
        sequence.last_taken_s = now_s
        self._has_begun = True

    def _take_end(self, response: pb.GenerateResponse, now_s: float) -> None:
        metrics = self._metrics
        if self._error is not None:
            response.error.CopyFrom(to_request_error(self._error))
            metrics.count_end(self._error.code)
            return
        num_prompt_tokens = len(self._built.core.prompt_ids)
        num_tokens = sum(sequence.num_tokens for sequence in self._sequences)
        usage = response.usage
        usage.num_prompt_tokens = num_prompt_tokens
        usage.num_completion_tokens = num_tokens
        usage.num_cached_tokens = self._num_cached_tokens
        usage.num_reasoning_tokens = self._num_reasoning_tokens
        reasons = {sequence.finish_reason for sequence in self._sequences}
        metrics.count_end("OK", "length" if FinishReason.LENGTH in reasons else "stop")
        metrics.e2e_latency.observe(now_s - self._arrival_s)
        metrics.prompt_tokens_of_request.observe(num_prompt_tokens)
        metrics.generation_tokens_of_request.observe(num_tokens)
