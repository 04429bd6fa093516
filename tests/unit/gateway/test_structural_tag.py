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
        ({"format": {"type": "repeat", "content": ANY}}, "tag.format.type"),
        ({"format": {"type": "qwen_xml_parameter"}}, "tag.format.json_schema"),
        ({"format": {"type": ["or"]}}, "tag.format.type"),
        ({"format": {"type": "const_string"}}, "tag.format.value"),
        ({"format": {"type": "json_schema"}}, "tag.format.json_schema"),
        ({"format": {"type": "json_schema", "json_schema": {}, "style": "qwen_xml"}}, "tag.format.style"),
        ({"format": {"type": "sequence"}}, "tag.format.elements"),
        ({"format": {"type": "sequence", "elements": [ANY, {"type": "x"}]}}, "tag.format.elements[1].type"),
        ({"format": {"type": "tag", "begin": "a", "end": "b"}}, "tag.format.content.type"),
        ({"format": {**TAG, "type": "tag", "end": ["a", "b"]}}, "tag.format.end"),
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
