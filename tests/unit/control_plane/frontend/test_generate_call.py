"""Generate on the real gRPC server over a scripted core: what a call's client sees."""

from __future__ import annotations

import grpc
import grpc.aio
import pytest
from stepwire.v1 import inference_pb2 as pb

from control_plane.core.request import AdmissionError, FinishReason, RequestFault
from control_plane.frontend.served_model import ServedModel
from tests.unit.control_plane.frontend.running_server import (
    details_of,
    error_of,
    ids,
    serving,
    token_request,
    until,
)
from tests.unit.control_plane.frontend.scripted_engine import ScriptedEngine


async def test_generate(model: ServedModel) -> None:
    async with serving(model) as running:
        call = running.stub.Generate(token_request())
        accepted = (await call.read()).accepted
        assert accepted.request_id == await running.request_id() and accepted.model == "tiny"
        running.engine.output(ids("hello"))
        assert (await call.read()).deltas[0].text == "hello"
        running.engine.output([], finish=FinishReason.STOP, stop_token_id=2)
        running.engine.end(num_cached=1)
        last = await call.read()
        assert last.deltas[0].finish_reason == pb.FINISH_REASON_STOP and last.usage.num_cached_tokens == 1
        assert await call.read() is grpc.aio.EOF
        assert await call.code() == grpc.StatusCode.OK


async def test_a_refused_request_has_a_status_with_details(model: ServedModel) -> None:
    async with serving(model) as running:
        call = running.stub.Generate(token_request(sampling=pb.SamplingParams(top_p=3)))
        details = await details_of(call)
        assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT
        [violation] = details["BadRequest"].field_violations
        assert violation.field == "sampling.top_p" and "not 3" in violation.description
        assert details["ErrorInfo"].reason == "invalid_request"

        call = running.stub.Generate(token_request(model="other"))
        assert (await details_of(call))["ErrorInfo"].reason == "model_not_found"
        assert await call.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (
            AdmissionError("queue_full", "the queue is full", code="RESOURCE_EXHAUSTED", retry_after_s=2.5),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
        ),
        (
            AdmissionError("draining", "shutting down", code="UNAVAILABLE", retry_after_s=2.5),
            grpc.StatusCode.UNAVAILABLE,
        ),
    ],
)
async def test_refusals_of_the_core_say_when_to_retry(
    model: ServedModel, error: AdmissionError, code: grpc.StatusCode
) -> None:
    async with serving(model, engine=ScriptedEngine(refusal=error)) as running:
        call = running.stub.Generate(token_request())
        details = await details_of(call)
        assert await call.code() == code
        assert details["ErrorInfo"].reason == error.reason
        assert details["RetryInfo"].retry_delay.ToMilliseconds() == 2500

        session = running.stub.Session()
        await session.write(pb.SessionRequest(tag=1, generate=pb.SessionGenerate(request=token_request())))
        refused = (await session.read()).responses[0].response.error
        assert (refused.reason, refused.retryable, refused.retry_after.ToMilliseconds()) == (error.reason, True, 2500)


async def test_the_core_names_the_input_that_was_sent(model: ServedModel) -> None:
    error = AdmissionError("context_length_exceeded", "too long", code="INVALID_ARGUMENT", field="input")
    async with serving(model, engine=ScriptedEngine(refusal=error)) as running:
        details = await details_of(running.stub.Generate(pb.GenerateRequest(text="hi")))
        assert details["BadRequest"].field_violations[0].field == "text"


async def test_without_a_worker_every_call_is_unavailable(model: ServedModel) -> None:
    engine = ScriptedEngine(
        AdmissionError("no_worker", "no worker is ready yet", code="UNAVAILABLE", retry_after_s=2.0)
    )
    async with serving(model, engine=engine) as running:
        for call in (
            running.stub.Generate(token_request()),
            running.stub.ListModels(pb.ListModelsRequest()),
            running.stub.Tokenize(pb.TokenizeRequest(text="x")),
        ):
            assert (await error_of(call)).code() == grpc.StatusCode.UNAVAILABLE


async def test_a_fault_after_acceptance_ends_the_stream_with_an_error_message(model: ServedModel) -> None:
    async with serving(model) as running:
        call = running.stub.Generate(token_request())
        await call.read()
        await running.request_id()
        running.engine.end(fault=RequestFault("INTERNAL", "row failed", retryable=False))
        error = (await call.read()).error
        assert (error.code, error.message, error.retryable) == (13, "row failed", False)
        assert await call.read() is grpc.aio.EOF
        assert await call.code() == grpc.StatusCode.OK


async def test_cancelling_the_call_cancels_the_request(model: ServedModel) -> None:
    async with serving(model) as running:
        call = running.stub.Generate(token_request())
        await call.read()
        request_id = await running.request_id()
        call.cancel()
        await until(lambda: running.engine.cancelled == [request_id])


async def test_the_calls_deadline_is_the_requests(model: ServedModel) -> None:
    async with serving(model) as running:
        call = running.stub.Generate(token_request(), timeout=1.5)
        await call.read()
        request_id = await running.request_id()
        assert (await error_of(call)).code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: running.engine.cancelled == [request_id])
