"""Whole answers, for requests without `stream`. Fields that were not set are left out of the JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict
from stepwire.v1 import inference_pb2

from gateway.logprobs import CompletionLogprobs, chat_content, prompt_entries
from gateway.mailbox import PromptOutput, SequenceUpdate, UsageTotals
from gateway.sse import StreamShape, usage_object

FinishReason = Literal["stop", "length", "tool_calls"]


class AnswerModel(BaseModel):
    model_config = ConfigDict(frozen=True, protected_namespaces=())


class PromptTokensDetails(AnswerModel):
    cached_tokens: int


class CompletionTokensDetails(AnswerModel):
    reasoning_tokens: int


class UsageObject(AnswerModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class FunctionCallObject(AnswerModel):
    name: str
    # A JSON object as text.
    arguments: str


class ToolCallObject(AnswerModel):
    id: str
    type: Literal["function"]
    function: FunctionCallObject


class ChatAnswerMessage(AnswerModel):
    role: Literal["assistant"]
    # null where the answer is nothing but tool calls, or reasoning that was cut off.
    content: str | None
    refusal: str | None
    # The same text under both names in use.
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallObject] | None = None


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
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class CompletionChoice(_Choice):
    text: str
    logprobs: dict[str, Any] | None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None


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


class TokenizeAnswer(AnswerModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeAnswer(AnswerModel):
    prompt: str


class LoadAnswer(AnswerModel):
    # Requests being answered by this gateway now.
    server_load: int


class VersionAnswer(AnswerModel):
    version: str


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
    prompts: Sequence[PromptOutput | None] = (None,),
) -> bytes:
    """The JSON of a `chat.completion`; one update a choice, in order."""
    choices = [
        ChatChoice(
            message=_message(shape, update),
            logprobs=None
            if shape.num_top_logprobs is None
            else {"content": chat_content(update.logprobs, shape.num_top_logprobs), "refusal": None},
            **_common(shape, update),
        )
        for update in updates
    ]
    return _json(
        ChatCompletion(
            id=shape.id,
            object="chat.completion",
            created=shape.created,
            model=shape.model,
            choices=choices,
            usage=_usage(usage),
            **_of_prompt(shape, prompts[0]),
        )
    )


def _message(shape: StreamShape, update: SequenceUpdate) -> ChatAnswerMessage:
    """A call that was cut off is left out: its arguments are no JSON."""
    calls = [
        ToolCallObject(
            id=call.id, type="function", function=FunctionCallObject(name=call.name, arguments=call.arguments)
        )
        for call in update.tool_calls
        if call.complete
    ]
    text = shape.echo_text + update.text
    extra: dict[str, Any] = {}
    if update.reasoning_parts:
        extra["reasoning"] = extra["reasoning_content"] = update.reasoning
    if calls:
        extra["tool_calls"] = calls
    has_other = bool(update.tool_calls or update.reasoning_parts)
    return ChatAnswerMessage(role="assistant", content=text or (None if has_other else ""), refusal=None, **extra)


def completion(
    shape: StreamShape,
    num_samples: int,
    updates: Sequence[SequenceUpdate],
    usage: UsageTotals,
    prompts: Sequence[PromptOutput | None] = (),
) -> bytes:
    """The JSON of a `text_completion`; one update a choice, in order."""
    choices = []
    for update in updates:
        prompt = prompts[update.index // num_samples] if prompts else None
        echo = prompt if shape.echo else None
        choices.append(
            CompletionChoice(
                text=update.text if echo is None else echo.text + update.text,
                logprobs=_completion_logprobs(shape, update, echo),
                **_common(shape, update),
                **_of_prompt(shape, prompt),
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


def _completion_logprobs(
    shape: StreamShape, update: SequenceUpdate, echo: PromptOutput | None
) -> dict[str, Any] | None:
    if shape.num_top_logprobs is None:
        return None
    columns = CompletionLogprobs(shape.num_top_logprobs)
    if echo is None:
        return columns.columns(update.logprobs)
    of_prompt, own = columns.echoed(echo.logprobs, echo.text), columns.columns(update.logprobs)
    return {name: [*of_prompt[name], *own[name]] for name in of_prompt}


def _of_prompt(shape: StreamShape, prompt: PromptOutput | None) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if prompt is not None and shape.return_token_ids:
        fields["prompt_token_ids"] = prompt.token_ids
    if prompt is not None and shape.num_prompt_logprobs is not None:
        fields["prompt_logprobs"] = prompt_entries(prompt.logprobs, shape.num_prompt_logprobs)
    return fields


def model_object(model: inference_pb2.Model) -> ModelObject:
    return ModelObject(id=model.id, created=model.created, root=model.id, max_model_len=model.max_model_len)


def model_list(models: Sequence[inference_pb2.Model]) -> ModelList:
    return ModelList(data=[model_object(model) for model in models])


def _common(shape: StreamShape, update: SequenceUpdate) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "index": update.index,
        "finish_reason": shape.finish_reason(update),
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
