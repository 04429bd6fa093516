"""OpenAI's bodies to GenerateRequests: pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from stepwire.v1 import inference_pb2

from gateway import field_names
from gateway.chat_input import content_texts, read_chat_input
from gateway.errors import ApiError, made_a_chat
from gateway.field_names import Names
from gateway.json_types import type_name
from gateway.schemas import MAX_STOP_STRINGS, ChatCompletionBody, CompletionBody, GenerationBody
from gateway.structured_output import read_structured_output
from gateway.unsupported import check_chat_fields, check_completion_fields

# OpenAI's default for /v1/completions.
DEFAULT_COMPLETION_TOKENS = 16
MAX_TOKEN_ID = 2**32 - 1

Prompt = str | list[int]


@dataclass(frozen=True, slots=True)
class GenerationPlan:
    """What an HTTP request asks of the control plane, and how its answer is to be written.

    There is one GenerateRequest a prompt; choice `prompt * num_samples + sample` belongs to sequence `sample` of it.
    """

    requests: list[inference_pb2.GenerateRequest]
    num_samples: int
    # As the client wrote it; empty for the served model.
    model: str
    stream: bool
    include_usage: bool
    continuous_usage: bool
    # None: no logprobs; k: the token's own and those of the k best.
    num_top_logprobs: int | None
    return_token_ids: bool
    # The prompt comes before the text, with its logprobs if the text's are sent.
    echo: bool = False
    # Text before every choice of a chat: the message that is continued.
    echo_text: str = ""
    # How many alternatives `prompt_logprobs` lists; None: it is not sent.
    num_prompt_logprobs: int | None = None
    # A named tool was called on order: OpenAI then says that the model stopped, not that it called a tool.
    is_named_tool: bool = False
    # What its body calls the fields of a GenerateRequest.
    names: Names = field(default_factory=dict)


def plan_chat(body: ChatCompletionBody, request_id: str, names: Names = field_names.CHAT) -> GenerationPlan:
    """Raises `ApiError` with the field named; `names`: of the body that was made a chat of, where one was."""
    with made_a_chat(names):
        return _plan_chat(body, request_id, names)


def _plan_chat(body: ChatCompletionBody, request_id: str, names: Names) -> GenerationPlan:
    check_chat_fields(body.model_extra)
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    num_top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    request, format_names = _generation(body, request_id, max_tokens, num_top_logprobs)
    request.chat.CopyFrom(read_chat_input(body))
    request.output.omit_reasoning = body.include_reasoning is False
    # A format that the body has under a name of its own stands in the chat's response_format.
    own_names = names if body.response_format is not None else {}
    chats_names = {"stop.max_tokens": "max_tokens"} if body.max_completion_tokens is None and body.max_tokens else {}
    names = {**names, **format_names, **own_names, **chats_names}
    echo_text = ""
    if body.echo and body.continue_final_message:
        echo_text = "\n".join(content_texts(len(body.messages) - 1, body.messages[-1]))
    is_named_tool = request.chat.tool_choice.WhichOneof("choice") == "function_name"
    return _plan(body, [request], num_top_logprobs, names, echo_text=echo_text, is_named_tool=is_named_tool)


def plan_completion(body: CompletionBody, request_id: str, max_prompts: int) -> GenerationPlan:
    """Raises `ApiError` with the field named; `max_prompts` is the longest batch of one HTTP request."""
    check_completion_fields(body.model_extra)
    prompts = read_prompts(body.prompt)
    if len(prompts) > max_prompts:
        raise ApiError(
            400, f"prompt: {len(prompts)} prompts in one request, at most {max_prompts} are taken.", param="prompt"
        )
    max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    requests = []
    shared, format_names = _generation(body, request_id, max_tokens, body.logprobs)
    names = {**field_names.COMPLETION, **format_names}
    if body.suffix:
        shared.suffix = body.suffix
    shared.no_special_tokens = body.add_special_tokens is False
    if body.echo:
        shared.output.prompt_text = True
        if body.logprobs is not None:
            shared.output.prompt_logprobs = max(body.logprobs, body.prompt_logprobs or 0)
            if body.prompt_logprobs is None:
                names["output.prompt_logprobs"] = "logprobs"
    for index, prompt in enumerate(prompts):
        request = inference_pb2.GenerateRequest()
        request.CopyFrom(shared)
        if len(prompts) > 1:
            request.request_id = f"{request_id}-{index}"
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.token_ids.ids.extend(prompt)
        requests.append(request)
    return _plan(body, requests, body.logprobs, names, echo=bool(body.echo))


def _plan(
    body: GenerationBody,
    requests: list[inference_pb2.GenerateRequest],
    num_top_logprobs: int | None,
    names: Names,
    *,
    echo: bool = False,
    echo_text: str = "",
    is_named_tool: bool = False,
) -> GenerationPlan:
    options = body.stream_options
    include_usage = bool(options and options.include_usage)
    return GenerationPlan(
        requests=requests,
        num_samples=body.n or 1,
        model=body.model or "",
        stream=bool(body.stream),
        include_usage=include_usage,
        continuous_usage=include_usage and bool(options and options.continuous_usage_stats),
        num_top_logprobs=num_top_logprobs,
        return_token_ids=bool(body.return_token_ids),
        echo=echo,
        echo_text=echo_text,
        num_prompt_logprobs=body.prompt_logprobs,
        is_named_tool=is_named_tool,
        names=names,
    )


def _generation(
    body: GenerationBody, request_id: str, max_tokens: int | None, num_top_logprobs: int | None
) -> tuple[inference_pb2.GenerateRequest, Names]:
    """Everything but the input, and what the fields of its format are called in this body."""
    structured_output, format_names = read_structured_output(body)
    request = inference_pb2.GenerateRequest(
        model=body.model or "",
        sampling=_set_fields(
            temperature=body.temperature,
            top_p=body.top_p,
            # -1 is vLLM's other spelling of "keep all".
            top_k=None if body.top_k is None else max(body.top_k, 0),
            min_p=body.min_p,
            repetition_penalty=body.repetition_penalty,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            seed=body.seed,
            logit_bias=read_logit_bias(body.logit_bias),
            allowed_token_ids=body.allowed_token_ids,
            bad_words=body.bad_words,
        ),
        stop=_set_fields(
            max_tokens=max_tokens,
            min_tokens=body.min_tokens,
            stop=read_stop(body.stop),
            stop_token_ids=body.stop_token_ids,
            ignore_eos=body.ignore_eos,
            include_stop_string=body.include_stop_str_in_output,
        ),
        n=body.n,
        output=_set_fields(
            logprobs=num_top_logprobs,
            token_ids=body.return_token_ids,
            special_tokens=None if body.skip_special_tokens is None else not body.skip_special_tokens,
            prompt_logprobs=body.prompt_logprobs,
            prompt_token_ids=body.return_token_ids,
        ),
        priority=body.priority or 0,
        cache_salt=body.cache_salt or "",
        request_id=request_id,
        structured_output=structured_output,
        truncate_prompt_tokens=body.truncate_prompt_tokens,
    )
    return request, format_names


def _set_fields(**fields: Any) -> dict[str, Any]:
    """For a constructor that makes a message of them: given one, it would write it out and read it again."""
    return {name: value for name, value in fields.items() if value is not None}


def read_stop(stop: Any) -> list[str] | None:
    """One string or several; an empty one is for the control plane to refuse."""
    if stop is None:
        return None
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list):
        raise ApiError(400, f"stop: must be a string or a list of strings, not {type_name(stop)}.", param="stop")
    if len(stops) > MAX_STOP_STRINGS:
        raise ApiError(400, f"stop: {len(stops)} strings, at most {MAX_STOP_STRINGS} are taken.", param="stop")
    for index, text in enumerate(stops):
        if not isinstance(text, str):
            param = f"stop[{index}]"
            raise ApiError(400, f"{param}: must be a string, not {type_name(text)}.", param=param)
    return stops


def read_logit_bias(bias: Mapping[str, float] | None) -> dict[int, float] | None:
    """Token ids from their decimal spelling; all keys that are none are named together."""
    if bias is None:
        return None
    wrong = [key for key in bias if not _is_token_id(key)]
    if wrong:
        listed = ", ".join(f"'{key[:40]}'" for key in wrong)
        raise ApiError(400, f"logit_bias: keys must be token ids; these are not: {listed}.", param="logit_bias")
    return {int(key): value for key, value in bias.items()}


def _is_token_id(key: str) -> bool:
    return key.isascii() and key.isdigit() and len(key) <= len(str(MAX_TOKEN_ID)) and int(key) <= MAX_TOKEN_ID


def read_prompts(prompt: Any, param: str = "prompt") -> list[Prompt]:
    """A text, token ids, or a list of either, as a list of prompts. Raises `ApiError` naming the wrong element."""
    if isinstance(prompt, str):
        return [_checked_text(param, prompt)]
    if prompt is None:
        raise ApiError(400, f"{param}: needed: a string, token ids, or a list of either.", param=param)
    if not isinstance(prompt, list):
        raise ApiError(
            400, f"{param}: must be a string, token ids, or a list of either, not {type_name(prompt)}.", param=param
        )
    if not prompt:
        raise ApiError(400, f"{param}: must not be empty.", param=param)
    first = prompt[0]
    if isinstance(first, str):
        return [_checked_text(f"{param}[{index}]", text) for index, text in enumerate(prompt)]
    if isinstance(first, list):
        return [_checked_ids(f"{param}[{index}]", ids) for index, ids in enumerate(prompt)]
    return [_checked_ids(param, prompt)]


def _checked_text(param: str, text: Any) -> str:
    if not isinstance(text, str):
        raise ApiError(400, f"{param}: must be a string like the prompt before it.", param=param)
    if not text:
        raise ApiError(400, f"{param}: must not be empty.", param=param)
    return text


def _checked_ids(param: str, ids: Any) -> list[int]:
    if not isinstance(ids, list):
        raise ApiError(400, f"{param}: must be a list of token ids like the prompt before it.", param=param)
    if not ids:
        raise ApiError(400, f"{param}: must not be empty.", param=param)
    # One pass in C for the usual case; the slow search below only finds out what to say.
    if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) <= MAX_TOKEN_ID:
        return cast("list[int]", ids)
    position, wrong = next(_wrong_ids(ids))
    where = f"{param}[{position}]"
    shown = str(wrong) if type(wrong) is int else type_name(wrong)
    raise ApiError(400, f"{where}: must be a token id (0 or above), not {shown[:40]}.", param=where)


def _wrong_ids(ids: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    return (
        (position, token_id)
        for position, token_id in enumerate(ids)
        if type(token_id) is not int or not 0 <= token_id <= MAX_TOKEN_ID
    )


def read_timeout(header: str | None) -> float | None:
    """The `x-request-timeout` header, in seconds."""
    if header is None:
        return None
    try:
        timeout_s = float(header)
    except ValueError:
        timeout_s = math.nan
    if not 0 < timeout_s <= 1e6:
        raise ApiError(
            400,
            "x-request-timeout: must be a number of seconds above 0 and at most 1000000.",
            param="x-request-timeout",
        )
    return timeout_s
