"""OpenAI bodies become the GenerateRequests that the contract describes, and wrong ones name their field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gateway import errors
from gateway.convert import GenerationPlan, plan_chat, plan_completion, read_prompts, read_timeout
from gateway.errors import ApiError
from gateway.schemas import ChatCompletionBody, CompletionBody

MESSAGES = [{"role": "user", "content": "hi"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def chat(**fields: Any) -> GenerationPlan:
    body = {"model": "m", "messages": MESSAGES, **fields}
    try:
        return plan_chat(ChatCompletionBody.model_validate_json(json.dumps(body)), "req-1")
    except ValidationError as error:
        raise errors.from_validation_error(error) from error


def complete(max_prompts: int = 8, **fields: Any) -> GenerationPlan:
    body = {"model": "m", "prompt": "hi", **fields}
    try:
        return plan_completion(CompletionBody.model_validate_json(json.dumps(body)), "req-1", max_prompts)
    except ValidationError as error:
        raise errors.from_validation_error(error) from error


def only_request(plan: GenerationPlan) -> dict[str, Any]:
    (request,) = plan.requests
    return MessageToDict(request, preserving_proto_field_name=True)


def test_a_bare_chat_leaves_everything_to_the_model() -> None:
    assert only_request(chat()) == {
        "model": "m",
        "chat": {"messages": [{"role": "user", "content": [{"text": "hi"}]}]},
        "sampling": {},
        "stop": {},
        "output": {},
        "request_id": "req-1",
    }


def test_a_bare_completion_has_openais_16_tokens() -> None:
    assert only_request(complete(max_tokens=None)) == {
        "model": "m",
        "text": "hi",
        "sampling": {},
        "stop": {"max_tokens": 16},
        "output": {},
        "request_id": "req-1",
    }


@pytest.mark.parametrize(
    ("fields", "section", "expected"),
    [
        ({"temperature": 0}, "sampling", {"temperature": 0.0}),
        ({"temperature": 0.5, "top_p": 0.25}, "sampling", {"temperature": 0.5, "top_p": 0.25}),
        ({"top_k": 40}, "sampling", {"top_k": 40}),
        ({"top_k": -1}, "sampling", {"top_k": 0}),
        ({"min_p": 0.125}, "sampling", {"min_p": 0.125}),
        ({"repetition_penalty": 1.5}, "sampling", {"repetition_penalty": 1.5}),
        (
            {"presence_penalty": -1, "frequency_penalty": 2},
            "sampling",
            {"presence_penalty": -1.0, "frequency_penalty": 2.0},
        ),
        ({"seed": -(2**63)}, "sampling", {"seed": str(-(2**63))}),
        ({"logit_bias": {"7": -100, "0": 1.5}}, "sampling", {"logit_bias": {"7": -100.0, "0": 1.5}}),
        ({"allowed_token_ids": [3, 1]}, "sampling", {"allowed_token_ids": [3, 1]}),
        ({"max_tokens": 5}, "stop", {"max_tokens": 5}),
        ({"min_tokens": 3}, "stop", {"min_tokens": 3}),
        ({"stop": "END"}, "stop", {"stop": ["END"]}),
        ({"stop": ["a", "b"]}, "stop", {"stop": ["a", "b"]}),
        ({"stop_token_ids": [2]}, "stop", {"stop_token_ids": [2]}),
        ({"ignore_eos": True}, "stop", {"ignore_eos": True}),
        ({"include_stop_str_in_output": True}, "stop", {"include_stop_string": True}),
        ({"skip_special_tokens": False}, "output", {"special_tokens": True}),
        ({"skip_special_tokens": True}, "output", {}),
        ({"return_token_ids": True}, "output", {"token_ids": True, "prompt_token_ids": True}),
        ({"prompt_logprobs": 3}, "output", {"prompt_logprobs": 3}),
        ({"bad_words": ["a", " b"]}, "sampling", {"bad_words": ["a", " b"]}),
    ],
)
def test_shared_parameters(fields: dict[str, Any], section: str, expected: dict[str, Any]) -> None:
    assert only_request(chat(**fields))[section] == expected
    completion = only_request(complete(**{"max_tokens": None, **fields}))[section]
    if section == "stop":
        expected = {"max_tokens": 16, **expected}
    assert completion == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"max_completion_tokens": 7}, 7),
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 7, "max_tokens": 5}, 7),
    ],
)
def test_max_completion_tokens_wins(fields: dict[str, Any], expected: int) -> None:
    assert chat(**fields).requests[0].stop.max_tokens == expected


def test_numbers_keep_the_difference_between_zero_and_unset() -> None:
    request = chat(temperature=0, top_k=0, frequency_penalty=0, seed=0).requests[0]
    for name in ("temperature", "top_k", "frequency_penalty", "seed"):
        assert request.sampling.HasField(name), name
    assert not request.sampling.HasField("top_p")
    assert not chat().requests[0].HasField("n")


def test_top_level_parameters() -> None:
    request = chat(n=3, priority=-2, cache_salt="s").requests[0]
    assert (request.n, request.priority, request.cache_salt) == (3, -2, "s")


def test_content_parts_render_like_a_string_and_roles_are_free() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "critic", "content": parts, "name": "x"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": []},
    ]
    request = chat(messages=messages).requests[0]
    assert [part.text for part in request.chat.messages[0].content] == ["a", "b"]
    assert (request.chat.messages[0].role, request.chat.messages[0].name) == ("critic", "x")
    assert len(request.chat.messages[1].content) == 0


def test_a_refusal_is_what_the_assistant_said() -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "refusal": "I cannot."},
        {"role": "user", "content": "b"},
    ]
    said = chat(messages=messages).requests[0].chat.messages[1]
    assert [part.text for part in said.content] == ["I cannot."]


def test_continue_final_message() -> None:
    assert chat(continue_final_message=True, add_generation_prompt=False).requests[0].chat.continue_final_message
    assert not chat(add_generation_prompt=True).requests[0].chat.continue_final_message


@pytest.mark.parametrize(
    ("fields", "num_top", "in_request"),
    [
        ({}, None, None),
        ({"logprobs": False}, None, None),
        ({"logprobs": True}, 0, 0),
        ({"logprobs": True, "top_logprobs": 0}, 0, 0),
        ({"logprobs": True, "top_logprobs": 20}, 20, 20),
    ],
)
def test_chat_logprobs(fields: dict[str, Any], num_top: int | None, in_request: int | None) -> None:
    plan = chat(**fields)
    output = plan.requests[0].output
    assert plan.num_top_logprobs == num_top
    assert (output.logprobs if output.HasField("logprobs") else None) == in_request


def test_completion_logprobs() -> None:
    plan = complete(logprobs=5)
    assert (plan.num_top_logprobs, plan.requests[0].output.logprobs) == (5, 5)
    assert complete(logprobs=0).requests[0].output.HasField("logprobs")


@pytest.mark.parametrize(
    ("options", "usage", "continuous"),
    [
        (None, False, False),
        ({"include_usage": True}, True, False),
        ({"include_usage": False, "continuous_usage_stats": True}, False, False),
        ({"include_usage": True, "continuous_usage_stats": True}, True, True),
    ],
)
def test_stream_options(options: dict[str, Any] | None, usage: bool, continuous: bool) -> None:
    plan = chat(stream=True, stream_options=options)
    assert (plan.stream, plan.include_usage, plan.continuous_usage) == (True, usage, continuous)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ([0, 2**32 - 1], [[0, 2**32 - 1]]),
    ],
)
def test_forms_of_prompts(prompt: Any, expected: list[Any]) -> None:
    assert read_prompts(prompt) == expected
    plan = complete(prompt=prompt)
    sent = [
        request.text if request.WhichOneof("input") == "text" else list(request.token_ids.ids)
        for request in plan.requests
    ]
    assert sent == expected


@given(
    st.one_of(
        st.text(min_size=1),
        st.lists(st.text(min_size=1), min_size=1, max_size=5),
        st.lists(st.integers(0, 2**32 - 1), min_size=1),
        st.lists(st.lists(st.integers(0, 2**32 - 1), min_size=1), min_size=1, max_size=5),
    )
)
def test_every_legal_prompt_is_read(prompt: Any) -> None:
    prompts = read_prompts(prompt)
    assert prompts == ([prompt] if isinstance(prompt, str) or (isinstance(prompt[0], int)) else prompt)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=10,
)


@given(JSON_VALUES)
def test_any_other_prompt_is_refused_by_name(prompt: Any) -> None:
    try:
        prompts = read_prompts(prompt)
    except ApiError as error:
        assert error.status == 400
        assert error.param is not None and error.param.startswith("prompt")
    else:
        assert all(prompts) and all(
            isinstance(each, str) or all(type(token_id) is int for token_id in each) for each in prompts
        )


@given(JSON_VALUES, st.sampled_from(["messages", "stop", "logit_bias", "temperature", "n", "stream_options", "tools"]))
def test_no_value_of_a_field_is_more_than_a_400(value: Any, name: str) -> None:
    """Whatever a client sends is either taken or refused with a field named."""
    try:
        chat(**{name: value})
    except ApiError as error:
        assert error.status == 400
        assert error.param is not None and error.param.startswith(name)


def test_a_batch_numbers_its_request_ids() -> None:
    assert [request.request_id for request in complete(prompt=["a", "b"]).requests] == ["req-1-0", "req-1-1"]


@pytest.mark.parametrize(
    ("make", "fields", "param", "needle"),
    [
        (chat, {"messages": []}, "messages", "at least 1"),
        (chat, {"messages": "hi"}, "messages", "array"),
        (chat, {"messages": [{"content": "hi"}]}, "messages[0].role", "required"),
        (chat, {"messages": [{"role": "user"}]}, "messages[0].content", "needed"),
        (chat, {"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "a number"),
        (
            chat,
            {"messages": [*MESSAGES, {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[1].content[0].type",
            "image_url",
        ),
        (
            chat,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]},
            "messages[0].content[0].text",
            "string",
        ),
        (chat, {"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]", "object"),
        (
            chat,
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
            "messages[0].tool_calls[0].function",
            "required",
        ),
        (chat, {"temperature": "hot"}, "temperature", "number"),
        (chat, {"temperature": True}, "temperature", "number"),
        (chat, {"n": 0}, "n", "greater than or equal to 1"),
        (chat, {"n": 1.5}, "n", "integer"),
        (chat, {"seed": 2**63}, "seed", "less than or equal"),
        (chat, {"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        (chat, {"max_tokens": -5}, "max_tokens", "greater than or equal to 1"),
        (chat, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        (chat, {"top_logprobs": 3}, "top_logprobs", "logprobs is true"),
        (chat, {"logprobs": False, "top_logprobs": 1}, "top_logprobs", "logprobs is true"),
        (chat, {"stream_options": {"include_usage": True}}, "stream_options", "stream is true"),
        (chat, {"stream_options": {"include_usage": None}}, "stream_options", "stream is true"),
        (chat, {"stop": ["a"] * 17}, "stop", "at most 16"),
        (chat, {"stop": ["a", 1]}, "stop[1]", "a number"),
        (chat, {"stop": {"a": 1}}, "stop", "an object"),
        (chat, {"stop_token_ids": [-1]}, "stop_token_ids[0]", "greater than or equal to 0"),
        (chat, {"allowed_token_ids": ["a"]}, "allowed_token_ids[0]", "integer"),
        (chat, {"priority": 2**31}, "priority", "less than or equal"),
        (chat, {"top_k": -2}, "top_k", "greater than or equal to -1"),
        (chat, {"tools": []}, "tools", "at least 1"),
        (chat, {"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type", "function"),
        (chat, {"tool_choice": "auto"}, "tool_choice", "together with tools"),
        (chat, {"tool_choice": {}}, "tool_choice", "together with tools"),
        (chat, {"tools": TOOLS, "tool_choice": {}}, "tool_choice", "must be 'auto'"),
        (chat, {"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice", "maybe"),
        (
            chat,
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}},
            "tool_choice",
            "not the name of one of the tools",
        ),
        (chat, {"response_format": {"type": "json_schema"}}, "response_format.json_schema", "needed"),
        (chat, {"response_format": {"type": "yaml"}}, "response_format.type", "json_schema"),
        (chat, {"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
        (chat, {"guided_json": 3}, "guided_json", "JSON Schema"),
        (
            chat,
            {"guided_regex": "a", "response_format": {"type": "json_object"}},
            "guided_regex",
            "together with response_format",
        ),
        (chat, {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least 1"),
        (chat, {"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "-1"),
        (chat, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "stream"),
        (chat, {"prompt_logprobs": -2}, "prompt_logprobs", "0"),
        (chat, {"reasoning_effort": "huge"}, "reasoning_effort", "high"),
        (
            chat,
            {"add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
            "add_generation_prompt",
        ),
        (complete, {"prompt": ""}, "prompt", "empty"),
        (complete, {"prompt": []}, "prompt", "empty"),
        (complete, {"prompt": None}, "prompt", "needed"),
        (complete, {"prompt": 7}, "prompt", "a number"),
        (complete, {"prompt": ["a", ""]}, "prompt[1]", "empty"),
        (complete, {"prompt": ["a", 1]}, "prompt[1]", "string"),
        (complete, {"prompt": [[1], []]}, "prompt[1]", "empty"),
        (complete, {"prompt": [1, -1]}, "prompt[1]", "-1"),
        (complete, {"prompt": [[1], [2, 2**32]]}, "prompt[1][1]", str(2**32)),
        (complete, {"prompt": [1, True]}, "prompt[1]", "a boolean"),
        (complete, {"prompt": [1, 2.0]}, "prompt[1]", "a number"),
        (complete, {"prompt": ["x"] * 9}, "prompt", "at most 8"),
        (complete, {"logprobs": 21}, "logprobs", "20"),
        (complete, {"logprobs": -1}, "logprobs", "0"),
        (complete, {"logprobs": True}, "logprobs", "integer"),
        (complete, {"best_of": 3, "n": 2}, "best_of", "n"),
        (complete, {"suffix": "x", "echo": True}, "echo", "suffix"),
        (complete, {"max_tokens": 0}, "max_tokens", "echo"),
    ],
)
def test_wrong_fields_are_named(make: Any, fields: dict[str, Any], param: str, needle: str) -> None:
    with pytest.raises(ApiError) as caught:
        make(**fields)
    error = caught.value
    assert (error.status, error.type, error.param) == (400, "invalid_request_error", param)
    assert needle in error.message.lower() or needle in error.message
    assert error.message.startswith(param)


def test_all_wrong_logit_bias_keys_are_named() -> None:
    with pytest.raises(ApiError) as caught:
        chat(logit_bias={"one": 1, "5": 2, "-3": 1, str(2**32): 1, "٣": 1, "0000000000005": 1})
    assert caught.value.param == "logit_bias"
    for key in ("one", "-3", str(2**32), "٣", "0000000000005"):
        assert f"'{key}'" in caught.value.message
    assert "'5'" not in caught.value.message


def test_a_logit_bias_value_that_is_no_number() -> None:
    with pytest.raises(ApiError) as caught:
        chat(logit_bias={"5": "x"})
    assert caught.value.param == "logit_bias.5"


@pytest.mark.parametrize(
    "fields",
    [
        {"functions": [{}]},
        {"audio": {"voice": "x"}},
        {"modalities": ["text", "audio"]},
        {"web_search_options": {}},
        {"use_beam_search": True},
        {"add_special_tokens": True},
        {"return_tokens_as_token_ids": True},
        {"logprob_token_ids": [5]},
        {"truncation_side": "right"},
        {"best_of": 2},
        {"guided_whitespace_pattern": " "},
        {"repetition_detection": {"max_pattern_size": 3}},
        {"structural_tag": "{}"},
        {"thinking_token_budget": 5},
    ],
)
def test_unsupported_fields_are_refused_by_name(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, name, "unsupported_parameter")


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": None, "tool_choice": None, "functions": []},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"], "audio": None},
        {"add_special_tokens": False, "return_tokens_as_token_ids": False, "logprob_token_ids": []},
        {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
        {"prediction": {"type": "content", "content": "x"}, "safety_identifier": "x", "prompt_cache_key": "k"},
        {"something_nobody_knows": [1, 2]},
        {"messages": [{"role": "user", "content": "hi", "nobody": 1}]},
        {"stop": None, "n": None, "temperature": None, "logit_bias": None, "stream_options": None},
    ],
)
def test_harmless_and_unknown_fields_change_nothing(fields: dict[str, Any]) -> None:
    assert chat(**fields).requests == chat().requests


@pytest.mark.parametrize(("header", "seconds"), [(None, None), ("2", 2.0), ("0.25", 0.25), ("1e3", 1000.0)])
def test_timeout_header(header: str | None, seconds: float | None) -> None:
    assert read_timeout(header) == seconds


@pytest.mark.parametrize("header", ["", "x", "0", "-1", "nan", "inf", "1e7"])
def test_wrong_timeout_header(header: str) -> None:
    with pytest.raises(ApiError) as caught:
        read_timeout(header)
    assert (caught.value.status, caught.value.param) == (400, "x-request-timeout")


def test_tools_become_typed_messages() -> None:
    fields = {
        "parallel_tool_calls": False,
        "reasoning_effort": "low",
        "chat_template_kwargs": {"enable_thinking": False},
    }
    request = only_request(chat(tools=TOOLS, tool_choice="required", include_reasoning=False, **fields))
    assert request["output"] == {"omit_reasoning": True}
    assert request["chat"] == {
        "messages": [{"role": "user", "content": [{"text": "hi"}]}],
        "tools": [
            {
                "function": {
                    "name": "weather",
                    "description": "The weather.",
                    "parameters": '{"type": "object", "properties": {"city": {"type": "string"}}}',
                }
            }
        ],
        "tool_choice": {"mode": "TOOL_CHOICE_MODE_REQUIRED"},
        "parallel_tool_calls": False,
        "reasoning_effort": "REASONING_EFFORT_LOW",
        "template_arguments": {"enable_thinking": False},
    }


@pytest.mark.parametrize(
    ("choice", "expected", "is_named"),
    [
        ("auto", {"mode": "TOOL_CHOICE_MODE_AUTO"}, False),
        ("none", {"mode": "TOOL_CHOICE_MODE_NONE"}, False),
        ({"type": "function", "function": {"name": "weather"}}, {"function_name": "weather"}, True),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": TOOLS}},
            {"mode": "TOOL_CHOICE_MODE_REQUIRED", "allowed_function_names": ["weather"]},
            False,
        ),
    ],
)
def test_tool_choices(choice: Any, expected: dict[str, Any], is_named: bool) -> None:
    plan = chat(tools=TOOLS, tool_choice=choice)
    assert only_request(plan)["chat"]["tool_choice"] == expected
    assert plan.is_named_tool is is_named


def test_a_conversation_with_calls_and_their_results() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    assert only_request(chat(messages=messages))["chat"]["messages"][1:] == [
        {
            "role": "assistant",
            "tool_calls": [{"id": "call_1", "name": "weather", "arguments": '{"city": "Rome"}'}],
            "reasoning": "hm",
        },
        {"role": "tool", "tool_call_id": "call_1", "content": [{"text": "sunny"}]},
    ]


SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {}}}
SCHEMA_TEXT = '{"type": "object", "properties": {"b": {"type": "integer"}, "a": {}}}'


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "json_object"}}, {"json_object": {}}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            {"json_schema": SCHEMA_TEXT},
        ),
        ({"structured_outputs": {"json": SCHEMA}}, {"json_schema": SCHEMA_TEXT}),
        ({"structured_outputs": {"json": SCHEMA_TEXT}}, {"json_schema": SCHEMA_TEXT}),
        (
            {"structured_outputs": {"json_object": True, "disable_any_whitespace": True}},
            {"json_object": {}, "compact_json": True},
        ),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": {"texts": ["a", "b"]}}),
        ({"structured_outputs": {"grammar": 'start: "x"'}}, {"grammar": {"text": 'start: "x"'}}),
        ({"guided_json": SCHEMA}, {"json_schema": SCHEMA_TEXT}),
        ({"guided_regex": "[0-9]+"}, {"regex": "[0-9]+"}),
        ({"guided_choice": ["a"]}, {"choice": {"texts": ["a"]}}),
        ({"guided_grammar": 'root ::= "x"'}, {"grammar": {"text": 'root ::= "x"'}}),
        (
            {
                "response_format": {
                    "type": "structural_tag",
                    "structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}],
                    "triggers": ["<f"],
                }
            },
            {
                "structural_tags": {
                    "tags": [{"begin": "<f>", "json_schema": SCHEMA_TEXT, "end": "</f>"}],
                    "triggers": ["<f"],
                }
            },
        ),
    ],
)
def test_structured_output_in_every_spelling(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    assert only_request(chat(**fields))["structured_output"] == expected
    assert only_request(complete(**fields))["structured_output"] == expected


@pytest.mark.parametrize(("value", "is_left_out"), [(None, False), (True, False), (False, True)])
def test_special_tokens_are_left_out_where_that_is_asked_for(value: bool | None, is_left_out: bool) -> None:
    plan = complete(prompt=["a", "b"], add_special_tokens=value)
    assert [request.no_special_tokens for request in plan.requests] == [is_left_out] * 2


def test_echo_asks_for_the_prompt() -> None:
    output = only_request(complete(echo=True, logprobs=2))["output"]
    assert output == {"logprobs": 2, "prompt_logprobs": 2, "prompt_text": True}
    assert only_request(complete(echo=True, max_tokens=0))["stop"] == {"max_tokens": 0}
