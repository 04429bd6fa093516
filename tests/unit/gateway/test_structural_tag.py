"""`structural_tag` as clients send it, to the message that the control plane reads."""

from __future__ import annotations

import json
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict

from gateway.errors import ApiError
from gateway.structural_tag import read_structural_tag

SCHEMA = {"type": "object"}
TAG = {"begin": "<f>", "content": {"type": "json_schema", "json_schema": SCHEMA}, "end": "</f>"}
READ_TAG = {"begin": "<f>", "content": {"json_schema": json.dumps(SCHEMA)}, "end": "</f>"}
ANY = {"type": "any_text"}
TOKEN = {"type": "token", "token": "<|x|>"}


def nested(depth: int) -> dict[str, Any]:
    return {"type": "or", "elements": [nested(depth - 1)]} if depth > 1 else ANY


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ({"type": "const_string", "value": "a"}, {"const_string": "a"}),
        ({"type": "json_schema", "json_schema": True}, {"json_schema": "true"}),
        ({"type": "json_schema", "json_schema": json.dumps(SCHEMA)}, {"json_schema": json.dumps(SCHEMA)}),
        ({"type": "qwen_xml_parameter", "json_schema": SCHEMA}, {"qwen_parameters": json.dumps(SCHEMA)}),
        ({"type": "regex", "pattern": "a+"}, {"regex": "a+"}),
        ({"type": "grammar", "grammar": 'root ::= "a"'}, {"grammar": {"text": 'root ::= "a"'}}),
        (ANY, {"any_text": {}}),
        ({**ANY, "excludes": ["a"], "excluded_str": ["b"]}, {"any_text": {"excluded": ["a", "b"]}}),
        (
            {"type": "sequence", "elements": [{"type": "tag", **TAG}, ANY]},
            {"sequence": {"formats": [{"tag": READ_TAG}, {"any_text": {}}]}},
        ),
        ({"type": "or", "elements": [ANY]}, {"any_of": {"formats": [{"any_text": {}}]}}),
        ({"type": "or", "elements": []}, {"any_of": {}}),
        (
            {"type": "triggered_tags", "triggers": ["<"], "tags": [TAG], "at_least_one": True, "excludes": ["x"]},
            {"triggered_tags": {"triggers": ["<"], "tags": [READ_TAG], "at_least_one": True, "excluded": ["x"]}},
        ),
        (
            {"type": "triggered_tags", "triggers": ["<"], "tags": [TAG], "stop_after_first": True},
            {"triggered_tags": {"triggers": ["<"], "tags": [READ_TAG], "stop_after_first": True}},
        ),
        (
            {"type": "tags_with_separator", "separator": ",", "tags": [{"type": "tag", **TAG}], "at_least_one": True},
            {"separated_tags": {"separator": ",", "tags": [READ_TAG], "at_least_one": True}},
        ),
        (
            {"type": "tags_with_separator", "tags": [TAG], "stop_after_first": True},
            {"separated_tags": {"tags": [READ_TAG], "stop_after_first": True}},
        ),
        (
            {"type": "json_schema", "json_schema": SCHEMA, "style": "json", "any_order": False},
            {"json_schema": json.dumps(SCHEMA)},
        ),
        ({"type": "json_schema", "json_schema": SCHEMA, "style": "qwen_xml"}, {"qwen_parameters": json.dumps(SCHEMA)}),
        ({"type": "optional", "content": ANY}, {"repeat": {"format": {"any_text": {}}, "max": 1}}),
        ({"type": "star", "content": ANY}, {"repeat": {"format": {"any_text": {}}}}),
        ({"type": "plus", "content": ANY}, {"repeat": {"format": {"any_text": {}}, "min": 1}}),
        (
            {"type": "repeat", "min": 2, "max": 3, "content": ANY},
            {"repeat": {"format": {"any_text": {}}, "min": 2, "max": 3}},
        ),
        (
            {"type": "repeat", "min": 0, "max": 0, "content": ANY},
            {"repeat": {"format": {"any_text": {}}, "max": 0}},
        ),
        ({"type": "repeat", "min": 2, "max": -1, "content": ANY}, {"repeat": {"format": {"any_text": {}}, "min": 2}}),
        ({"type": "token", "token": 0}, {"token": {"id": 0}}),
        (TOKEN, {"token": {"text": "<|x|>"}}),
        ({"type": "exclude_token"}, {"any_token": {}}),
        (
            {"type": "exclude_token", "exclude_tokens": [5, "<|x|>"]},
            {"any_token": {"excluded": [{"id": 5}, {"text": "<|x|>"}]}},
        ),
        ({"type": "any_tokens", "max_tokens": None}, {"any_tokens": {}}),
        (
            {"type": "any_tokens", "exclude_tokens": [5], "max_tokens": 0},
            {"any_tokens": {"excluded": [{"id": 5}], "max_tokens": 0}},
        ),
        (
            {"type": "tag", "begin": TOKEN, "content": ANY, "end": {"type": "token", "token": 7}},
            {"tag": {"begin_token": {"text": "<|x|>"}, "content": {"any_text": {}}, "end_token": {"id": 7}}},
        ),
        (
            {"type": "tag", "begin": "a", "content": ANY, "end": ["b"]},
            {"tag": {"begin": "a", "content": {"any_text": {}}, "end": "b"}},
        ),
        (
            {"type": "tag", "begin": "a", "content": ANY, "end": ["b", "c", "d"]},
            {"tag": {"begin": "a", "content": {"any_text": {}}, "end": "b", "other_ends": ["c", "d"]}},
        ),
        (
            {
                "type": "token_triggered_tags",
                "trigger_tokens": ["<|x|>", 6],
                "tags": [{**TAG, "begin": TOKEN}],
                "exclude_tokens": [3],
                "at_least_one": True,
                "stop_after_first": True,
            },
            {
                "token_triggered_tags": {
                    "tags": [{"begin_token": {"text": "<|x|>"}, "content": READ_TAG["content"], "end": "</f>"}],
                    "trigger_tokens": [{"text": "<|x|>"}, {"id": 6}],
                    "excluded": [{"id": 3}],
                    "at_least_one": True,
                    "stop_after_first": True,
                }
            },
        ),
        (
            {
                "type": "dispatch",
                "rules": [["<f>", ANY], ["<g>", {"type": "regex", "pattern": "a"}]],
                "excludes": ["x"],
            },
            {
                "triggered_tags": {
                    "tags": [
                        {"begin": "<f>", "content": {"any_text": {}}},
                        {"begin": "<g>", "content": {"regex": "a"}},
                    ],
                    "excluded": ["x"],
                }
            },
        ),
        (
            {"type": "token_dispatch", "rules": [["<|x|>", ANY], [5, ANY]], "loop": False, "exclude_tokens": [3]},
            {
                "token_triggered_tags": {
                    "tags": [
                        {"begin_token": {"text": "<|x|>"}, "content": {"any_text": {}}},
                        {"begin_token": {"id": 5}, "content": {"any_text": {}}},
                    ],
                    "excluded": [{"id": 3}],
                    "stop_after_first": True,
                }
            },
        ),
    ],
    ids=lambda each: json.dumps(each)[:40],
)
def test_every_type_of_format(layout: dict[str, Any], expected: dict[str, Any]) -> None:
    value = {"type": "structural_tag", "format": layout}
    for sent in (value, json.dumps(value)):
        message = read_structural_tag("tag", sent)
        assert MessageToDict(message, preserving_proto_field_name=True) == {"text_format": expected}


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ("{", "tag"),
        ('{"format": {"type": "const_string", "value": "\\ud800"}}', "tag"),
        ([], "tag"),
        ({}, "tag.structures"),
        ({"structures": [3]}, "tag.structures"),
        ({"structures": [{"end": "a"}]}, "tag.structures[0].begin"),
        ({"structures": [{"begin": "a", "schema": 3}]}, "tag.structures[0].schema"),
        ({"structures": [], "triggers": "<"}, "tag.triggers"),
        ({"format": 3}, "tag.format.type"),
        ({"format": {"type": "repeated", "content": ANY}}, "tag.format.type"),
        ({"format": {"type": "repeat", "content": ANY}}, "tag.format.max"),
        ({"format": {"type": "repeat", "content": ANY, "max": 1}}, "tag.format.min"),
        ({"format": {"type": "repeat", "content": ANY, "min": -1, "max": 1}}, "tag.format.min"),
        ({"format": {"type": "repeat", "content": ANY, "min": True, "max": 1}}, "tag.format.min"),
        ({"format": {"type": "repeat", "content": ANY, "min": 0, "max": -2}}, "tag.format.max"),
        ({"format": {"type": "repeat", "content": ANY, "min": 0, "max": 2**32}}, "tag.format.max"),
        ({"format": {"type": "repeat", "content": ANY, "min": 2, "max": 1}}, "tag.format.max"),
        ({"format": {"type": "repeat", "min": 1, "max": 1}}, "tag.format.content.type"),
        ({"format": {"type": "star", "content": ANY, "max": 1}}, "tag.format.max"),
        ({"format": {"type": "optional", "content": {"type": "x"}}}, "tag.format.content.type"),
        ({"format": {"type": "token"}}, "tag.format.token"),
        ({"format": {"type": "token", "token": True}}, "tag.format.token"),
        ({"format": {"type": "token", "token": -1}}, "tag.format.token"),
        ({"format": {"type": "token", "token": 2**32}}, "tag.format.token"),
        ({"format": {"type": "exclude_token", "exclude_tokens": 3}}, "tag.format.exclude_tokens"),
        ({"format": {"type": "exclude_token", "exclude_tokens": [3, 1.5]}}, "tag.format.exclude_tokens[1]"),
        ({"format": {"type": "any_tokens", "max_tokens": -1}}, "tag.format.max_tokens"),
        ({"format": {"type": "any_tokens", "excludes": ["a"]}}, "tag.format.excludes"),
        ({"format": {"type": "any_text", "max_tokens": 3}}, "tag.format.max_tokens"),
        ({"format": {"type": "any_text", "max_chars": 3}}, "tag.format.max_chars"),
        ({"format": {"type": "json_schema", "json_schema": {}, "any_order": True}}, "tag.format.any_order"),
        ({"format": {**TAG, "type": "tag", "begin": ANY}}, "tag.format.begin.type"),
        ({"format": {**TAG, "type": "tag", "begin": {"type": "token"}}}, "tag.format.begin.token"),
        ({"format": {**TAG, "type": "tag", "begin": {**TOKEN, "x": 1}}}, "tag.format.begin.x"),
        ({"format": {**TAG, "type": "tag", "end": {"type": "token", "token": []}}}, "tag.format.end.token"),
        ({"format": {**TAG, "type": "tag", "begin": None}}, "tag.format.begin"),
        ({"format": {"type": "triggered_tags", "tags": [{**TAG, "begin": TOKEN}]}}, "tag.format.tags[0].begin"),
        ({"format": {"type": "token_triggered_tags", "tags": [TAG]}}, "tag.format.tags[0].begin"),
        ({"format": {"type": "token_triggered_tags", "tags": [], "triggers": ["a"]}}, "tag.format.triggers"),
        (
            {"format": {"type": "token_triggered_tags", "tags": [], "trigger_tokens": [None]}},
            "tag.format.trigger_tokens[0]",
        ),
        ({"format": {"type": "dispatch"}}, "tag.format.rules"),
        ({"format": {"type": "dispatch", "rules": [["a"]]}}, "tag.format.rules[0]"),
        ({"format": {"type": "dispatch", "rules": [[3, ANY]]}}, "tag.format.rules[0][0]"),
        ({"format": {"type": "dispatch", "rules": [["a", 3]]}}, "tag.format.rules[0][1].type"),
        ({"format": {"type": "dispatch", "rules": [], "loop": 1}}, "tag.format.loop"),
        ({"format": {"type": "token_dispatch", "rules": [[[], ANY]]}}, "tag.format.rules[0][0]"),
        ({"format": {"type": "qwen_xml_parameter"}}, "tag.format.json_schema"),
        ({"format": {"type": ["or"]}}, "tag.format.type"),
        ({"format": {"type": "const_string"}}, "tag.format.value"),
        ({"format": {"type": "json_schema"}}, "tag.format.json_schema"),
        ({"format": {"type": "json_schema", "json_schema": {}, "style": "minimax_xml"}}, "tag.format.style"),
        ({"format": {"type": "sequence"}}, "tag.format.elements"),
        ({"format": {"type": "sequence", "elements": [ANY, {"type": "x"}]}}, "tag.format.elements[1].type"),
        ({"format": {"type": "tag", "begin": "a", "end": "b"}}, "tag.format.content.type"),
        ({"format": {**TAG, "type": "tag", "end": ["a", 3]}}, "tag.format.end"),
        ({"format": {**TAG, "type": "tag", "end": ["a", ""]}}, "tag.format.end"),
        ({"format": {**TAG, "type": "tag", "end": []}}, "tag.format.end"),
        ({"format": {**TAG, "type": "tag", "end": None}}, "tag.format.end"),
        ({"format": {"type": "triggered_tags", "tags": [ANY]}}, "tag.format.tags[0]"),
        ({"format": {"type": "triggered_tags", "tags": [TAG], "at_least_one": 1}}, "tag.format.at_least_one"),
        ({"format": {"type": "triggered_tags", "tags": [{**TAG, "x": 1}]}}, "tag.format.tags[0].x"),
        ({"format": {"type": "tags_with_separator", "tags": [TAG], "separator": 3}}, "tag.format.separator"),
    ],
    ids=lambda each: json.dumps(each)[:40],
)
def test_what_is_wrong_is_named(value: Any, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        read_structural_tag("tag", value)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_what_a_message_can_carry_is_not_exceeded() -> None:
    deepest = read_structural_tag("tag", {"format": nested(24)})
    assert type(deepest).FromString(deepest.SerializeToString()) == deepest
    with pytest.raises(ApiError, match="24 deep"):
        read_structural_tag("tag", {"format": nested(500)})
