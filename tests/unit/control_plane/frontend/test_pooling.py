"""Embed and Score above a scripted core: what is refused, what is asked of the core, and what ends with its caller."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from stepwire.v1 import inference_pb2 as pb
from tokenizers import Tokenizer, processors

from control_plane.core.request import (
    AdmissionError,
    CoreRequest,
    FinishReason,
    OutputSink,
    PoolingFacts,
    RequestFault,
    SequenceOutput,
)
from control_plane.frontend.errors import RequestRefused
from control_plane.frontend.metrics import FrontendMetrics
from control_plane.frontend.pooling import PoolingService
from control_plane.frontend.request_intake import RequestIntake
from control_plane.frontend.served_model import ServedModel
from control_plane.frontend.tokenizer import TextTokenizer
from tests.unit.control_plane.frontend.scripted_engine import FACTS, ScriptedEngine
from tests.unit.control_plane.frontend.tokenizers_for_tests import byte_level

EMBEDS = replace(FACTS, pooling=PoolingFacts(is_score=False, dimensions=3, only=True))
SCORES = replace(FACTS, pooling=PoolingFacts(is_score=True, dimensions=1, only=True))


class PoolingEngine(ScriptedEngine):
    """Answers by itself, a turn of the loop later: the vector is (number of tokens, first id, last id)."""

    most_open = 0
    fault: RequestFault | None = None
    holds = False

    def submit(self, request: CoreRequest, sink: OutputSink) -> None:
        super().submit(request, sink)
        self.most_open = max(self.most_open, len(self.sinks))
        assert request.pooling is not None and request.max_tokens == 1
        if not self.holds:
            asyncio.get_running_loop().call_soon(self._answer, request)

    def _answer(self, request: CoreRequest) -> None:
        sink = self.sinks.pop(request.request_id, None)
        if sink is None:
            return
        if self.fault is None:
            ids = request.prompt_ids
            vector = np.array([len(ids), ids[0], ids[-1]][: self.facts.pooling.dimensions], np.float32)  # type: ignore[union-attr]
            sink.on_output(SequenceOutput(0, [], 0, finish_reason=FinishReason.STOP, vector=vector))
        sink.on_end(0, self.fault)


def service(engine: ScriptedEngine) -> PoolingService:
    model = ServedModel(names=("m",), tokenizer=TextTokenizer(byte_level()))
    return PoolingService(RequestIntake(engine, model, FrontendMetrics(CollectorRegistry())))


def inputs(*token_ids: list[int]) -> list[pb.PooledInput]:
    return [pb.PooledInput(token_ids=pb.TokenIds(ids=ids)) for ids in token_ids]


async def test_vectors_come_in_the_order_of_the_inputs_a_few_at_a_time() -> None:
    engine = PoolingEngine(EMBEDS)
    answer = await service(engine).embed(pb.EmbedRequest(inputs=inputs(*([n + 1, 7] for n in range(300)))))
    assert [list(each.values) for each in answer.embeddings] == [[2, n + 1, 7] for n in range(300)]
    assert answer.num_prompt_tokens == 600 and answer.model == "m"
    assert engine.most_open <= 128 and not engine.sinks


async def test_a_score_is_the_models_or_a_cosine() -> None:
    pairs = [pb.TextPair(first="ab", second=second) for second in ("ab", "abcd")]
    answer = await service(PoolingEngine(SCORES)).score(pb.ScoreRequest(pairs=pairs))
    assert list(answer.scores) == [4, 6]  # numbers of tokens of both together
    engine = PoolingEngine(EMBEDS)
    answer = await service(engine).score(pb.ScoreRequest(pairs=pairs))
    assert answer.scores[0] == pytest.approx(1) and -1 <= answer.scores[1] < 1
    assert len(engine.requests) == 2 and answer.num_prompt_tokens == 6  # "ab" was embedded once


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.EmbedRequest(), "inputs"),
        (pb.EmbedRequest(inputs=inputs(*[[1]] * 2049)), "inputs"),
        (pb.EmbedRequest(inputs=[pb.PooledInput()]), "inputs[0]"),
        (pb.EmbedRequest(inputs=inputs([1], [])), "inputs[1].token_ids.ids"),
        (pb.EmbedRequest(inputs=inputs([1, 2000])), "inputs[0].token_ids.ids[1]"),
        (pb.EmbedRequest(inputs=[pb.PooledInput(text="")]), "inputs[0].text"),
        (pb.EmbedRequest(inputs=inputs([1]), dimensions=4), "dimensions"),
        (pb.EmbedRequest(inputs=inputs([1]), truncate_prompt_tokens=101), "truncate_prompt_tokens"),
        (pb.EmbedRequest(inputs=inputs([1]), truncate_prompt_tokens=0), "truncate_prompt_tokens"),
    ],
)
async def test_wrong_fields_are_named(request_: pb.EmbedRequest, field: str) -> None:
    engine = PoolingEngine(EMBEDS)
    with pytest.raises(RequestRefused) as refused:
        await service(engine).embed(request_)
    assert refused.value.code == "INVALID_ARGUMENT" and refused.value.violations[0].field == field
    assert not engine.requests


async def test_models_that_cannot_say_so() -> None:
    with pytest.raises(RequestRefused, match="generates text") as refused:
        await service(PoolingEngine(FACTS)).embed(pb.EmbedRequest(inputs=inputs([1])))
    assert refused.value.reason == "model_cannot_embed"
    with pytest.raises(RequestRefused, match="rates pairs"):
        await service(PoolingEngine(SCORES)).embed(pb.EmbedRequest(inputs=inputs([1])))
    with pytest.raises(RequestRefused, match="does not exist"):
        await service(PoolingEngine(EMBEDS)).embed(pb.EmbedRequest(model="other", inputs=inputs([1])))
    intake = RequestIntake(PoolingEngine(EMBEDS), ServedModel(), FrontendMetrics(CollectorRegistry()))
    with pytest.raises(RequestRefused) as generate:
        await intake.submit(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1])), lambda output: None)
    assert generate.value.reason == "model_cannot_generate"


async def test_a_refusal_of_the_core_names_the_input() -> None:
    refusal = AdmissionError("context_length_exceeded", "too long", code="INVALID_ARGUMENT", field="input")
    with pytest.raises(RequestRefused) as refused:
        await service(PoolingEngine(EMBEDS, refusal)).embed(pb.EmbedRequest(inputs=inputs([1])))
    assert refused.value.violations[0].field == "inputs[0].token_ids.ids"


async def test_a_fault_ends_the_call_and_its_other_requests() -> None:
    engine = PoolingEngine(EMBEDS)
    engine.fault = RequestFault("INTERNAL", "the row failed", retryable=False)
    with pytest.raises(RequestRefused, match="the row failed"):
        await service(engine).embed(pb.EmbedRequest(inputs=inputs(*[[1]] * 200)))
    assert not engine.sinks


async def test_nothing_runs_on_for_a_caller_that_left() -> None:
    engine = PoolingEngine(EMBEDS)
    engine.holds = True
    call = asyncio.create_task(service(engine).embed(pb.EmbedRequest(inputs=inputs(*[[1]] * 200))))
    while len(engine.sinks) < 128:
        await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert not engine.sinks and len(engine.cancelled) == 128


async def test_what_is_cut_keeps_its_end_mark() -> None:
    tokenizer = Tokenizer.from_str(byte_level().to_str())  # its marks are this test's own
    marks = [("<s>", 0), ("</s>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=marks
    )
    text = TextTokenizer(tokenizer)
    whole, _ = await text.encode_pooled("abcdef")
    cut, start = await text.encode_pooled("abcdef", max_tokens=4)
    assert cut.tolist() == [*whole[:3].tolist(), 1] and start == 0
    pair, start = await text.encode_pooled("ab", "cdef")
    assert pair[start - 1] == 1 and pair[-1] == 1
    cut, start = await text.encode_pooled("ab", "cdef", max_tokens=len(pair) - 2)
    assert cut.tolist() == [*pair[:-3].tolist(), 1]
