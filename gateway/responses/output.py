"""From updates to a response object and its typed events: one state machine for both.

Order of events (OpenAI's): response.created, response.in_progress; per item output_item.added, then for text and
reasoning content_part.added, deltas, done, content_part.done, for a call its arguments' deltas and done, then
output_item.done; last response.completed or .incomplete, or .failed. `sequence_number` rises by one from 0. Where the
response is generated in the background, response.queued stands between the first two.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from typing import Any

import orjson

from gateway.errors import ApiError
from gateway.logprobs import chat_content
from gateway.mailbox import SequenceUpdate, ToolCallPiece, UsageTotals
from gateway.responses.schemas import ResponsesBody


def response_object(body: ResponsesBody, response_id: str, model: str, status: str) -> dict[str, Any]:
    """A response as it is before anything was generated."""
    dumped = body.model_dump(by_alias=True, exclude_none=True)
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "status": status,
        "model": model,
        "output": [],
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "store": body.store is not False,
        "background": bool(body.background),
        "temperature": body.temperature,
        "top_p": body.top_p,
        "text": dumped.get("text") or {"format": {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": [{"strict": None, "parameters": None, **tool} for tool in dumped.get("tools", ())],
        "top_logprobs": body.top_logprobs or 0,
        "truncation": body.truncation or "disabled",
        "usage": None,
    }


def usage_object(usage: UsageTotals) -> dict[str, Any]:
    return {
        "input_tokens": usage.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.num_cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.num_completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.num_reasoning_tokens},
        "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
    }


class ResponseOutput:
    """Takes updates in; `answer` is the response so far. Events are the way of a stream and may be thrown away."""

    def __init__(self, answer: dict[str, Any], num_top_logprobs: int | None) -> None:
        self.answer = answer
        self._num_top_logprobs = num_top_logprobs
        self._finish_reason: str | None = None
        self._item: dict[str, Any] | None = None
        self._call_index: int | None = None
        self._events: list[bytes] = []
        self.num_events = 0
        self._has_started = False

    # ---- as the events of a stream ----

    def queue(self) -> bytes:
        """Of a response that is generated later: first of all, and then `begin`."""
        self._has_started = True
        self._emit("response.created", response=self.answer)
        self._emit("response.queued", response=self.answer)
        return self._taken()

    def begin(self) -> bytes:
        self._has_started = True
        self.answer["status"] = "in_progress"
        self._emit("response.in_progress", response=self.answer)
        return self._taken()

    def render(self, updates: Iterable[SequenceUpdate]) -> bytes:
        self._start()
        for update in updates:
            self.feed(update)
        return self._taken()

    def end(self, usage: UsageTotals) -> bytes:
        self.finish(usage)
        return self._taken()

    def fail(self, error: ApiError) -> bytes:
        self.finish_failed(error)
        return self._taken()

    def _taken(self) -> bytes:
        events = b"".join(self._events)
        self._events.clear()
        return events

    # ---- the state ----

    def _start(self) -> None:
        if not self._has_started:
            self._has_started = True
            self._emit("response.created", response=self.answer)
            self._emit("response.in_progress", response=self.answer)

    def feed(self, update: SequenceUpdate) -> None:
        """Reasoning comes before text, and text before calls, within one update."""
        if update.reasoning_parts:
            self._reason(update.reasoning)
        if update.text_parts or update.logprobs:
            self._say(update)
        for piece in update.tool_calls:
            self._call(piece)
        if update.finish_reason is not None:
            self._finish_reason = update.finish_reason

    def finish(self, usage: UsageTotals) -> None:
        self._start()
        is_cut = self._finish_reason == "length"
        self._close("incomplete" if is_cut else "completed")
        self.answer["status"] = "incomplete" if is_cut else "completed"
        self.answer["usage"] = usage_object(usage)
        if is_cut:
            self.answer["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self.answer["completed_at"] = int(time.time())
        self._emit(f"response.{self.answer['status']}", response=self.answer)

    def finish_failed(self, error: ApiError) -> None:
        self._start()
        self._close("incomplete")
        self.answer["status"] = "failed"
        self.answer["error"] = {"code": error.code or "server_error", "message": error.message}
        self._emit("response.failed", response=self.answer)

    def _reason(self, text: str) -> None:
        item = self._item
        if item is None or item["type"] != "reasoning":
            item = self._open({"type": "reasoning", "id": _new_id("rs"), "summary": [], "content": []})
            self._open_part({"type": "reasoning_text", "text": ""})
        item["content"][0]["text"] += text
        self._emit("response.reasoning_text.delta", **self._where(), content_index=0, delta=text)

    def _say(self, update: SequenceUpdate) -> None:
        item = self._item
        if item is None or item["type"] != "message":
            item = self._open({"type": "message", "id": _new_id("msg"), "role": "assistant", "content": []})
            self._open_part({"type": "output_text", "text": "", "annotations": [], "logprobs": []})
        entries = [] if self._num_top_logprobs is None else chat_content(update.logprobs, self._num_top_logprobs)
        part = item["content"][0]
        part["text"] += update.text
        part["logprobs"] += entries
        self._emit("response.output_text.delta", **self._where(), content_index=0, delta=update.text, logprobs=entries)

    def _call(self, piece: ToolCallPiece) -> None:
        item = self._item
        if item is None or item["type"] != "function_call" or self._call_index != piece.index:
            new = {
                "type": "function_call",
                "id": _new_id("fc"),
                "call_id": piece.id,
                "name": piece.name,
                "arguments": "",
            }
            item = self._open(new)
            self._call_index = piece.index
        if piece.arguments:
            item["arguments"] += piece.arguments
            self._emit("response.function_call_arguments.delta", **self._where(), delta=piece.arguments)
        if piece.complete:
            self._close("completed")

    def _open(self, item: dict[str, Any]) -> dict[str, Any]:
        self._close("completed")
        item["status"] = "in_progress"
        self._item = item
        self.answer["output"].append(item)
        self._emit("response.output_item.added", output_index=self._output_index(), item=item)
        return item

    def _open_part(self, part: dict[str, Any]) -> None:
        self._emit("response.content_part.added", **self._where(), content_index=0, part=part)
        if self._item is not None:
            self._item["content"].append(part)

    def _close(self, status: str) -> None:
        item = self._item
        if item is None:
            return
        item["status"] = status
        if item["type"] == "function_call":
            self._emit(
                "response.function_call_arguments.done",
                **self._where(),
                name=item["name"],
                arguments=item["arguments"],
            )
        else:
            part = item["content"][0]
            if item["type"] == "message":
                self._emit(
                    "response.output_text.done",
                    **self._where(),
                    content_index=0,
                    text=part["text"],
                    logprobs=part["logprobs"],
                )
            else:
                self._emit("response.reasoning_text.done", **self._where(), content_index=0, text=part["text"])
            self._emit("response.content_part.done", **self._where(), content_index=0, part=part)
        self._emit("response.output_item.done", output_index=self._output_index(), item=item)
        self._item = None

    def _where(self) -> dict[str, Any]:
        return {"item_id": self._item["id"] if self._item else "", "output_index": self._output_index()}

    def _output_index(self) -> int:
        return len(self.answer["output"]) - 1

    def _emit(self, kind: str, **fields: Any) -> None:
        self._events.append(event_bytes(kind, self.num_events, **fields))
        self.num_events += 1


def event_bytes(kind: str, sequence_number: int, **fields: Any) -> bytes:
    """A typed event as it is sent; the only empty line in it is its last."""
    data = orjson.dumps({"type": kind, "sequence_number": sequence_number, **fields})
    return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
