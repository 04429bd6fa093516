"""One request of a batch, answered as its own route answers it, below everything else."""

from __future__ import annotations

import uuid
from typing import TypeVar

import orjson
from pydantic import BaseModel

from gateway import answers
from gateway.batch_lines import BatchLine
from gateway.client import Generation
from gateway.convert import GenerationPlan, plan_chat, plan_completion
from gateway.embeddings import embed_request, embeddings_answer
from gateway.errors import ApiError
from gateway.field_names import RESPONSE
from gateway.pooling_schemas import EmbeddingsBody
from gateway.responses.convert import chat_body, input_items
from gateway.responses.output import ResponseOutput, response_object
from gateway.responses.schemas import ResponsesBody
from gateway.schemas import ChatCompletionBody, CompletionBody
from gateway.serving import Serving, stream_shape

# Where background work begins: it runs after everything else, whatever the server's policy.
BATCH_PRIORITY = 1_000_000
_Body = TypeVar("_Body", bound=BaseModel)


class BatchRequests:
    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def answer(self, line: BatchLine, request_id: str) -> bytes:
        """The answer's JSON. Raises `ApiError`."""
        match line.url:
            case "/v1/chat/completions":
                return await self._chat(self._read(ChatCompletionBody, line), request_id)
            case "/v1/completions":
                return await self._completion(self._read(CompletionBody, line), request_id)
            case "/v1/embeddings":
                body = self._read(EmbeddingsBody, line)
                call, names = embed_request(body, request_id)
                call.priority = BATCH_PRIORITY
                return embeddings_answer(await self._serving.client.embed(call, names, None), body)
            case _:
                return await self._response(self._read(ResponsesBody, line), request_id)

    async def _chat(self, body: ChatCompletionBody, request_id: str) -> bytes:
        plan = plan_chat(body, request_id)
        generation = self._start(plan)
        try:
            mailbox = generation.mailbox
            shape = stream_shape("chatcmpl", plan, await mailbox.accepted())
            return answers.chat_completion(shape, await mailbox.take_all(), mailbox.usage, mailbox.prompts)
        finally:
            generation.cancel()

    async def _completion(self, body: CompletionBody, request_id: str) -> bytes:
        plan = plan_completion(body, request_id, self._serving.max_batch_prompts)
        generation = self._start(plan)
        try:
            mailbox = generation.mailbox
            shape = stream_shape("cmpl", plan, await mailbox.accepted())
            updates = await mailbox.take_all()
            return answers.completion(shape, plan.num_samples, updates, mailbox.usage, mailbox.prompts)
        finally:
            generation.cancel()

    async def _response(self, body: ResponsesBody, request_id: str) -> bytes:
        """It is in the output file, and not stored besides."""
        for name in ("background", "previous_response_id"):
            if getattr(body, name):
                raise ApiError(400, f"{name}: not possible in a batch.", param=name)
        plan = plan_chat(chat_body(body, input_items(body)), request_id, RESPONSE)
        generation = self._start(plan)
        try:
            mailbox = generation.mailbox
            accepted = await mailbox.accepted()
            answer = response_object(body, f"resp_{uuid.uuid4().hex}", plan.model or accepted[0].model, "in_progress")
            output = ResponseOutput({**answer, "store": False}, plan.num_top_logprobs)
            output.feed((await mailbox.take_all())[0])
            output.finish(mailbox.usage)
            return orjson.dumps(output.answer)
        finally:
            generation.cancel()

    def _start(self, plan: GenerationPlan) -> Generation:
        for request in plan.requests:
            request.priority = BATCH_PRIORITY
        return self._serving.client.generate(
            plan.requests, num_samples=plan.num_samples, stream=False, names=plan.names
        )

    def _read(self, schema: type[_Body], line: BatchLine) -> _Body:
        return self._serving.parse_body(orjson.dumps(line.body), schema)
