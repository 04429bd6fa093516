"""An EngineClient whose outputs the test decides, call by call; it checks that it is used as the interface says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from control_plane.core.request import (
    AdmissionError,
    CoreRequest,
    FinishReason,
    ModelFacts,
    OutputSink,
    PromptLogprobs,
    RequestFault,
    SequenceOutput,
    TokenLogprobs,
)

FACTS = ModelFacts(model="/models/tiny", max_model_len=100, vocab_size=1000, max_num_logprobs=20, can_mask_tokens=False)


@dataclass
class ScriptedEngine:
    facts_or_error: ModelFacts | AdmissionError = FACTS
    refusal: AdmissionError | None = None
    requests: dict[str, CoreRequest] = field(default_factory=dict)
    sinks: dict[str, OutputSink] = field(default_factory=dict)
    cancelled: list[str] = field(default_factory=list)
    finished: list[tuple[str, int]] = field(default_factory=list)

    @property
    def facts(self) -> ModelFacts:
        if isinstance(self.facts_or_error, AdmissionError):
            raise self.facts_or_error
        return self.facts_or_error

    def submit(self, request: CoreRequest, sink: OutputSink) -> None:
        if self.refusal is not None:
            raise self.refusal
        assert request.request_id not in self.requests, "request ids are unique"
        self.requests[request.request_id] = request
        self.sinks[request.request_id] = sink

    def cancel(self, request_id: str) -> None:
        if self.sinks.pop(request_id, None) is not None:
            self.cancelled.append(request_id)

    def finish_sequence(self, request_id: str, index: int) -> None:
        assert request_id in self.sinks
        self.finished.append((request_id, index))

    # ---- the script ----

    def only(self) -> str:
        [request_id] = self.sinks
        return request_id

    def output(
        self,
        token_ids: Sequence[int],
        *,
        request_id: str | None = None,
        index: int = 0,
        finish: FinishReason | None = None,
        stop_token_id: int | None = None,
        logprobs: list[TokenLogprobs] | None = None,
    ) -> None:
        num_tokens = len(token_ids) + (stop_token_id is not None)
        sink = self.sinks[request_id or self.only()]
        if finish is None and logprobs is None:
            for token_id in token_ids:
                sink.on_token(index, token_id)
            return
        sink.on_output(SequenceOutput(index, list(token_ids), num_tokens, logprobs, finish, stop_token_id))

    def prompt_logprobs(self, part: PromptLogprobs) -> None:
        self.sinks[self.only()].on_output(SequenceOutput(0, [], 0, prompt_logprobs=part))

    def end(self, *, request_id: str | None = None, num_cached: int = 0, fault: RequestFault | None = None) -> None:
        self.sinks.pop(request_id or self.only()).on_end(num_cached, fault)
