from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from stepwire.v1 import inference_pb2 as pb

from control_plane.core.request import FinishReason, ModelFacts, PromptLogprobs, RequestFault, TokenLogprobs
from control_plane.frontend.errors import deadline_exceeded
from control_plane.frontend.metrics import FrontendMetrics
from control_plane.frontend.output_stream import RequestOutput
from control_plane.frontend.request_intake import RequestIntake
from control_plane.frontend.served_model import ServedModel
from control_plane.frontend.tokenizer import TextTokenizer
from tests.unit.control_plane.frontend import tokenizers_for_tests as kinds
from tests.unit.control_plane.frontend.scripted_engine import FACTS, ScriptedEngine

EOS = 2


class Stream:
    """One request at a scripted engine, and everything that was fetched of it."""

    def __init__(
        self, request: pb.GenerateRequest, output: RequestOutput, engine: ScriptedEngine, metrics: FrontendMetrics
    ):
        self.request = request
        self.output = output
        self.engine = engine
        self.metrics = metrics
        self.now_s = 100.0

    def take(self) -> pb.GenerateResponse:
        response = pb.GenerateResponse()
        self.output.take(response, self.now_s)
        return response


@pytest.fixture
def ids() -> Callable[[str], list[int]]:
    return lambda text: kinds.byte_level().encode(text).ids


async def open_stream(
    request: pb.GenerateRequest, *, with_tokenizer: bool = True, facts: ModelFacts = FACTS
) -> tuple[Stream, list[RequestOutput]]:
    engine = ScriptedEngine(facts)
    tokenizer = TextTokenizer(kinds.byte_level()) if with_tokenizer else None
    model = ServedModel(names=("tiny",), tokenizer=tokenizer, eos_token_ids=frozenset({EOS}))
    metrics = FrontendMetrics(CollectorRegistry())
    ready: list[RequestOutput] = []
    if request.WhichOneof("input") is None:
        request.token_ids.ids.extend([5, 6, 7])
    output = await RequestIntake(engine, model, metrics).submit(request, ready.append)
    return Stream(request, output, engine, metrics), ready


async def test_accepted_comes_first_and_once() -> None:
    stream, ready = await open_stream(pb.GenerateRequest())
    assert ready == [stream.output]
    response = stream.take()
    assert response.accepted.request_id == stream.engine.only()
    assert (response.accepted.model, response.accepted.num_prompt_tokens) == ("tiny", 3)
    assert not response.deltas
    stream.engine.output([300])
    assert not stream.take().HasField("accepted")


async def test_what_came_between_two_writes_is_one_delta(ids: Callable[[str], list[int]]) -> None:
    stream, ready = await open_stream(pb.GenerateRequest())
    stream.take()
    tokens = ids("hello there")
    for token in tokens:
        stream.engine.output([token])
    assert len(ready) == 2, "ready once, until it is fetched"
    [delta] = stream.take().deltas
    assert delta.text == "hello there"
    assert delta.num_tokens == len(tokens)
    assert list(delta.token_ids) == []
    assert delta.finish_reason == pb.FINISH_REASON_UNSPECIFIED


async def test_the_end_carries_usage_and_closes(ids: Callable[[str], list[int]]) -> None:
    stream, _ = await open_stream(pb.GenerateRequest())
    stream.engine.output(ids("a"))
    stream.engine.output([], finish=FinishReason.STOP, stop_token_id=EOS)
    stream.engine.end(num_cached=2)
    response = stream.take()
    assert response.HasField("accepted")
    [delta] = response.deltas
    assert (delta.text, delta.finish_reason, delta.WhichOneof("stopped_by")) == ("a", pb.FINISH_REASON_STOP, None)
    assert response.usage == pb.Usage(num_prompt_tokens=3, num_completion_tokens=2, num_cached_tokens=2)
    assert stream.output.is_closed
    assert stream.engine.cancelled == []
    assert stream.metrics.requests == {("OK", "stop"): 1}
    assert stream.metrics.num_running_requests == 0


async def test_an_extra_stop_token_is_named() -> None:
    stream, _ = await open_stream(pb.GenerateRequest(stop=pb.StopConditions(stop_token_ids=[77])))
    stream.engine.output([], finish=FinishReason.STOP, stop_token_id=77)
    assert stream.take().deltas[0].stop_token_id == 77


async def test_a_stop_string_over_tokens_ends_the_sequence_at_the_core(ids: Callable[[str], list[int]]) -> None:
    stream, _ = await open_stream(pb.GenerateRequest(stop=pb.StopConditions(stop=["fox jumps"])))
    stream.take()
    deltas: list[pb.SequenceDelta] = []
    for token in ids("The quick brown fox jumps over"):
        stream.engine.output([token])
        if stream.engine.finished:
            break
        deltas += stream.take().deltas
    assert stream.engine.finished == [(stream.engine.only(), 0)]
    deltas += stream.take().deltas
    assert "".join(delta.text for delta in deltas) == "The quick brown "
    assert deltas[-1].finish_reason == pb.FINISH_REASON_STOP
    assert deltas[-1].stop_string == "fox jumps"
    # What the steps in flight still bring is not shown.
    stream.engine.output(ids("over"))
    stream.engine.end()
    response = stream.take()
    assert not response.deltas and response.HasField("usage")


async def test_a_stop_string_in_the_last_tokens(ids: Callable[[str], list[int]]) -> None:
    """The core ended the sequence by itself: it is not told to do so again."""
    stream, _ = await open_stream(pb.GenerateRequest(stop=pb.StopConditions(stop=["END"], include_stop_string=True)))
    stream.engine.output(ids("abc END"), finish=FinishReason.LENGTH)
    [delta] = stream.take().deltas
    assert (delta.text, delta.stop_string, delta.finish_reason) == ("abc END", "END", pb.FINISH_REASON_STOP)
    assert stream.engine.finished == []


async def test_held_back_text_comes_with_the_end(ids: Callable[[str], list[int]]) -> None:
    stream, ready = await open_stream(pb.GenerateRequest(stop=pb.StopConditions(stop=["abcdef"])))
    stream.take()
    ready.clear()
    stream.engine.output(ids("abc"))
    assert ready == [], "nothing to say yet"
    stream.engine.output(ids("🙂")[:1], finish=FinishReason.LENGTH)
    [delta] = stream.take().deltas
    assert delta.text == "abc\ufffd"
    assert delta.num_tokens == len(ids("abc")) + 1


async def test_what_might_have_become_a_stop_string_comes_with_the_end(ids: Callable[[str], list[int]]) -> None:
    stream, _ = await open_stream(pb.GenerateRequest(stop=pb.StopConditions(stop=["abcdef"])))
    stream.engine.output(ids("abc"))
    stream.engine.output([], finish=FinishReason.STOP, stop_token_id=EOS)
    [delta] = stream.take().deltas
    assert (delta.text, delta.stop_string) == ("abc", "")


async def test_min_tokens_keeps_stop_strings_from_stopping(ids: Callable[[str], list[int]]) -> None:
    tokens = ids("a a a a")
    stream, _ = await open_stream(pb.GenerateRequest(stop=pb.StopConditions(stop=["a"], min_tokens=len(tokens))))
    for token in tokens[:-1]:
        stream.engine.output([token])
    assert stream.engine.finished == []
    stream.engine.output(tokens[-1:])
    assert len(stream.engine.finished) == 1


async def test_logprobs_with_token_bytes(ids: Callable[[str], list[int]]) -> None:
    stream, _ = await open_stream(pb.GenerateRequest(output=pb.OutputOptions(logprobs=2, token_ids=True)))
    first, *_ = smile = ids("🙂")
    for token in smile:
        stream.engine.output([token], logprobs=[TokenLogprobs(-0.5, [token, 40], [-0.5, -1.5])])
    [delta] = stream.take().deltas
    assert delta.text == "🙂"
    assert list(delta.token_ids) == smile
    assert b"".join(entry.token for entry in delta.logprobs) == "🙂".encode()
    assert delta.logprobs[0].token_id == first and delta.logprobs[0].logprob == -0.5
    assert [(top.token_id, top.logprob) for top in delta.logprobs[0].top] == [(first, -0.5), (40, -1.5)]


async def test_sequences_are_kept_apart(ids: Callable[[str], list[int]]) -> None:
    stream, _ = await open_stream(pb.GenerateRequest(n=3))
    stream.engine.output(ids("two"), index=2, finish=FinishReason.LENGTH)
    stream.engine.output(ids("zero"), index=0)
    deltas = {delta.index: delta for delta in stream.take().deltas}
    assert {index: delta.text for index, delta in deltas.items()} == {0: "zero", 2: "two"}
    assert deltas[0].finish_reason == pb.FINISH_REASON_UNSPECIFIED
    assert deltas[2].finish_reason == pb.FINISH_REASON_LENGTH


async def test_token_ids_only_without_a_tokenizer() -> None:
    stream, _ = await open_stream(pb.GenerateRequest(), with_tokenizer=False)
    stream.engine.output([8])
    stream.engine.output([9])
    [delta] = stream.take().deltas
    assert (list(delta.token_ids), delta.text, delta.num_tokens) == ([8, 9], "", 2)


async def test_special_tokens_are_shown_if_asked_for(ids: Callable[[str], list[int]]) -> None:
    for shown, text in ((False, "user"), (True, "<|im_start|>user")):
        stream, _ = await open_stream(pb.GenerateRequest(output=pb.OutputOptions(special_tokens=shown)))
        stream.engine.output([1, *ids("user")])
        assert stream.take().deltas[0].text == text


async def test_a_fault_is_one_error_after_what_came_before(ids: Callable[[str], list[int]]) -> None:
    stream, _ = await open_stream(pb.GenerateRequest())
    stream.engine.output(ids("so far"))
    stream.engine.end(fault=RequestFault("UNAVAILABLE", "the worker is gone", retryable=True))
    response = stream.take()
    assert response.deltas[0].text == "so far"
    assert response.error.code == 14 and response.error.retryable and response.error.message == "the worker is gone"
    assert not response.HasField("usage")
    assert stream.output.is_closed
    assert stream.metrics.requests == {("UNAVAILABLE", ""): 1}


async def test_cancel_is_told_to_the_core_once() -> None:
    stream, ready = await open_stream(pb.GenerateRequest())
    request_id = stream.engine.only()
    stream.output.cancel()
    stream.output.cancel()
    assert stream.engine.cancelled == [request_id]
    assert stream.metrics.requests == {("CANCELLED", ""): 1}
    assert stream.metrics.num_running_requests == 0
    stream.output.on_end(0, None)
    assert len(ready) == 1


async def test_a_timeout_ends_the_request_here_and_at_the_core() -> None:
    stream, _ = await open_stream(pb.GenerateRequest())
    stream.output.fail(deadline_exceeded(1.5))
    assert len(stream.engine.cancelled) == 1
    error = stream.take().error
    assert error.code == 4 and "1.5 s" in error.message and error.reason == "deadline_exceeded"
    assert stream.output.is_closed


async def test_times_are_observed_a_token(ids: Callable[[str], list[int]]) -> None:
    stream, _ = await open_stream(pb.GenerateRequest())
    tokens = ids("quick")
    stream.engine.output(tokens[:1])
    stream.take()
    stream.now_s += 0.5
    for _ in range(4):
        stream.engine.output(tokens[:1])
    stream.take()
    samples = {
        sample.name: sample.value
        for sample in stream.metrics.inter_token_latency.collect().samples
        if not sample.labels
    }
    assert samples["stepwire_inter_token_latency_seconds_count"] == 4
    assert samples["stepwire_inter_token_latency_seconds_sum"] == pytest.approx(0.5)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
async def test_any_way_of_writing_gives_the_same_text(data: st.DataObject) -> None:
    """Steps and writes interleave anyhow; random tokens, with stop strings now and then."""
    tokens = data.draw(st.lists(st.integers(0, kinds.byte_level().get_vocab_size() - 1), min_size=1, max_size=25))
    writes = data.draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
    stops = data.draw(st.lists(st.sampled_from(["e", "th", "\ufffd", " a", "qu"]), max_size=2))
    stream, _ = await open_stream(pb.GenerateRequest(stop=pb.StopConditions(stop=stops)))
    deltas: list[pb.SequenceDelta] = []
    for position, (token, write) in enumerate(zip(tokens, writes, strict=True)):
        stream.engine.output([token], finish=FinishReason.LENGTH if position == len(tokens) - 1 else None)
        if write:
            deltas += stream.take().deltas
        if stream.engine.finished:
            break
    stream.engine.end()
    deltas += stream.take().deltas
    whole = kinds.byte_level().decode(tokens)
    ends = [end for end in range(len(whole) + 1) if any(whole[:end].endswith(stop) for stop in stops)]
    if ends:
        longest = max((stop for stop in stops if whole[: ends[0]].endswith(stop)), key=len)
        whole = whole[: ends[0] - len(longest)]
    assert "".join(delta.text for delta in deltas) == whole
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == [deltas[-1].finish_reason]
    assert FACTS.vocab_size >= kinds.byte_level().get_vocab_size()


def told(start: int, count: int) -> PromptLogprobs:
    values = np.arange(start, start + count, dtype=np.float32)
    top = np.stack([values, values + 1], axis=1)
    return PromptLogprobs(start, -values, values.astype(np.uint32), top.astype(np.uint32), -top)


async def test_nothing_is_said_before_the_whole_prompt_is_told_of() -> None:
    """Its logprobs come in parts, of the first sequence; the second may be ahead of it."""
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[5, 300, 301, 302]),
        n=2,
        output=pb.OutputOptions(prompt_logprobs=2, prompt_token_ids=True),
    )
    stream, ready = await open_stream(request, facts=replace(FACTS, can_prompt_logprobs=True))
    assert stream.take().HasField("accepted")
    ready.clear()
    engine = stream.engine
    engine.prompt_logprobs(told(1, 2))
    engine.output([310], index=1)
    assert not ready
    assert not stream.take().deltas
    engine.prompt_logprobs(told(3, 1))
    assert ready == [stream.output]
    engine.output([311], index=0)
    response = stream.take()
    assert list(response.prompt.token_ids) == [5, 300, 301, 302]
    assert [entry.token_id for entry in response.prompt.logprobs] == [5, 300, 301, 302]
    first, *others = response.prompt.logprobs
    assert math.isnan(first.logprob) and not first.top and first.rank == 0
    assert [entry.logprob for entry in others] == [-1, -2, -3]
    assert [entry.rank for entry in others] == [1, 2, 3]
    assert [[top.token_id for top in entry.top] for entry in others] == [[1, 2], [2, 3], [3, 4]]
    assert sorted(delta.index for delta in response.deltas) == [0, 1]
    engine.output([312], index=0)
    assert not stream.take().HasField("prompt")


async def test_a_prompt_of_one_token_is_told_of_at_once() -> None:
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[5]), output=pb.OutputOptions(prompt_logprobs=0), stop=pb.StopConditions(max_tokens=0)
    )
    stream, _ = await open_stream(request, facts=replace(FACTS, can_prompt_logprobs=True))
    response = stream.take()
    assert len(response.prompt.logprobs) == 1 and math.isnan(response.prompt.logprobs[0].logprob)
