"""What has come for one HTTP request and was not sent yet.

The reader of the session puts deltas in, the writer of the response takes all of them out at once: under load the
deltas of a sequence grow together here instead of queueing one behind the other, and a slow client holds only its own
text. Values are copied out of the protobuf messages, because a message that is kept keeps the whole step's message.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from stepwire.v1 import inference_pb2

from gateway.errors import ApiError

_PART_CHARS = 2048
_FINISH_REASONS = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
    inference_pb2.FINISH_REASON_TOOL_CALLS: "tool_calls",
}


@dataclass(frozen=True, slots=True)
class TopLogprob:
    token: bytes
    logprob: float
    token_id: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token; `token` is its own bytes, which need not be whole characters."""

    token: bytes
    logprob: float
    top: tuple[TopLogprob, ...]
    token_id: int = 0
    # Of prompt tokens: 1 plus how many tokens are more likely; 0 where it was not told.
    rank: int = 0


@dataclass(frozen=True, slots=True)
class PromptOutput:
    """What was asked for of one prompt; the rest is empty."""

    text: str
    token_ids: list[int]
    # The first token's says nothing: NaN.
    logprobs: list[TokenLogprob]


@dataclass(slots=True)
class ToolCallPiece:
    """What has come of one call; `id` and `name` stand in its first piece."""

    index: int
    id: str
    name: str
    arguments: str
    complete: bool


@dataclass(slots=True)
class SequenceUpdate:
    """What has come of one sequence since the last update. `index` counts over the whole HTTP request."""

    index: int
    text_parts: list[str] = field(default_factory=list)
    num_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    # The stop string or stop token id that ended it, where one did.
    stop_reason: str | int | None = None
    reasoning_parts: list[str] = field(default_factory=list)
    tool_calls: list[ToolCallPiece] = field(default_factory=list)

    @property
    def text(self) -> str:
        parts = self.text_parts
        return parts[0] if len(parts) == 1 else "".join(parts)

    @property
    def reasoning(self) -> str:
        return "".join(self.reasoning_parts)

    def merge(self, delta: inference_pb2.SequenceDelta) -> None:
        """Add one delta of the same sequence."""
        text = delta.text
        if text:
            self.text_parts.append(text)
        reasoning = delta.reasoning
        if reasoning:
            self.reasoning_parts.append(reasoning)
        tool_calls = delta.tool_calls
        if tool_calls:
            self._merge_tool_calls(tool_calls)
        self.num_tokens += delta.num_tokens
        token_ids = delta.token_ids
        if token_ids:
            self.token_ids.extend(token_ids)
        logprobs = delta.logprobs
        if logprobs:
            self.logprobs.extend(_copy_logprobs(logprobs))
        finish_reason = delta.finish_reason
        if finish_reason:
            self.finish_reason = _FINISH_REASONS.get(finish_reason, "stop")
            stopped_by = delta.WhichOneof("stopped_by")
            if stopped_by is not None:
                self.stop_reason = getattr(delta, stopped_by)

    def _merge_tool_calls(self, pieces: Iterable[inference_pb2.ToolCallDelta]) -> None:
        """Pieces of one call grow together, as its text does."""
        calls = self.tool_calls
        for piece in pieces:
            if calls and calls[-1].index == piece.index and not piece.name:
                calls[-1].arguments += piece.arguments
                calls[-1].complete |= piece.complete
            else:
                calls.append(ToolCallPiece(piece.index, piece.id, piece.name, piece.arguments, piece.complete))


def _copy_logprobs(entries: Iterable[inference_pb2.TokenLogprob]) -> list[TokenLogprob]:
    return [
        TokenLogprob(
            entry.token,
            entry.logprob,
            tuple(TopLogprob(top.token, top.logprob, top.token_id) for top in entry.top),
            entry.token_id,
            entry.rank,
        )
        for entry in entries
    ]


@dataclass(slots=True)
class UsageTotals:
    """Over all prompts of an HTTP request."""

    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    num_cached_tokens: int = 0
    num_reasoning_tokens: int = 0


class Mailbox:
    """One HTTP request's incoming side: `num_prompts` requests of the session with `num_samples` sequences each.

    Everything runs on one event loop; there is one taker. A streaming one sets `on_news` and takes what it is told of.
    """

    def __init__(self, num_prompts: int, num_samples: int, *, stream: bool) -> None:
        self._num_samples = num_samples
        # A whole answer is taken once, at the end: waking the taker for every step would be for nothing.
        self._stream = stream
        self._updates: dict[int, SequenceUpdate] = {}
        # Text of a stream's first sequence with which nothing else has come: what most messages bring.
        self._text = ""
        # What comes before it: a text that waits long is not copied with each token that it grows by.
        self._text_parts: list[str] = []
        self._num_text_tokens = 0
        self._accepted: list[inference_pb2.Accepted | None] = [None] * num_prompts
        self._num_unaccepted = num_prompts
        self._num_running = num_prompts
        self._waiter: asyncio.Future[None] | None = None
        self._error: ApiError | None = None
        # Called instead of waking a taker: a stream's own way of being told.
        self.on_news: Callable[[], None] | None = None
        self.disconnected = False
        self.usage = UsageTotals()
        # Filled before a prompt's first update comes, where something of the prompts was asked for.
        self.prompts: list[PromptOutput | None] = [None] * num_prompts

    @property
    def ended(self) -> bool:
        """Nothing more comes."""
        return self._num_running == 0 or self._error is not None or self.disconnected

    @property
    def error(self) -> ApiError | None:
        return self._error

    def put_text(self, prompt: int, text: str, num_tokens: int) -> None:
        """A delta of the prompt's first sequence that is text and nothing else."""
        if self._stream and not prompt and not self._updates:
            self._text += text
            self._num_text_tokens += num_tokens
            if len(self._text) > _PART_CHARS:
                self._text_parts.append(self._text)
                self._text = ""
            self._wake()
            return
        update = self._first_update(prompt)
        update.text_parts.append(text)
        update.num_tokens += num_tokens
        if self._stream:
            self._wake()

    def put_token_ids(self, prompt: int, text: str, token_ids: list[int]) -> None:
        """A delta of the prompt's first sequence that is tokens, with or without text, and nothing else."""
        update = self._first_update(prompt)
        if text:
            update.text_parts.append(text)
        update.token_ids += token_ids
        update.num_tokens += len(token_ids)
        if self._stream:
            self._wake()

    def _first_update(self, prompt: int) -> SequenceUpdate:
        if self._num_text_tokens:
            self._fold_text()
        index = prompt * self._num_samples
        update = self._updates.get(index)
        if update is None:
            update = self._updates[index] = SequenceUpdate(index)
        return update

    def put(self, prompt: int, response: inference_pb2.GenerateResponse) -> bool:
        """Take one message of the prompt's request in; True if it was that request's last one. Errors go to `fail`."""
        updates = self._updates
        if self._num_text_tokens:
            self._fold_text()
        for delta in response.deltas:
            index = prompt * self._num_samples + delta.index
            update = updates.get(index)
            if update is None:
                update = updates[index] = SequenceUpdate(index)
            update.merge(delta)
        if response.HasField("prompt"):
            output = response.prompt
            self.prompts[prompt] = PromptOutput(output.text, list(output.token_ids), _copy_logprobs(output.logprobs))
        if response.HasField("accepted"):
            accepted = inference_pb2.Accepted()
            accepted.CopyFrom(response.accepted)
            if self._accepted[prompt] is None:
                self._num_unaccepted -= 1
            self._accepted[prompt] = accepted
            if self._num_unaccepted == 0:
                self._wake()
        last = response.HasField("usage")
        if last:
            usage = response.usage
            self.usage.num_prompt_tokens += usage.num_prompt_tokens
            self.usage.num_completion_tokens += usage.num_completion_tokens
            self.usage.num_cached_tokens += usage.num_cached_tokens
            self.usage.num_reasoning_tokens += usage.num_reasoning_tokens
            self._num_running -= 1
        if self._stream or self.ended:
            self._wake()
        return last

    def fail(self, error: ApiError) -> None:
        """End the request with an error; the first one counts."""
        if self._error is None:
            self._error = error
        self._wake()

    def disconnect(self) -> None:
        """The client is gone: nobody will read."""
        self.disconnected = True
        self.take_text()
        self._updates.clear()
        self._wake()

    async def accepted(self) -> Sequence[inference_pb2.Accepted]:
        """Wait until every prompt is accepted. Raises the `ApiError` that refused one; empty if the client left."""
        while self._num_unaccepted and self._error is None and not self.disconnected:
            await self._wait()
        if self.disconnected:
            return ()
        if self._error is not None:
            raise self._error
        return [accepted for accepted in self._accepted if accepted is not None]

    def _fold_text(self) -> None:
        """Something else is to be said beside the text: it becomes an update, the first."""
        text, num_tokens = self.take_text()
        self._updates[0] = SequenceUpdate(0, [text], num_tokens)

    def take_text(self) -> tuple[str, int]:
        """(text, tokens) of the first sequence, if that is all that has come since the last call; else ("", 0)."""
        text, num_tokens = self._text, self._num_text_tokens
        self._text, self._num_text_tokens = "", 0
        if self._text_parts:
            text = "".join(self._text_parts) + text
            self._text_parts.clear()
        return text, num_tokens

    def take_updates(self) -> list[SequenceUpdate]:
        """All updates since the last call."""
        if self._num_text_tokens:
            self._fold_text()
        updates = list(self._updates.values())
        self._updates.clear()
        return updates

    async def take_all(self) -> list[SequenceUpdate]:
        """Wait for the end; one update a sequence, in order. Raises the `ApiError` that ended the request."""
        while not self.ended:
            await self._wait()
        if self._error is not None:
            raise self._error
        return [self._updates[index] for index in sorted(self._updates)]

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self.on_news is not None:
            self.on_news()
            return
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
