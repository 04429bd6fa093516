"""What decides how tokens are drawn is read alike by every route that generates."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from stepwire.v1 import inference_pb2

from gateway import field_names
from gateway.convert import plan_chat, plan_completion
from gateway.errors import ApiError
from gateway.messages import convert as messages
from gateway.messages.schemas import MessagesBody
from gateway.responses import convert as responses
from gateway.responses.schemas import ResponsesBody
from gateway.schemas import ChatCompletionBody, CompletionBody, DecodingFields

# Field -> (its value, where a GenerateRequest has it, what stands there).
FIELDS: dict[str, tuple[Any, str, Any]] = {
    "temperature": (0.5, "sampling.temperature", 0.5),
    "top_p": (0.5, "sampling.top_p", 0.5),
    "seed": (7, "sampling.seed", "7"),
    "presence_penalty": (1, "sampling.presence_penalty", 1),
    "frequency_penalty": (-1, "sampling.frequency_penalty", -1),
    "logit_bias": ({"5": 1.5}, "sampling.logit_bias", {"5": 1.5}),
    "top_k": (-1, "sampling.top_k", 0),
    "min_p": (0.5, "sampling.min_p", 0.5),
    "repetition_penalty": (1.5, "sampling.repetition_penalty", 1.5),
    "min_tokens": (2, "stop.min_tokens", 2),
    "ignore_eos": (True, "stop.ignore_eos", True),
    "stop_token_ids": ([5], "stop.stop_token_ids", [5]),
    "include_stop_str_in_output": (True, "stop.include_stop_string", True),
    "skip_special_tokens": (False, "output.special_tokens", True),
    "allowed_token_ids": ([5, 6], "sampling.allowed_token_ids", [5, 6]),
    "bad_words": (["bad"], "sampling.bad_words", ["bad"]),
    "truncate_prompt_tokens": (3, "truncate_prompt_tokens", 3),
    "structured_outputs": ({"regex": "a+"}, "structured_output.regex", "a+"),
    "priority": (-5, "priority", -5),
    "cache_salt": ("salt", "cache_salt", "salt"),
}


def chat(fields: dict[str, Any]) -> inference_pb2.GenerateRequest:
    body = ChatCompletionBody.model_validate({"messages": [{"role": "user", "content": "hi"}], **fields})
    return plan_chat(body, "id").requests[0]


def completion(fields: dict[str, Any]) -> inference_pb2.GenerateRequest:
    return plan_completion(CompletionBody.model_validate({"prompt": "hi", **fields}), "id", 8).requests[0]


def response(fields: dict[str, Any]) -> inference_pb2.GenerateRequest:
    body = ResponsesBody.model_validate({"input": "hi", **fields})
    chatted = responses.chat_body(body, responses.input_items(body))
    return plan_chat(chatted, "id", field_names.RESPONSE).requests[0]


def message(fields: dict[str, Any]) -> inference_pb2.GenerateRequest:
    body = MessagesBody.model_validate({"max_tokens": 4, "messages": [{"role": "user", "content": "hi"}], **fields})
    return plan_chat(messages.chat_body(body), "id", field_names.MESSAGE).requests[0]


@pytest.mark.parametrize("route", [chat, completion, response, message], ids=lambda route: route.__name__)
def test_every_route_takes_them(route: Any) -> None:
    assert {*FIELDS} == {*DecodingFields.model_fields}
    for name, (value, path, expected) in FIELDS.items():
        found: Any = MessageToDict(
            route({name: value}), preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        for part in path.split("."):
            found = found[part]
        assert found == expected, name


FORMAT = {"type": "json_schema", "name": "x", "schema": {"type": "object"}}


@pytest.mark.parametrize(
    ("route", "fields", "name"),
    [
        (chat, {"response_format": {"type": "json_object"}}, "response_format"),
        (completion, {"guided_regex": "a"}, "structured_outputs"),
        (response, {"text": {"format": FORMAT}}, "text.format"),
        (message, {"output_config": {"format": FORMAT}}, "output_config.format"),
    ],
    ids=["chat", "completion", "response", "message"],
)
def test_two_formats_are_refused_by_the_names_that_they_were_sent_under(
    route: Any, fields: dict[str, Any], name: str
) -> None:
    with pytest.raises(ApiError) as caught:
        route({"structured_outputs": {"regex": "a"}, **fields})
    assert caught.value.message.endswith(f": cannot be used together with {name}.")
    assert caught.value.param == caught.value.message.partition(":")[0]


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        (response, {"n": 2}),
        (response, {"max_tokens": 5}),
        (response, {"response_format": {"type": "json_object"}}),
        (response, {"guided_regex": "a"}),
        (response, {"reasoning_effort": "low"}),
        (response, {"use_beam_search": True}),
        (message, {"n": 2}),
        (message, {"stop": ["a"]}),
        (message, {"response_format": {"type": "json_object"}}),
        (message, {"logprobs": True}),
        (message, {"max_completion_tokens": 5}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_what_only_a_chat_has_is_refused_and_not_left_out(route: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        route(fields)
    assert (caught.value.status, [caught.value.param]) == (400, [*fields])


@pytest.mark.parametrize("route", [response, message], ids=lambda route: route.__name__)
def test_what_asks_for_nothing_is_taken(route: Any) -> None:
    fields = {
        "n": 1,
        "logprobs": False,
        "response_format": {"type": "text"},
        "guided_json": None,
        "user": "x",
        "odd": 3,
    }
    route(fields)
