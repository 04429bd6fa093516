"""Formats made of formats: what they let through, and which of them have no end."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from google.protobuf import json_format
from llguidance import LLMatcher, LLTokenizer
from stepwire.v1 import inference_pb2 as pb

from control_plane.frontend.format_edges import MAX_DEPTH, MAX_FORMATS
from control_plane.frontend.format_tokens import TokenVocabulary
from control_plane.frontend.grammar import GrammarError
from control_plane.frontend.output_rules import OutputRules
from control_plane.frontend.parsers.registry import OutputFormat
from control_plane.frontend.text_formats import text_format_grammar
from control_plane.frontend.tokenizer import TextTokenizer

SCHEMA = json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
JSON = {"json_schema": SCHEMA}
ARGUMENTS = json.dumps(
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a"]}
)
TAG = {"begin": "<f=one>", "content": JSON, "end": "</f>"}
OTHER = {"begin": "<f=two>", "content": {"regex": "[a-c/]+"}, "end": "</f>"}
ONE, TWO = '<f=one>{"a": 1}</f>', "<f=two>a/b</f>"
TRIGGERED = {"tags": [TAG, OTHER], "triggers": ["<f="]}
FREE = {"any_text": {}}
THINK = {"tag": {"begin": "<t>", "content": FREE, "end": "</t>"}}
NO_TOKENS = TokenVocabulary(lambda _: None, lambda _: None, [])


def source_of(tokenizer: TextTokenizer, fields: dict[str, Any], **options: Any) -> str:
    rules = OutputRules(tokenizer, OutputFormat("", ""))
    layout = json_format.ParseDict(fields, pb.TextFormat())
    return rules.structured(pb.StructuredOutput(text_format=layout, **options), None)


def accepts(table: LLTokenizer, tokenizer: TextTokenizer, source: str, text: str) -> bool:
    matcher = LLMatcher(table, source, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    ids = asyncio.run(tokenizer.encode_text(text, add_special_tokens=False)).tolist()
    return bool(matcher.consume_tokens(ids)) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("fields", "right", "wrong"),
    [
        ({"const_string": "Yes/no."}, ["Yes/no."], ["Yes", "Yes/no. "]),
        ({"const_string": "a<[5]>b"}, ["a<[5]>b"], ["a<file_sep>b", "ab"]),
        (JSON, ['{"a": 1}'], ['{"a": "1"}', "1"]),
        (
            {"tag": {"begin": "<function=f>\n", "content": {"qwen_parameters": ARGUMENTS}, "end": "</function>"}},
            ["<function=f>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\nx <y>\n</parameter>\n</function>"],
            ["<function=f>\n<parameter=b>\nx\n</parameter>\n</function>", '<function=f>\n{"a": 1}</function>'],
        ),
        ({"regex": "[a-c/]+"}, ["a/b"], ["d", ""]),
        ({"grammar": {"text": 'start: "x" NUM\nNUM: /[0-9]/'}}, ["x1"], ["x"]),
        ({"grammar": {"text": 'root ::= "a" ("b" | root)'}}, ["aab"], ["aa"]),
        (FREE, ["", "Whatever <f=one>", "a\nb"], []),
        ({"any_text": {"excluded": ["no!", "never"]}}, ["", "no, not"], ["oh no!", "I never said"]),
        ({"tag": TAG}, [ONE], [ONE + " ", "Hi " + ONE, "<f=one>1</f>"]),
        (THINK, ["<t>Hm, <t>.</t>", "<t></t>"], ["<t>Hm</t> more", "<t>Hm", "Hm</t>"]),
        (
            {"tag": {"begin": "", "content": {"any_text": {"excluded": ["x"]}}, "end": "</t>"}},
            ["Hm.</t>", "</t>"],
            ["x</t>", "Hm"],
        ),
        (
            {"tag": {"begin": "<a>", "content": FREE, "end": "</a>", "other_ends": ["!", "\n"]}},
            ["<a>b</a>", "<a>b!", "<a>\n"],
            ["<a>b", "<a>b! ", "<a>b!</a>"],
        ),
        (
            {"tag": {"begin": "<a>", "content": JSON, "end": "</a>", "other_ends": ["!"]}},
            ['<a>{"a": 1}</a>', '<a>{"a": 1}!'],
            ['<a>{"a": 1}', '<a>{"a": 1}!</a>'],
        ),
        # An inner tag's end alone ends its text; one without an end ends with the outer one.
        (
            {"tag": {"begin": "[", "content": {"tag": {"begin": "(", "content": FREE, "end": ")"}}, "end": "]"}},
            ["[(a])]", "[()]"],
            ["[(a])", "[(a]", "[(a) ]"],
        ),
        (
            {"tag": {"begin": "[", "content": {"tag": {"begin": "(", "content": FREE}}, "end": "]"}},
            ["[(a b]", "[(]"],
            ["[(a] b]", "[(a"],
        ),
        ({"any_of": {"formats": [{"tag": TAG}, {"const_string": "no"}]}}, [ONE, "no"], ["yes", ""]),
        (
            {"sequence": {"formats": [THINK, {"const_string": "\n"}, {"tag": TAG}]}},
            ["<t>Hm</t>\n" + ONE],
            ["\n" + ONE, "<t>Hm</t>" + ONE, "<t>Hm</t>\n"],
        ),
        (
            {"sequence": {"formats": [THINK, {"triggered_tags": TRIGGERED}]}},
            ["<t>Hm <f=no></t>Look: " + ONE + ", " + TWO, "<t></t>", "<t></t>Just text."],
            ["Just text.", "<t></t><f=three>", "<t></t><f=one>1</f>"],
        ),
        ({"triggered_tags": TRIGGERED}, ["", "Hi", ONE, f"Hi {ONE}{TWO} you"], ["<f=", "<f=two>d</f>"]),
        ({"triggered_tags": {"tags": [TAG]}}, ["<f=two>", f"a {ONE} b"], ["<f=one>1</f>"]),
        ({"triggered_tags": {**TRIGGERED, "excluded": ["<g"]}}, [f"Hi {ONE}"], [f"Hi <g {ONE}", f"{ONE} <g"]),
        ({"triggered_tags": {**TRIGGERED, "at_least_one": True}}, [ONE, f"{TWO} and {ONE}."], ["", "Hi", f"Hi {ONE}"]),
        (
            {"triggered_tags": {**TRIGGERED, "stop_after_first": True}},
            ["", "Hi", ONE, f"Hi {ONE}"],
            [f"{ONE} ", f"{ONE}{TWO}"],
        ),
        (
            {"triggered_tags": {**TRIGGERED, "stop_after_first": True, "at_least_one": True}},
            [ONE, TWO],
            ["", f"Hi {ONE}", f"{ONE}{TWO}"],
        ),
        (
            {"tag": {"begin": "[", "content": {"triggered_tags": TRIGGERED}, "end": "]"}},
            ["[]", f"[so {ONE} and {TWO}]"],
            [f"[{ONE}", f"[{ONE}] ", "["],
        ),
        (
            {"tag": {"begin": "[", "content": {"triggered_tags": {**TRIGGERED, "stop_after_first": True}}, "end": "]"}},
            ["[]", "[so]", f"[so {ONE}]"],
            [f"[{ONE}", f"[{ONE} ]", f"[{ONE}{TWO}]"],
        ),
        (
            {"separated_tags": {"tags": [TAG, OTHER], "separator": ", "}},
            ["", ONE, f"{ONE}, {TWO}, {TWO}"],
            ["Hi", f"{ONE}{TWO}", f"{ONE}, "],
        ),
        (
            {"separated_tags": {"tags": [TAG, OTHER], "separator": "", "at_least_one": True}},
            [ONE, ONE + TWO],
            ["", f"{ONE}, {TWO}"],
        ),
        (
            {"separated_tags": {"tags": [TAG], "separator": ";", "at_least_one": True, "stop_after_first": True}},
            [ONE],
            ["", f"{ONE};{ONE}"],
        ),
    ],
    ids=lambda each: json.dumps(each)[:60],
)
def test_what_is_let_through(
    fields: dict[str, Any], right: list[str], wrong: list[str], tokenizer: TextTokenizer, table: LLTokenizer
) -> None:
    source = source_of(tokenizer, fields)
    for text in right:
        assert accepts(table, tokenizer, source, text), text
    for text in wrong:
        assert not accepts(table, tokenizer, source, text), text


def test_json_within_is_compact_where_that_is_asked_for(tokenizer: TextTokenizer, table: LLTokenizer) -> None:
    source = source_of(tokenizer, {"tag": TAG}, compact_json=True)
    assert accepts(table, tokenizer, source, '<f=one>{"a":1}</f>')
    assert not accepts(table, tokenizer, source, ONE)


def test_free_text_ends_at_a_special_token(tokenizer: TextTokenizer, table: LLTokenizer) -> None:
    end = "<|im_end|>"
    source = text_format_grammar(
        pb.TextFormat(tag=pb.FormatTag(begin="a", content=pb.TextFormat(any_text=pb.AnyText()), end=end)),
        literal=lambda text: f"<[{tokenizer.special_id(text)}]>" if text == end else json.dumps(text),
        special_id=tokenizer.special_id,
        vocabulary=NO_TOKENS,
    )
    assert accepts(table, tokenizer, source, f"a b {end}")
    assert not accepts(table, tokenizer, source, f"a b {end} c")


def test_free_text_ends_at_a_special_token_or_at_a_text(tokenizer: TextTokenizer, table: LLTokenizer) -> None:
    tag = {"tag": {"begin": "a", "content": FREE, "end": "<file_sep>", "other_ends": ["!", "<gh_stars>", "?"]}}
    source = source_of(tokenizer, tag)
    for text in ("a b<file_sep>", "a b!", "a<gh_stars>", "a b?"):
        assert accepts(table, tokenizer, source, text), text
    for text in ("a b", "a b!!", "a<gh_stars>?", "a<repo_name>!"):
        assert not accepts(table, tokenizer, source, text), text


@pytest.mark.parametrize(
    ("fields", "right", "wrong"),
    [
        ({"const_string": "<|im_start|>f"}, ["<|im_start|>f"], ["f"]),
        (
            {"tag": {"begin": "<|im_start|>f ", "content": JSON, "end": "<file_sep>"}},
            ['<|im_start|>f {"a": 1}<file_sep>'],
            ['f {"a": 1}<file_sep>', '<|im_start|>f {"a": 1}'],
        ),
        (
            {"triggered_tags": {"tags": [{**TAG, "begin": "<|im_start|>f "}], "triggers": ["<|im_start|>f"]}},
            ["Hm.", 'Hm. <|im_start|>f {"a": 1}</f> Hm.', '<|im_start|>f {"a": 1}</f>'],
            ["Hm. <|im_start|>", '<|im_start|>g {"a": 1}</f>', "<|im_start|>f 1</f>"],
        ),
    ],
)
def test_a_special_token_that_is_spelled_out_is_the_token(
    fields: dict[str, Any], right: list[str], wrong: list[str], tokenizer: TextTokenizer, table: LLTokenizer
) -> None:
    source = source_of(tokenizer, fields)
    assert [text for text in right if not accepts(table, tokenizer, source, text)] == []
    assert [text for text in wrong if accepts(table, tokenizer, source, text)] == []


def test_text_that_is_forced_without_end_holds_nobody_up(tokenizer: TextTokenizer, table: LLTokenizer) -> None:
    repeated = {"repeat": {"format": {"regex": "a+"}, "min": 2, "max": 3}}
    assert not accepts(table, tokenizer, source_of(tokenizer, repeated), "aaab")


def test_formats_without_tokens_are_written_without_any(tokenizer: TextTokenizer) -> None:
    """As they were before tokens could be named."""
    triggered = {"tags": [{"begin": "<f>", "content": {"const_string": "a"}, "end": "</f>"}], "excluded": ["x"]}
    tag = {"begin": "<[5]>", "content": {"sequence": {"formats": [THINK, {"triggered_tags": triggered}]}}, "end": "]"}
    *rules, last = source_of(tokenizer, {"tag": tag}).splitlines()
    assert last == '%llguidance {"no_forcing": true}'
    assert rules == [
        'start: "<[5]>" "<t>" rule_1 ((rule_4 rule_2))* rule_6',
        "TEXT_0: /(.|\\n)*/",
        'rule_1[lazy]: TEXT_0 "</t>"',
        'rule_2: ("a" "</f>")',
        "TEXT_3: /(.|\\n)*/ & ~/(.|\\n)*(x)(.|\\n)*/",
        'rule_4[lazy]: TEXT_3 "<f>"',
        "TEXT_5: /(.|\\n)*/ & ~/(.|\\n)*(x)(.|\\n)*/",
        'rule_6[lazy]: TEXT_5 "]"',
    ]


def nested(depth: int) -> dict[str, Any]:
    return {"any_of": {"formats": [nested(depth - 1)]}} if depth > 1 else {"const_string": "a"}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"const_string": ""},
        {"sequence": {}},
        {"any_of": {"formats": []}},
        {"separated_tags": {"tags": []}},
        {"triggered_tags": {"tags": []}},
        {"tag": {"begin": "a", "end": "b"}},
        {"triggered_tags": {"tags": [TAG], "triggers": ["<g"]}},
        {"triggered_tags": {"tags": [{**TAG, "begin": ""}]}},
        {"triggered_tags": {"tags": [{"begin": "a", "content": FREE}]}},
        {"separated_tags": {"tags": [{"begin": "a", "content": FREE}]}},
        {"sequence": {"formats": [FREE, {"const_string": "a"}]}},
        {"sequence": {"formats": [{"any_of": {"formats": [JSON, {"triggered_tags": TRIGGERED}]}}, JSON]}},
        {"any_text": {"excluded": [""]}},
        {"tag": {"begin": "a", "content": JSON, "other_ends": ["b"]}},
        {"tag": {"begin": "a", "content": JSON, "end": "b", "other_ends": [""]}},
        {"json_schema": "{"},
        {"qwen_parameters": "{"},
        nested(MAX_DEPTH + 1),
        {"any_of": {"formats": [{"const_string": "a"}] * MAX_FORMATS}},
        {"const_string": "a" * 300_000},
    ],
    ids=lambda each: json.dumps(each)[:60],
)
def test_what_is_refused(fields: dict[str, Any], tokenizer: TextTokenizer) -> None:
    with pytest.raises(GrammarError):
        text_format_grammar(
            json_format.ParseDict(fields, pb.TextFormat()),
            literal=json.dumps,
            special_id=tokenizer.special_id,
            vocabulary=NO_TOKENS,
        )
    assert source_of(tokenizer, nested(MAX_DEPTH))
