"""The default model held to formats, through the official client: it is small, and yet what it says is valid."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from .conftest import SMOLLM2_NAME as MODEL
from .launched import Launched

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "married": {"type": "boolean"},
    },
    "required": ["name", "age", "married"],
    "additionalProperties": False,
}
NESTED = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "minItems": 1, "maxItems": 3},
        "owner": {"$ref": "#/$defs/owner"},
    },
    "required": ["kind", "tags", "owner"],
    "additionalProperties": False,
    "$defs": {
        "owner": {
            "type": "object",
            "properties": {"id": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"}},
            "required": ["id"],
            "additionalProperties": False,
        }
    },
}
CHOICES = {"anyOf": [{"const": "yes"}, {"const": "no"}, {"type": "integer", "minimum": 0, "maximum": 9}]}
SCHEMAS = {"person": PERSON, "nested": NESTED, "choices": CHOICES}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "days": {"type": "integer", "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {
        "name": "get_time",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"enum": ["UTC", "CET"]}},
            "required": ["zone"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def served(smollm2_server: Launched) -> Launched:
    return smollm2_server


@pytest.fixture
def client(served: Launched) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.base_url, api_key="none", max_retries=0, timeout=120) as client:
        yield client


def ask(client: openai.OpenAI, text: str = "Tell me about Ann, who has a dog.", **fields: Any) -> Any:
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model=MODEL, messages=messages, max_tokens=200, **fields)


def schema_format(name: str) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": SCHEMAS[name], "strict": True}}


# References and patterns are held in every run: tests/unit/control_plane/frontend/test_grammar.py.
SLOW_SCHEMAS = ("nested",)


@pytest.mark.parametrize("temperature", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW_SCHEMAS else name for name in SCHEMAS]
)
def test_json_is_valid_by_its_schema(client: openai.OpenAI, name: str, temperature: float) -> None:
    answer = ask(client, response_format=schema_format(name), temperature=temperature, n=2, seed=3)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), SCHEMAS[name])


def test_a_stream_is_valid_as_well(client: openai.OpenAI) -> None:
    fields = {"response_format": schema_format("person"), "temperature": 0}
    streamed = "".join(
        chunk.choices[0].delta.content or "" for chunk in ask(client, stream=True, **fields) if chunk.choices
    )
    jsonschema.validate(json.loads(streamed), PERSON)
    assert streamed == ask(client, **fields).choices[0].message.content


LABEL = {"type": "const_string", "value": "The year is "}
YEAR = {"type": "tag", "begin": "<y>", "content": {"type": "regex", "pattern": "[0-9]{4}"}, "end": "</y>"}


def test_a_json_object_is_one(client: openai.OpenAI) -> None:
    extra = {"structured_outputs": {"json": {"type": "object", "maxProperties": 0}}}
    assert json.loads(ask(client, extra_body=extra).choices[0].message.content) == {}


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"regex": r"[0-9]{4}-[0-9]{2}"}, r"[0-9]{4}-[0-9]{2}"),
        ({"choice": ["red", "green"]}, "red|green"),
        ({"grammar": 'start: "a" NUM\nNUM: /[0-9]{1,3}/'}, "a[0-9]{1,3}"),
        ({"grammar": 'root ::= "x" [0-9] "y"'}, "x[0-9]y"),
        (
            {"structural_tag": {"format": {"type": "sequence", "elements": [LABEL, YEAR]}}},
            "The year is <y>[0-9]{4}</y>",
        ),
    ],
)
@pytest.mark.parametrize("temperature", [0, 1])
def test_other_formats(client: openai.OpenAI, constraint: dict[str, Any], pattern: str, temperature: float) -> None:
    answer = client.completions.create(
        model=MODEL,
        prompt="Once",
        max_tokens=32,
        temperature=temperature,
        extra_body={"structured_outputs": constraint, "ignore_eos": True, "min_tokens": 30},
    )
    assert re.fullmatch(pattern, answer.choices[0].text), answer.choices[0].text
    assert answer.choices[0].finish_reason == "stop"


def token(name: str | int) -> dict[str, Any]:
    return {"type": "token", "token": name}


# Special tokens of the model, by id and by name; none of them ends a sequence.
FILE, REPO, STARS = 5, 3, 7
TWICE = {"type": "repeat", "min": 2, "max": 2, "content": {"type": "const_string", "value": "a "}}
CALL = {"type": "tag", "begin": token("<repo_name>"), "content": YEAR, "end": token(FILE)}


@pytest.mark.parametrize(
    ("layout", "pattern"),
    [
        ({"type": "sequence", "elements": [TWICE, YEAR]}, "a a <y>[0-9]{4}</y>"),
        (CALL, "<repo_name><y>[0-9]{4}</y><file_sep>"),
        (
            {
                "type": "tag",
                "begin": token(REPO),
                "content": {"type": "any_tokens", "exclude_tokens": ["<gh_stars>"], "max_tokens": 4},
                "end": token("<file_sep>"),
            },
            r"<repo_name>(?:(?!<file_sep>|<gh_stars>|<\|im_end\|>)(?s:.))*<file_sep>",
        ),
        (
            {
                "type": "token_triggered_tags",
                "trigger_tokens": ["<repo_name>"],
                "tags": [CALL],
                "at_least_one": True,
                "stop_after_first": True,
            },
            "<repo_name><y>[0-9]{4}</y><file_sep>",
        ),
        (
            {
                "type": "sequence",
                "elements": [
                    {"type": "exclude_token", "exclude_tokens": [REPO]},
                    token(STARS),
                    {"type": "optional", "content": LABEL},
                ],
            },
            "(?s:.{1,200})<gh_stars>(The year is )?",
        ),
    ],
    ids=["repeat", "tag", "any_tokens", "token_triggered_tags", "exclude_token"],
)
def test_formats_of_tokens(client: openai.OpenAI, layout: dict[str, Any], pattern: str) -> None:
    answer = client.completions.create(
        model=MODEL,
        prompt="Once",
        max_tokens=32,
        temperature=1,
        seed=5,
        extra_body={
            "structured_outputs": {"structural_tag": {"format": layout}},
            "skip_special_tokens": False,
            "ignore_eos": True,
        },
    )
    assert re.fullmatch(pattern, answer.choices[0].text), answer.choices[0].text
    assert answer.choices[0].finish_reason == "stop"


def test_a_chat_is_held_to_a_format_of_tokens(client: openai.OpenAI) -> None:
    layout = {"type": "sequence", "elements": [{**TWICE, "min": 1, "content": CALL}, token("<gh_stars>")]}
    answer = ask(client, response_format={"type": "structural_tag", "format": layout}, temperature=1, seed=1)
    # Special tokens are not shown.
    assert re.fullmatch("(<y>[0-9]{4}</y>){1,2}", answer.choices[0].message.content)
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("layout", "what"),
    [
        (token("<|im_end|>"), "ends the sequence"),
        (token(10**6), "is no token of this model"),
        ({"type": "repeat", "min": 0, "max": 5000, "content": LABEL}, "at most 4096"),
        ({"type": "any_text", "max_tokens": 3}, "max_tokens: not supported"),
    ],
)
def test_formats_of_tokens_that_cannot_be_held(client: openai.OpenAI, layout: dict[str, Any], what: str) -> None:
    extra = {"structured_outputs": {"structural_tag": {"format": layout}}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="Once", max_tokens=8, extra_body=extra)
    assert what in caught.value.message and caught.value.param is not None
    assert caught.value.param.startswith("structured_outputs.structural_tag")


@pytest.mark.slow
def test_held_and_free_requests_run_beside_each_other(served: Launched) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=served.base_url, api_key="none", max_retries=0, timeout=120) as client:

            async def one(index: int) -> str:
                fields: dict[str, Any] = {"response_format": schema_format("person")} if index % 2 else {}
                answer = await client.chat.completions.create(
                    model=MODEL,
                    messages=[{"role": "user", "content": f"Number {index}."}],
                    max_tokens=80,
                    seed=index,
                    **fields,
                )
                return answer.choices[0].message.content or ""

            texts = await asyncio.gather(*(one(index) for index in range(8)))
            for text in texts[1::2]:
                jsonschema.validate(json.loads(text), PERSON)

    asyncio.run(run())


@pytest.mark.slow
def test_a_held_stream_survives_the_ends_of_two_workers(served: Launched) -> None:
    long = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 40, "maxItems": 40}
    fields: dict[str, Any] = {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": long}},
        "temperature": 0,
    }
    with openai.OpenAI(base_url=served.base_url, api_key="none", max_retries=0, timeout=120) as client:
        messages: Any = [{"role": "user", "content": "Numbers."}]
        text = ""
        ends = {40: signal.SIGTERM, 100: signal.SIGKILL}
        for chunk in client.chat.completions.create(
            model=MODEL, messages=messages, max_tokens=1000, stream=True, **fields
        ):
            text += chunk.choices[0].delta.content or ""
            if ends and len(text) > min(ends):
                served.child("gpu_worker").send_signal(ends.pop(min(ends)))
        assert not ends
        jsonschema.validate(json.loads(text), long)


# Tools alone and formats alone are in every run.
@pytest.mark.slow
def test_a_tool_is_called_or_the_format_is_kept_to(client: openai.OpenAI) -> None:
    """What agents ask for: tools for the way, a format for the answer at its end."""
    schema = {
        "type": "object",
        "properties": {"is_warm": {"type": "boolean"}},
        "required": ["is_warm"],
        "additionalProperties": False,
    }
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    fields = {"tools": [WEATHER], "response_format": wanted, "parallel_tool_calls": False, "temperature": 0}
    called = ask(client, "What is the weather in Paris? Call get_weather.", **fields).choices[0]
    (call,) = called.message.tool_calls
    assert called.finish_reason == "tool_calls" and not called.message.content
    jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])
    answered = ask(client, "Is fire warm? Answer in JSON.", **fields).choices[0]
    assert answered.finish_reason == "stop" and answered.message.tool_calls is None
    jsonschema.validate(json.loads(answered.message.content), schema)


@pytest.mark.parametrize("temperature", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_named_tool_is_called_with_valid_arguments(client: openai.OpenAI, temperature: float) -> None:
    choice = {"type": "function", "function": {"name": "get_weather"}}
    answer = ask(client, "Rome?", tools=[WEATHER, CLOCK], tool_choice=choice, temperature=temperature, n=2)
    for each in answer.choices:
        (call,) = each.message.tool_calls
        assert each.finish_reason == "stop" and not each.message.content
        assert call.function.name == "get_weather" and len(call.id) >= 9
        jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])


@pytest.mark.parametrize("temperature", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_required_call_streams_as_it_stands(client: openai.OpenAI, temperature: float) -> None:
    fields: dict[str, Any] = {
        "tools": [WEATHER, CLOCK],
        "tool_choice": "required",
        "temperature": temperature,
        "seed": 5,
        "parallel_tool_calls": False,
    }
    answer = ask(client, "What time is it?", **fields).choices[0]
    (call,) = answer.message.tool_calls
    assert answer.finish_reason == "tool_calls"
    name, arguments, ids = "", "", []
    for chunk in ask(client, "What time is it?", stream=True, **fields):
        for piece in chunk.choices[0].delta.tool_calls or ():
            assert piece.index == 0
            name += piece.function.name or ""
            arguments += piece.function.arguments or ""
            ids += [piece.id] if piece.id else []
        assert not chunk.choices[0].delta.content
    assert (name, json.loads(arguments), len(ids)) == (call.function.name, json.loads(call.function.arguments), 1)
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in (WEATHER, CLOCK)}
    jsonschema.validate(json.loads(arguments), schemas[name])


def test_a_call_that_is_cut_off_is_not_shown(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Rome?"}]
    answer = client.chat.completions.create(
        model=MODEL,
        messages=messages,
        tools=[WEATHER],
        tool_choice="required",
        max_tokens=8,  # type: ignore[list-item]
    )
    assert answer.choices[0].finish_reason == "length" and answer.choices[0].message.tool_calls is None


def test_results_of_calls_are_taken_back(client: openai.OpenAI) -> None:
    call = {"id": "call_12345", "type": "function", "function": {"name": "get_time", "arguments": '{"zone": "UTC"}'}}
    messages: Any = [
        {"role": "user", "content": "Time?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_12345", "content": "noon"},
    ]
    tools: Any = [CLOCK]
    answer = client.chat.completions.create(model=MODEL, messages=messages, tools=tools, max_tokens=24, temperature=0)
    assert answer.choices[0].message.content is not None


BOMB: dict[str, Any] = {"type": "string"}
for _ in range(100):
    BOMB = {"type": "array", "items": BOMB}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "(?=a)b"}, "guided_regex"),
        ({"guided_regex": "["}, "guided_regex"),
        ({"guided_regex": "a" * 20_000}, "guided_regex"),
        ({"guided_grammar": "start: missing"}, "guided_grammar"),
        ({"guided_json": {"not": {"type": "string"}}}, "guided_json"),
        ({"guided_json": BOMB}, "guided_json"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_choice": [""]}, "guided_choice"),
    ],
)
def test_what_cannot_be_enforced_is_refused(served: Launched, fields: dict[str, Any], param: str) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 4, **fields}
    answer = httpx.post(f"{served.base_url}/chat/completions", json=body, timeout=120)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith(param), answer.text


def test_bad_words_are_not_said(client: openai.OpenAI) -> None:
    def capital(**extra: Any) -> str:
        answer = ask(client, "What is the capital of France?", temperature=0, extra_body=extra)
        return str(answer.choices[0].message.content)

    assert "Paris" in capital()
    assert "Paris" not in capital(bad_words=["Paris"])
