"""One sequence of a request: its way from ids to text, and what waits to be sent."""

from __future__ import annotations

import uuid
from collections.abc import Callable

from stepwire.v1 import inference_pb2 as pb

from control_plane.core.request import FinishReason, SequenceOutput, TokenLogprobs
from control_plane.frontend.detokenizer import Detokenization, Detokenizer
from control_plane.frontend.parsers.scanner import IncrementalParser
from control_plane.frontend.prompt_output import add_top
from control_plane.frontend.request_builder import OutputPlan
from control_plane.frontend.stop import StopMatch, StopMatcher

_FINISH_REASON = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


class SequenceStream:
    __slots__ = (
        "calls",
        "detokenizer",
        "finish_reason",
        "has_called",
        "has_ended",
        "has_news",
        "last_taken_s",
        "logprobs",
        "matcher",
        "num_new",
        "num_tokens",
        "parser",
        "reasoning",
        "stop_string",
        "stop_token_id",
        "texts",
        "token_ids",
    )

    def __init__(
        self, detokenizer: Detokenizer | None, matcher: StopMatcher | None, parser: IncrementalParser | None = None
    ) -> None:
        self.detokenizer = detokenizer
        self.matcher = matcher
        # Tells tool calls and reasoning from text.
        self.parser = parser
        self.reasoning: list[str] = []
        self.calls: list[pb.ToolCallDelta] = []
        self.has_called = False
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        # (token id, its logprobs)
        self.logprobs: list[tuple[int, TokenLogprobs]] = []
        self.num_tokens = 0
        self.num_new = 0
        self.has_news = False
        self.has_ended = False
        self.finish_reason: FinishReason | None = None
        self.stop_string: str | None = None
        self.stop_token_id: int | None = None
        self.last_taken_s = 0.0

    @classmethod
    def start(cls, plan: OutputPlan, detokenization: Detokenization | None) -> SequenceStream:
        if detokenization is None or not plan.sends_text:
            return cls(None, None)
        matcher = None
        if plan.stop_strings is not None:
            matcher = StopMatcher(plan.stop_strings, include_stop_string=plan.include_stop_string)
        detokenizer = detokenization.start(skip_special_tokens=plan.skip_special_tokens)
        return cls(detokenizer, matcher, None if plan.start_parser is None else plan.start_parser())

    def push(self, output: SequenceOutput, plan: OutputPlan) -> bool:
        """Take an output in; whether there is any news. A stop string in it ends the sequence: the core has to hear."""
        self.num_new += output.num_tokens
        self.num_tokens += output.num_tokens
        finish_reason = output.finish_reason
        has_news = False
        if self.detokenizer is not None:
            text = self.detokenizer.push(output.token_ids)
            if finish_reason is not None:
                text += self.detokenizer.finish()
            if self.matcher is not None and self.num_tokens >= plan.min_tokens:
                text = self._match(self.matcher, text, finish_reason is not None)
            if self.parser is not None:
                is_last = finish_reason is not None or self.has_ended
                has_news = self._parse(self.parser, text, is_last, plan.omits_reasoning)
            elif text:
                self.texts.append(text)
                has_news = True
        if plan.sends_token_ids:
            self.token_ids += output.token_ids
            has_news = True
        if output.logprobs is not None:
            # The stop token that ended a sequence is not shown, and neither are its logprobs.
            self.logprobs += zip(output.token_ids, output.logprobs, strict=False)
            has_news = True
        if finish_reason is not None and not self.has_ended:
            self.has_ended = True
            self.finish_reason = finish_reason
            if output.stop_token_id in plan.extra_stop_token_ids:
                self.stop_token_id = output.stop_token_id
        self.has_news |= has_news or self.has_ended
        return has_news or self.has_ended

    def _match(self, matcher: StopMatcher, text: str, is_last: bool) -> str:
        """The text that may be shown; a stop string in it ends the sequence."""
        found = matcher.push(text)
        if isinstance(found, StopMatch):
            self.has_ended = True
            self.finish_reason = FinishReason.STOP
            self.stop_string = found.stop_string
            return found.text
        return found + matcher.finish() if is_last else found

    def _parse(self, parser: IncrementalParser, text: str, is_last: bool, omits_reasoning: bool) -> bool:
        """Sort the text into what is said, thought and called; whether there is any news."""
        deltas = [parser.push(text)] if text else []
        if is_last:
            deltas.append(parser.finish())
        has_news = False
        for delta in deltas:
            if delta.text:
                self.texts.append(delta.text)
            if delta.reasoning and not omits_reasoning:
                self.reasoning.append(delta.reasoning)
            for piece in delta.calls:
                call = pb.ToolCallDelta(index=piece.index, arguments=piece.arguments, complete=piece.complete)
                if piece.name:
                    call.name, call.id = piece.name, f"call_{uuid.uuid4().hex[:24]}"
                self.calls.append(call)
                self.has_called |= piece.complete
            has_news |= bool(delta.text or delta.reasoning or delta.calls)
        return has_news

    def take(self, delta: pb.SequenceDelta, token_bytes: Callable[[int], bytes]) -> int:
        """Move what waits into a delta; returns how many tokens it stands for."""
        self.has_news = False
        texts = self.texts
        if texts:
            delta.text = texts[0] if len(texts) == 1 else "".join(texts)
            texts.clear()
        if self.reasoning:
            delta.reasoning = "".join(self.reasoning)
            self.reasoning.clear()
        if self.calls:
            delta.tool_calls.extend(self.calls)
            self.calls.clear()
        if self.token_ids:
            delta.token_ids.extend(self.token_ids)
            self.token_ids.clear()
        if self.logprobs:
            for token_id, logprobs in self.logprobs:
                entry = delta.logprobs.add(token_id=token_id, logprob=logprobs.logprob, token=token_bytes(token_id))
                add_top(entry, logprobs.top_token_ids, logprobs.top_logprobs, token_bytes)
            self.logprobs.clear()
        if self.finish_reason is not None:
            self._take_finish(delta, self.finish_reason)
        num_new, self.num_new = self.num_new, 0
        if num_new:
            delta.num_tokens = num_new
        return num_new

    def _take_finish(self, delta: pb.SequenceDelta, finish_reason: FinishReason) -> None:
        delta.finish_reason = _FINISH_REASON[finish_reason]
        if self.has_called and finish_reason is FinishReason.STOP:
            delta.finish_reason = pb.FINISH_REASON_TOOL_CALLS
        if self.stop_string is not None:
            delta.stop_string = self.stop_string
        elif self.stop_token_id is not None:
            delta.stop_token_id = self.stop_token_id
