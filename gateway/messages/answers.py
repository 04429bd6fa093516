"""Answers of /v1/messages: whole, and as Anthropic's typed events.

A stream is message_start, then per block content_block_start, deltas, content_block_stop, then message_delta with the
stop reason and message_stop (https://docs.anthropic.com/en/api/messages-streaming).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson

from gateway.errors import ApiError
from gateway.mailbox import SequenceUpdate, ToolCallPiece, UsageTotals
from gateway.messages.errors import message_error
from gateway.sse import StreamShape

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_NO_SIGNATURE = ""


def stop_reason(update: SequenceUpdate) -> tuple[str, str | None]:
    """The reason, and the stop sequence where one was met."""
    if isinstance(update.stop_reason, str):
        return "stop_sequence", update.stop_reason
    return _STOP_REASONS.get(update.finish_reason or "stop", "end_turn"), None


def usage_object(usage: UsageTotals) -> dict[str, Any]:
    """Anthropic counts cached tokens beside the others, not among them."""
    return {
        "input_tokens": usage.num_prompt_tokens - usage.num_cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.num_cached_tokens,
        "output_tokens": usage.num_completion_tokens,
    }


def whole_message(shape: StreamShape, update: SequenceUpdate, usage: UsageTotals) -> bytes:
    """The JSON of a message. A call that was cut off is left out: its input is no JSON."""
    content: list[dict[str, Any]] = []
    if update.reasoning_parts:
        content.append({"type": "thinking", "thinking": update.reasoning, "signature": _NO_SIGNATURE})
    if update.text_parts:
        content.append({"type": "text", "text": update.text})
    for call in update.tool_calls:
        if call.complete:
            arguments = orjson.loads(call.arguments or "{}")
            content.append({"type": "tool_use", "id": call.id, "name": call.name, "input": arguments})
    reason, sequence = stop_reason(update)
    return orjson.dumps(_message(shape, content, reason, sequence, usage_object(usage)))


def _message(
    shape: StreamShape,
    content: list[dict[str, Any]],
    reason: str | None,
    sequence: str | None,
    usage: dict[str, Any],
) -> dict[str, Any]:
    return {
        "id": shape.id,
        "type": "message",
        "role": "assistant",
        "model": shape.model,
        "content": content,
        "stop_reason": reason,
        "stop_sequence": sequence,
        "usage": usage,
    }


class MessageEvents:
    """Renders updates as events; the same interface as the chunks of OpenAI's streams."""

    def __init__(self, shape: StreamShape) -> None:
        self._shape = shape
        self._has_started = False
        self._index = -1
        # What the open block is: "text", "thinking", or the index of a call.
        self._open: str | int | None = None
        self._reason: tuple[str, str | None] = ("end_turn", None)
        self.num_events = 0

    def render(self, updates: Iterable[SequenceUpdate]) -> bytes:
        events: list[bytes] = []
        for update in updates:
            self._start(events)
            if update.reasoning_parts:
                self._switch("thinking", {"type": "thinking", "thinking": "", "signature": _NO_SIGNATURE}, events)
                self._delta({"type": "thinking_delta", "thinking": update.reasoning}, events)
            if update.text_parts:
                self._switch("text", {"type": "text", "text": ""}, events)
                self._delta({"type": "text_delta", "text": update.text}, events)
            for piece in update.tool_calls:
                self._call(piece, events)
            if update.finish_reason is not None:
                self._reason = stop_reason(update)
        return b"".join(events)

    def end(self, usage: UsageTotals) -> bytes:
        events: list[bytes] = []
        self._start(events)
        self._close(events)
        reason, sequence = self._reason
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        self._event("message_delta", {"delta": delta, "usage": usage_object(usage)}, events)
        self._event("message_stop", {}, events)
        return b"".join(events)

    def fail(self, error: ApiError) -> bytes:
        self.num_events += 1
        return b"event: error\ndata: " + orjson.dumps(message_error(error)) + b"\n\n"

    def render_text(self, text: str, num_tokens: int) -> bytes:
        return self.render((SequenceUpdate(0, [text], num_tokens),))

    async def settle(self) -> None:
        """Nothing is kept of these."""

    def _start(self, events: list[bytes]) -> None:
        if not self._has_started:
            self._has_started = True
            usage = {"input_tokens": self._shape.num_prompt_tokens, "output_tokens": 0}
            self._event("message_start", {"message": _message(self._shape, [], None, None, usage)}, events)

    def _call(self, piece: ToolCallPiece, events: list[bytes]) -> None:
        self._switch(piece.index, {"type": "tool_use", "id": piece.id, "name": piece.name, "input": {}}, events)
        if piece.arguments:
            self._delta({"type": "input_json_delta", "partial_json": piece.arguments}, events)

    def _switch(self, kind: str | int, block: dict[str, Any], events: list[bytes]) -> None:
        """Open a block of this kind, unless the open one is it."""
        if self._open == kind:
            return
        self._close(events)
        self._open = kind
        self._index += 1
        self._event("content_block_start", {"index": self._index, "content_block": block}, events)

    def _close(self, events: list[bytes]) -> None:
        if self._open is not None:
            self._open = None
            self._event("content_block_stop", {"index": self._index}, events)

    def _delta(self, delta: dict[str, Any], events: list[bytes]) -> None:
        self._event("content_block_delta", {"index": self._index, "delta": delta}, events)

    def _event(self, name: str, fields: dict[str, Any], events: list[bytes]) -> None:
        self.num_events += 1
        data = orjson.dumps({"type": name, **fields})
        events.append(b"event: " + name.encode() + b"\ndata: " + data + b"\n\n")
