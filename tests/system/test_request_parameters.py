"""Every parameter of the generating routes: taken alone, streamed, with several choices and with tools; and checked.

What each of them does to the text is shown where it is at home: `test_openai_api.py`, `test_structured_output.py`,
`test_prompt_outputs.py`, `test_token_routes.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.system.conftest import Stack

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
CHAT_BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]
TAG = {"type": "structural_tag", "structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}], "triggers": ["<f"]}
LABEL = {"type": "const_string", "value": "Answer: "}
CALLS = {
    "type": "triggered_tags",
    "triggers": ["<f"],
    "tags": [{"begin": "<f>", "content": {"type": "json_schema", "json_schema": SCHEMA}, "end": "</f>"}],
}
MANY = list(range(1, 1100))

# (name, a value that is taken, values that are not)
SHARED: list[tuple[str, Any, list[Any]]] = [
    ("n", 2, [0, -1, "2", 1.5, 100_000]),
    ("temperature", 0.5, [-1, 2.1, "1", True]),
    ("top_p", 0.5, [0, 1.1, "1"]),
    ("top_k", 5, [-2, 1.5, "5"]),
    ("min_p", 0.1, [-0.1, 1.1]),
    ("repetition_penalty", 1.1, [0, -1]),
    ("presence_penalty", 1, [2.1, -2.1, "1"]),
    ("frequency_penalty", -1, [2.1, -2.1]),
    ("seed", -(2**63), [2**63, 1.5, "1"]),
    ("logit_bias", {"5": 1.5}, [{"x": 1}, {"5": "1"}, {"99999": 1}, {"5": 101}, [5]]),
    ("stop", ["a b c"] * 16, [["x"] * 17, "", [""], [3], {"a": 1}]),
    ("stop_token_ids", [7], [[99999], ["7"], [-1], MANY]),
    ("min_tokens", 1, [-1, "1", 3]),
    ("ignore_eos", True, ["yes", 1]),
    ("include_stop_str_in_output", True, [1]),
    ("skip_special_tokens", False, [0]),
    ("allowed_token_ids", [5, 6, 7], [[99999], [-1], ["5"]]),
    ("bad_words", ["bad"], [["x"] * 257, ["x" * 300], [3], [""]]),
    ("truncate_prompt_tokens", 3, [0, -2, 10**9, "3"]),
    ("priority", -5, [2**31, "1"]),
    ("cache_salt", "salt", ["x" * 10_000, 5]),
    ("return_token_ids", True, ["yes"]),
    ("metadata", {"a": "b"}, []),
    ("user", "somebody", []),
    ("store", False, []),
    ("service_tier", "auto", []),
]
FORMATS: list[tuple[str, Any, list[Any]]] = [
    ("response_format", {"type": "json_object"}, [{"type": "xml"}, {"type": "json_schema"}, {}]),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}, []),
    (
        "structured_outputs",
        {"json": SCHEMA},
        [{"json": SCHEMA, "regex": "a"}, {"json": 3}, {"json": {"type": "x"}}],
    ),
    ("structured_outputs", {"regex": "[a-z]+"}, [{"regex": "["}, {"regex": 3}]),
    ("structured_outputs", {"choice": ["yes", "no"]}, [{"choice": []}, {"choice": [""]}, {"choice": [1]}]),
    ("structured_outputs", {"grammar": 'start: "a" | "b"'}, [{"grammar": "start: missing"}, {"grammar": "root ::= ("}]),
    ("structured_outputs", {"structural_tag": TAG}, [{"structural_tag": {"structures": []}}, {"structural_tag": "{"}]),
    (
        "structured_outputs",
        {"structural_tag": {"format": {"type": "sequence", "elements": [LABEL, CALLS]}}},
        [
            {"structural_tag": {"format": {"type": "anything"}}},
            {"structural_tag": {"format": {"type": "sequence", "elements": [CALLS, LABEL]}}},
            {"structural_tag": {"format": {"type": "regex", "pattern": "["}}},
        ],
    ),
    ("response_format", {"type": "structural_tag", "format": {**CALLS, "stop_after_first": True}}, []),
    ("guided_json", SCHEMA, [3]),
    ("guided_regex", "a+", ["["]),
    ("guided_choice", ["a"], [[]]),
    ("guided_grammar", 'start: "a"', ["start: missing"]),
]
CHAT_ONLY: list[tuple[str, Any, list[Any]]] = [
    ("logprobs", True, [1, "true"]),
    ("max_completion_tokens", 2, [0, -1, "2", 10**6]),
    ("max_tokens", 2, [0, 1.5, 10**6]),
    ("reasoning_effort", "low", ["extreme", 1]),
    ("include_reasoning", False, [0]),
    ("chat_template_kwargs", {"enable_thinking": False, "deep": {"a": [1, None]}}, [[1], "x"]),
    ("add_generation_prompt", False, ["no"]),
    ("continue_final_message", False, [0]),
    ("parallel_tool_calls", False, ["no"]),
    ("tool_choice", "none", ["required", {}, "sometimes", {"type": "function", "function": {"name": "x"}}]),
    ("tools", TOOLS, [[], [{}], [{"type": "function", "function": {"name": "a b"}}], TOOLS * 2, TOOLS * 300]),
]
COMPLETION_ONLY: list[tuple[str, Any, list[Any]]] = [
    ("logprobs", 3, [21, -1, True, "3"]),
    ("echo", True, ["yes", 1]),
    ("max_tokens", 2, [-1, 0, 10**6]),
    ("prompt", [[5, 6], [7]], ["", [], [""], [[]], [-1], ["a", 3], [[99999]], {"a": 1}, 3]),
    ("suffix", "", ["text for a model that cannot fill in", 3]),
    ("best_of", 1, [3, 0]),
]


@pytest.fixture(scope="module")
def http(stack: Stack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stack.url, timeout=120) as client:
        yield client


def post(http: httpx.Client, path: str, body: dict[str, Any]) -> httpx.Response:
    return http.post(path, json={**(CHAT_BODY if path == CHAT else {"prompt": "Hello", "max_tokens": 2}), **body})


def check_taken(http: httpx.Client, path: str, fields: dict[str, Any]) -> None:
    variants: list[dict[str, Any]] = [{}, {"stream": True, "stream_options": {"include_usage": True}}]
    # Room for a whole answer of a format or a call; what is truncated is the prompt.
    if "n" not in fields and "best_of" not in fields:
        variants.append({"n": 2})
    if path == CHAT:
        variants += [{"tools": TOOLS}, {"tools": TOOLS, "n": 2, "stream": True}]
    for variant in variants:
        response = post(http, path, {**variant, **fields})
        assert response.status_code == 200, (variant, response.text)
        if "stream" not in variant:
            num_prompts = len(fields["prompt"]) if "prompt" in fields else 1
            expected = num_prompts * {**variant, **fields}.get("n", 1)
            assert len(response.json()["choices"]) == expected
            continue
        events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        assert response.text.endswith("data: [DONE]\n\n") and not any("error" in event for event in events)


# That it is refused is held in every run by tests/unit/control_plane/frontend/test_grammar.py.
@pytest.mark.slow
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_pattern_that_explodes_is_refused(http: httpx.Client, path: str) -> None:
    check_refused(http, path, "structured_outputs", [{"regex": "((a{900}){900}){900}"}])


@pytest.mark.parametrize(("name", "value", "wrong"), [*SHARED, *FORMATS, *CHAT_ONLY], ids=lambda each: str(each)[:30])
def test_a_parameter_of_chats(http: httpx.Client, name: str, value: Any, wrong: list[Any]) -> None:
    check_taken(http, CHAT, {name: value})
    check_refused(http, CHAT, name, wrong)


@pytest.mark.parametrize(
    ("name", "value", "wrong"), [*SHARED, *FORMATS, *COMPLETION_ONLY], ids=lambda each: str(each)[:30]
)
def test_a_parameter_of_completions(http: httpx.Client, name: str, value: Any, wrong: list[Any]) -> None:
    check_taken(http, COMPLETIONS, {name: value})
    check_refused(http, COMPLETIONS, name, wrong)


def check_refused(http: httpx.Client, path: str, name: str, wrong: list[Any]) -> None:
    """Alike with and without `stream`: an error object that names the parameter."""
    for value in wrong:
        for stream in (False, True):
            response = post(http, path, {name: value, "stream": stream})
            assert response.status_code == 400, (value, response.text)
            error = response.json()["error"]
            assert error["type"] == "invalid_request_error" and error["message"]
            assert (error["param"] or error["message"]).startswith(name), (value, error)


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"stream_options": {"include_usage": True}}, "stream_options"),
        (COMPLETIONS, {"stream_options": {}}, "stream_options"),
        (COMPLETIONS, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        (CHAT, {"prompt_logprobs": -1}, "prompt_logprobs"),
        (CHAT, {"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        (CHAT, {"continue_final_message": True}, "continue_final_message"),
        (CHAT, {"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        (CHAT, {"tools": TOOLS, "tool_choice": "required", "guided_regex": "a"}, "guided_regex"),
        (COMPLETIONS, {"echo": True, "suffix": "x"}, "echo"),
        (COMPLETIONS, {"n": 2, "best_of": 3}, "best_of"),
    ],
)
def test_parameters_that_do_not_go_together(http: httpx.Client, path: str, fields: dict[str, Any], param: str) -> None:
    response = post(http, path, fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert param in (error["param"] or error["message"]), error


def test_prompt_logprobs_is_taken_by_both(http: httpx.Client) -> None:
    for path in (CHAT, COMPLETIONS):
        for fields in ({}, {"n": 2}):
            answer = post(http, path, {"prompt_logprobs": 2, **fields}).json()
            listed = answer["prompt_logprobs"] if path == CHAT else answer["choices"][0]["prompt_logprobs"]
            assert listed[0] is None and all(2 <= len(entry) <= 3 for entry in listed[1:])
            assert all(set(each) == {"logprob", "rank", "decoded_token"} for e in listed[1:] for each in e.values())
