"""Whole answers, for requests without `stream`. Fields that were not set are left out of the JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict
from stepwire.v1 import inference_pb2

from gateway.logprobs import CompletionLogprobs, chat_content
from gateway.mailbox import SequenceUpdate, UsageTotals
from gateway.sse import StreamShape, usage_object

FinishReason = Literal["stop", "length"]


class AnswerModel(BaseModel):
    model_config = ConfigDict(frozen=True, protected_namespaces=())


class PromptTokensDetails(AnswerModel):
    cached_tokens: int


class UsageObject(AnswerModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ChatAnswerMessage(AnswerModel):
    role: Literal["assistant"]
    content: str
    refusal: str | None


class _Choice(AnswerModel):
    index: int
    finish_reason: FinishReason
    # The stop string or stop token id that ended the text; null for the model's own end.
    stop_reason: str | int | None
    token_ids: list[int] | None = None


class ChatChoice(_Choice):
    message: ChatAnswerMessage
    logprobs: dict[str, Any] | None


class ChatCompletion(AnswerModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageObject
    prompt_token_ids: list[int] | None = None


class CompletionChoice(_Choice):
    text: str
    logprobs: dict[str, Any] | None
    prompt_token_ids: list[int] | None = None


class Completion(AnswerModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageObject


class ModelObject(AnswerModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "stepwire"
    root: str
    parent: str | None = None
    max_model_len: int


class ModelList(AnswerModel):
    object: Literal["list"] = "list"
    data: list[ModelObject]


class ErrorObject(AnswerModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(AnswerModel):
    error: ErrorObject


_Answer = TypeVar("_Answer", bound=AnswerModel)


def chat_completion(
    shape: StreamShape,
    updates: Sequence[SequenceUpdate],
    usage: UsageTotals,
    prompt_token_ids: Sequence[int] | None = None,
) -> bytes:
    """The JSON of a `chat.completion`; one update a choice, in order."""
    choices = [
        ChatChoice(
            message=ChatAnswerMessage(role="assistant", content=update.text, refusal=None),
            logprobs=None
            if shape.num_top_logprobs is None
            else {"content": chat_content(update.logprobs, shape.num_top_logprobs), "refusal": None},
            **_common(shape, update),
        )
        for update in updates
    ]
    extra = {} if prompt_token_ids is None else {"prompt_token_ids": list(prompt_token_ids)}
    return _json(
        ChatCompletion(
            id=shape.id,
            object="chat.completion",
            created=shape.created,
            model=shape.model,
            choices=choices,
            usage=_usage(usage),
            **extra,
        )
    )


def completion(
    shape: StreamShape,
    num_samples: int,
    updates: Sequence[SequenceUpdate],
    usage: UsageTotals,
    echoes: Sequence[str] | None = None,
    prompt_token_ids: Sequence[Sequence[int]] | None = None,
) -> bytes:
    """The JSON of a `text_completion`; one update a choice, in order; `echoes` and ids are per prompt."""
    choices = []
    for update in updates:
        prompt = update.index // num_samples
        extra: dict[str, Any] = {}
        if prompt_token_ids is not None:
            extra["prompt_token_ids"] = list(prompt_token_ids[prompt])
        choices.append(
            CompletionChoice(
                text=update.text if echoes is None else echoes[prompt] + update.text,
                logprobs=None
                if shape.num_top_logprobs is None
                else CompletionLogprobs(shape.num_top_logprobs).columns(update.logprobs),
                **_common(shape, update),
                **extra,
            )
        )
    return _json(
        Completion(
            id=shape.id,
            object="text_completion",
            created=shape.created,
            model=shape.model,
            choices=choices,
            usage=_usage(usage),
        )
    )


def model_object(model: inference_pb2.Model) -> ModelObject:
    return ModelObject(id=model.id, created=model.created, root=model.id, max_model_len=model.max_model_len)


def model_list(models: Sequence[inference_pb2.Model]) -> ModelList:
    return ModelList(data=[model_object(model) for model in models])


def _common(shape: StreamShape, update: SequenceUpdate) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "index": update.index,
        "finish_reason": update.finish_reason,
        "stop_reason": update.stop_reason,
    }
    # Ids come where they were asked for, and from a server without a tokenizer: then they are all there is.
    if shape.return_token_ids or update.token_ids:
        fields["token_ids"] = update.token_ids
    return fields


def _usage(usage: UsageTotals) -> UsageObject:
    return UsageObject.model_validate(usage_object(usage))


def _json(answer: _Answer) -> bytes:
    return answer.model_dump_json(exclude_unset=True).encode()
