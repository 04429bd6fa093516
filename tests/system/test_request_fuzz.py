"""Random bodies, right and wrong: each is served, or refused with the field that is wrong; never a 5xx."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.system.conftest import Stack

SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=6)
JSON = st.recursive(
    SCALARS.filter(lambda value: value == value and value not in (float("inf"), float("-inf"))),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
SCHEMA = st.sampled_from([{}, {"type": "object"}, {"type": "integer"}, {"not": {}}, {"$ref": "#/x"}, {"enum": []}])
GRAMMARS = st.sampled_from(["start: 'x'", 'start: "x"', 'root ::= "a"', "(", ""])
FLAGS = {"at_least_one": st.booleans(), "stop_after_first": st.booleans()}
WORD = st.sampled_from(["", "a", "<f>", "</f>"])
# Of the model: special ones, one of text, one that ends a sequence, and one that there is not.
TOKEN = st.sampled_from([3, "<file_sep>", " the", 2, 10**7])
TOKENS = st.lists(TOKEN, max_size=2)


def with_tags(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    mark = WORD | TOKEN.map(lambda token: {"type": "token", "token": token})
    tag = st.fixed_dictionaries({"type": st.just("tag"), "begin": mark, "content": inner, "end": mark})
    tags = st.lists(tag, max_size=2)
    triggered = {"type": st.just("triggered_tags"), "tags": tags, "triggers": st.lists(WORD, max_size=2), **FLAGS}
    separated = {"type": st.just("tags_with_separator"), "tags": tags, "separator": WORD, **FLAGS}
    by_token = {"type": st.just("token_triggered_tags"), "tags": tags, "trigger_tokens": TOKENS, **FLAGS}
    times = {"min": st.sampled_from([0, 1, 2, 5000]), "max": st.sampled_from([-1, 1, 3, 2**40])}
    repeated = st.fixed_dictionaries({"type": st.just("repeat"), "content": inner, **times})
    several = st.fixed_dictionaries({"type": st.sampled_from(["sequence", "or"]), "elements": st.lists(inner)})
    return (
        tag
        | several
        | repeated
        | st.fixed_dictionaries(triggered)
        | st.fixed_dictionaries(by_token)
        | st.fixed_dictionaries(separated)
    )


LAYOUT = st.recursive(
    st.sampled_from([{"type": "any_text"}, {"type": "any_text", "excludes": ["a"]}, {"type": "x"}])
    | SCHEMA.map(lambda schema: {"type": "json_schema", "json_schema": schema})
    | WORD.map(lambda word: {"type": "const_string", "value": word})
    | st.sampled_from(["[ab]*", "(", ""]).map(lambda pattern: {"type": "regex", "pattern": pattern})
    | GRAMMARS.map(lambda text: {"type": "grammar", "grammar": text})
    | TOKEN.map(lambda token: {"type": "token", "token": token})
    | st.builds(
        lambda kind, tokens: {"type": kind, "exclude_tokens": tokens},
        st.sampled_from(["exclude_token", "any_tokens"]),
        TOKENS,
    ),
    with_tags,
    max_leaves=5,
)
NUMBER = st.sampled_from([-3, -1, 0, 0.5, 1, 2, 21, 1e300]) | st.none()
COUNT = st.sampled_from([-2, -1, 0, 1, 3, 20, 21, 5000, 2**40]) | st.none()
TOOL = st.fixed_dictionaries(
    {"type": st.just("function"), "function": st.fixed_dictionaries({"name": st.sampled_from(["f", "", "a b"])})}
)
# What a field may hold: values that are at home there, and a few of anything.
SHARED: dict[str, st.SearchStrategy[Any]] = {
    "temperature": NUMBER,
    "top_p": NUMBER,
    "min_p": NUMBER,
    "top_k": COUNT,
    "n": st.sampled_from([None, 0, 1, 2, 3, 1000]),
    "stop": st.none() | st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=3),
    "seed": COUNT,
    "presence_penalty": NUMBER,
    "repetition_penalty": NUMBER,
    "logit_bias": st.dictionaries(st.sampled_from(["1", "x", "-1", "99999"]), NUMBER, max_size=2),
    "stream": st.booleans(),
    "stream_options": st.sampled_from([None, {}, {"include_usage": True}, {"include_usage": 1}]),
    "min_tokens": COUNT,
    "ignore_eos": st.booleans(),
    "stop_token_ids": st.lists(COUNT, max_size=2),
    "allowed_token_ids": st.lists(COUNT, max_size=2),
    "bad_words": st.lists(st.text(max_size=3), max_size=2),
    "prompt_logprobs": COUNT,
    "truncate_prompt_tokens": COUNT,
    "return_token_ids": st.booleans(),
    "priority": COUNT,
    "cache_salt": st.text(max_size=3),
    "response_format": st.sampled_from(["text", "json_object", "json_schema", "other"]).map(
        lambda kind: {"type": kind}
    ),
    "structured_outputs": st.fixed_dictionaries(
        {},
        optional={
            "json": SCHEMA,
            "regex": st.sampled_from(["[ab]+", "(", "(?=a)"]),
            "grammar": GRAMMARS,
            "choice": st.lists(st.text(max_size=3), max_size=2),
            "structural_tag": st.fixed_dictionaries({"format": LAYOUT}),
        },
    ),
}
CHAT: dict[str, st.SearchStrategy[Any]] = {
    "logprobs": st.booleans(),
    "top_logprobs": COUNT,
    "tools": st.lists(TOOL, max_size=2),
    "tool_choice": st.sampled_from(
        ["auto", "none", "required", "x", {}, {"type": "function", "function": {"name": "f"}}]
    ),
    "continue_final_message": st.booleans(),
    "add_generation_prompt": st.booleans(),
    "echo": st.booleans(),
    "chat_template_kwargs": st.dictionaries(st.text(max_size=4), JSON, max_size=2),
    "reasoning_effort": st.sampled_from([None, "low", "x"]),
}
COMPLETION: dict[str, st.SearchStrategy[Any]] = {
    "logprobs": COUNT,
    "echo": st.booleans(),
    "suffix": st.text(max_size=3),
    "best_of": COUNT,
}
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "forbidden", ""])},
    optional={"content": st.text(max_size=8) | JSON, "tool_calls": JSON, "tool_call_id": JSON, "name": JSON},
)
PLAIN = st.just([{"role": "user", "content": "hi"}])
MESSAGES = st.one_of(PLAIN, PLAIN, st.lists(MESSAGE, min_size=1, max_size=3), JSON)
PROMPT = (
    st.just("hi")
    | st.text(max_size=12)
    | st.lists(COUNT, max_size=4)
    | st.lists(st.text(max_size=4), max_size=3)
    | JSON
)


def bodies(needed: dict[str, st.SearchStrategy[Any]], fields: dict[str, st.SearchStrategy[Any]]) -> Any:
    """A few fields of a body, at times one of them with a value of any kind."""
    few = st.lists(st.sampled_from(sorted(fields)), max_size=4, unique=True)
    return few.flatmap(
        lambda names: st.fixed_dictionaries(
            {**needed, **{name: st.one_of(fields[name], fields[name], JSON) for name in names}}
        )
    )


@pytest.mark.parametrize(
    ("path", "strategy"),
    [
        (
            "/v1/chat/completions",
            bodies(
                {"messages": MESSAGES, "max_tokens": st.sampled_from([1, 3])},
                {**SHARED, **CHAT},
            ),
        ),
        (
            "/v1/completions",
            bodies({"prompt": PROMPT, "max_tokens": st.sampled_from([0, 1, 3])}, {**SHARED, **COMPLETION}),
        ),
    ],
    ids=["chat", "completions"],
)
def test_a_body_is_served_or_its_wrong_field_is_named(stack: Stack, path: str, strategy: Any) -> None:
    served = 0
    with httpx.Client(base_url=stack.url, timeout=120) as http:

        @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(body=strategy)
        def send(body: dict[str, Any]) -> None:
            nonlocal served
            answer = http.post(path, json=body)
            if answer.status_code == 200:
                served += 1
                assert "text/event-stream" in answer.headers["content-type"] or answer.json()["choices"]
                assert b'"error"' not in answer.content or b'"choices"' in answer.content
                return
            assert answer.status_code == 400, (body, answer.status_code, answer.text)
            error = answer.json()["error"]
            assert error["message"] and error["param"], (body, error)

        send()
    assert served
    stack.wait_idle()
