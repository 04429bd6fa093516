"""Arguments that are no JSON: what their grammars let through, the parser makes a value of the tool's schema."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer
from stepwire.v1 import inference_pb2 as pb
from tokenizers import AddedToken, Tokenizer

from control_plane.frontend import text_constraints
from control_plane.frontend.argument_forms import tagged_arguments
from control_plane.frontend.gemma4_arguments import gemma4_arguments
from control_plane.frontend.grammar import GrammarError, lark_grammar
from control_plane.frontend.output_rules import OutputRules
from control_plane.frontend.parsers.registry import TOOL_FORMATS, OutputFormat, schemas_of
from control_plane.frontend.parsers.tagged_calls import DEEPSEEK_V32, GLM45, MINIMAX_M2, QWEN3_CODER, SEED_OSS
from control_plane.frontend.python_arguments import python_arguments
from control_plane.frontend.tokenizer import TextTokenizer

VOCAB_SIZE, EOS = 49152, 2
LETTER = {"type": "string", "pattern": "^[a-z]{1,6}$"}


def of(properties: dict[str, Any], *required: str, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), **more}


SCHEMAS: dict[str, dict[str, Any]] = {
    "nothing": of({}, additionalProperties=False),
    "text": of({"city": {"type": "string"}}, "city"),
    "optional": of({"a": {"type": "integer"}, "b": {"type": "boolean"}, "c": {"type": "null"}}, "b"),
    "all optional": of({"a": {"type": "integer", "minimum": 3, "maximum": 12}, "b": {"enum": ["x", "y z"]}}),
    "nullable": of(
        {"a": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "b": {"type": ["string", "null"]}}, "a", "b"
    ),
    "listed": of({"a": {"type": "string", "enum": ["red", 'dark "red"', "3"]}, "b": {"const": 4}}, "a", "b"),
    "constrained": of({"a": LETTER, "b": {"type": "string", "minLength": 2, "maxLength": 4}}, "a", "b"),
    "formats": of({"day": {"type": "string", "format": "date"}, "id": {"type": "string", "format": "uuid"}}, "day"),
    "lists": of({"a": {"type": "array", "items": {"enum": ["x", 1, None]}, "minItems": 1, "maxItems": 3}}, "a"),
    "objects": of({"a": of({"b": LETTER, "c": {"type": "number"}}, "b", additionalProperties=False)}, "a"),
    "references": {
        "$defs": {"name": LETTER, "node": of({"v": {"$ref": "#/$defs/name"}, "next": {"$ref": "#/$defs/node"}}, "v")},
        **of({"name": {"$ref": "#/$defs/name"}, "list": {"$ref": "#/$defs/node"}}, "name"),
    },
    "several types": of(
        {"a": {"type": ["integer", "boolean"]}, "b": {"anyOf": [{"type": "integer"}, LETTER]}}, "a", "b"
    ),
    "further": of({"a": {"type": "integer"}}, "a", additionalProperties={"type": "boolean"}),
    "untyped": of({"a": {}}, "a"),
}


def walk(
    matcher: LLMatcher, closers: np.ndarray[Any, np.dtype[np.bool_]], end: Sequence[int], draw: random.Random
) -> list[int] | None:
    """Random tokens that the grammar allows; None if it finds no end. end: what ends a bare text."""
    token_ids: list[int] = []
    while len(token_ids) < 400:
        mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little")[: len(closers)])
        assert len(allowed), matcher.get_error()
        if EOS in allowed:
            return token_ids
        if draw.random() < 0.1 and matcher.validate_tokens(end) == len(end):
            assert matcher.consume_tokens(end)
            token_ids += end
            continue
        closing = allowed[closers[allowed]]
        chosen = int(draw.choice(closing if len(closing) and draw.random() < 0.5 else allowed))
        assert matcher.consume_tokens([chosen])
        token_ids.append(chosen)
    return None


def arguments_of(output_format: OutputFormat, schema: str, text: str) -> list[tuple[str, bool]]:
    start = output_format.start(schemas_of([("call.it", schema)]), "")
    assert start is not None
    parser = start()
    joined: dict[int, tuple[str, bool]] = {}
    for delta in [*map(parser.push, text), parser.finish()]:
        assert not delta.text.strip("\n")
        for call in delta.calls:
            before, complete = joined.get(call.index, ("", False))
            joined[call.index] = (before + call.arguments, complete or call.complete)
    return list(joined.values())


# What ends a bare text of each; in JSON there is none.
BARE_ENDS = {
    "qwen3_coder": "\n</parameter>\n",
    "seed_oss": "</parameter>\n",
    "minimax_m2": "</parameter>\n",
    "glm45": "</arg_value>\n",
    "deepseek_v32": "</｜DSML｜parameter>\n",
    "gemma4": '<|"|>',
    "gemma3": "'",
    "hermes": "",
}


class Vocabulary:
    """A tokenizer, and what is allowed over it. marks: its special tokens."""

    def __init__(self, smollm2_dir: Path, marks: Sequence[str] = ()) -> None:
        tokenizer = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))
        tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
        self.size = tokenizer.get_vocab_size()
        self.tokenizer = TextTokenizer(tokenizer)
        self.table = LLTokenizer(self.tokenizer.to_json(), n_vocab=self.size, eos_token=[EOS])
        texts = [tokenizer.decode([token_id], skip_special_tokens=False) for token_id in range(self.size)]
        self.closers = np.array(
            [(text[:1] in tuple("\n\"'<)]}") and len(text) < 4) or text in marks for text in texts]
        )  # [size]
        self._decode = partial(tokenizer.decode, skip_special_tokens=False)
        self._encode = partial(tokenizer.encode, add_special_tokens=False)

    def ids(self, text: str) -> list[int]:
        return list(self._encode(text).ids)

    def text(self, token_ids: Sequence[int]) -> str:
        return str(self._decode(list(token_ids)))


@pytest.fixture(scope="module")
def plain(smollm2_dir: Path) -> Vocabulary:
    return Vocabulary(smollm2_dir)


@pytest.fixture(scope="module")
def marked(smollm2_dir: Path) -> Vocabulary:
    return Vocabulary(smollm2_dir, sorted({mark for each in BARE_ENDS for mark in TOOL_FORMATS[each].marks}))


def check_walks(name: str, schema: dict[str, Any], vocabulary: Vocabulary, num_walks: int) -> None:
    output_format, text = OutputFormat(name, ""), json.dumps(schema)
    tool = pb.Tool(function=pb.FunctionTool(name="call.it", parameters=text))
    chat = pb.ChatInput(tools=[tool], tool_choice=pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_REQUIRED))
    source = OutputRules(vocabulary.tokenizer, output_format).forced_calls(chat, "")
    whole = LLMatcher(vocabulary.table, source, log_level=0)
    assert not whole.is_error(), whole.get_error()
    end = vocabulary.ids(BARE_ENDS[name])
    num_done = 0
    for beginning in ("[", "{") if name == "gemma3" else ("",):
        opened = whole.deep_copy()
        assert opened.consume_tokens(vocabulary.ids(beginning)), "a form that cannot be begun"
        for seed in range(num_walks):
            drawn = walk(opened.deep_copy(), vocabulary.closers, end, random.Random(seed))
            if drawn is None:
                continue
            num_done += 1
            said = beginning + vocabulary.text(drawn)
            calls = arguments_of(output_format, text, said)
            assert calls, said
            for arguments, complete in calls:
                assert complete, said
                jsonschema.validate(json.loads(arguments), schema)
    assert num_done


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
@pytest.mark.parametrize("name", BARE_ENDS)
def test_whatever_may_be_drawn_is_a_value_of_the_schema(name: str, schema: dict[str, Any], plain: Vocabulary) -> None:
    check_walks(name, schema, plain, 2)


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
@pytest.mark.parametrize("name", ["glm45", "deepseek_v32", "gemma4"])
def test_so_it_is_where_the_marks_are_special_tokens(name: str, schema: dict[str, Any], marked: Vocabulary) -> None:
    check_walks(name, schema, marked, 2)


# None: no call is complete.
READ: list[tuple[str, dict[str, Any], str, dict[str, Any] | None]] = [
    ("qwen3_coder", SCHEMAS["text"], "<parameter=city>\n12\n</parameter>\n", {"city": "12"}),
    ("qwen3_coder", SCHEMAS["text"], '<parameter=city>\n\n"a"\\n\n\n</parameter>\n', {"city": '\n"a"\\n\n'}),
    (
        "qwen3_coder",
        SCHEMAS["text"],
        "<parameter=city>\n<b>a</b> </param\n</parameter>\n",
        {"city": "<b>a</b> </param"},
    ),
    (
        "qwen3_coder",
        SCHEMAS["nullable"],
        "<parameter=a>\nnull\n</parameter>\n<parameter=b>\nnull!\n</parameter>\n",
        {"a": None, "b": "null!"},
    ),
    (
        "qwen3_coder",
        SCHEMAS["untyped"],
        '<parameter=a>\n{"x": "</parameter>"}\n</parameter>\n',
        {"a": {"x": "</parameter>"}},
    ),
    ("glm45", SCHEMAS["text"], "<arg_key>city</arg_key>\n<arg_value> 12\n</arg_value>\n", {"city": " 12\n"}),
    ("glm45", SCHEMAS["nullable"], "<arg_key>a</arg_key><arg_value>null</arg_value>", {"a": None}),
    ("glm45", SCHEMAS["untyped"], "<arg_key>a</arg_key>\n<arg_value>NaN</arg_value>\n", {"a": "NaN"}),
    (
        "deepseek_v32",
        SCHEMAS["untyped"],
        '<｜DSML｜parameter name="a" string="true">3</｜DSML｜parameter>\n',
        {"a": "3"},
    ),
    (
        "deepseek_v32",
        SCHEMAS["untyped"],
        '<｜DSML｜parameter name="a" string="false">[3, "</｜DSML｜parameter>"]</｜DSML｜parameter>\n',
        {"a": [3, "</｜DSML｜parameter>"]},
    ),
    (
        "gemma4",
        SCHEMAS["untyped"],
        'a:{b:[1,-2.5,true,None,<|"|>x, }"<|"|>,{}],c:New York}',
        {"a": {"b": [1, -2.5, True, None, 'x, }"', {}], "c": "New York"}},
    ),
    ("gemma4", SCHEMAS["untyped"], "a:" + "[" * 100 + "]" * 100, None),
    ("gemma3", SCHEMAS["optional"], "a = 1, b=True,c=None", {"a": 1, "b": True, "c": None}),
    ("gemma3", SCHEMAS["text"], "city='it\\'s \"here\"\\n'", {"city": 'it\'s "here"\n'}),
    ("gemma3", SCHEMAS["untyped"], 'a={"x": [1, -2.5e3, (True)], }', {"a": {"x": [1, -2500.0, True]}}),
]


@pytest.mark.parametrize(("name", "schema", "written", "value"), READ)
def test_values_are_read_as_they_are_meant(
    name: str, schema: dict[str, Any], written: str, value: dict[str, Any] | None
) -> None:
    syntax = TOOL_FORMATS[name].syntax
    text = (
        f"{syntax.begin_section}{syntax.before_name}call.it{syntax.after_name}{written}{syntax.end}{syntax.end_section}"
    )
    if name == "gemma3":
        text = f"[call.it({written})]"
    ((arguments, complete),) = arguments_of(OutputFormat(name, ""), json.dumps(schema), text)
    assert complete == (value is not None)
    assert value is None or json.loads(arguments) == value


FORMATS = {
    "date": (["2024-02-29"], ["2024-13-01", "2024-1-1"]),
    "time": (["10:00:00Z", "23:59:60.5+01:00"], ["25:00:00Z", "10:00:00"]),
    "date-time": (["2024-02-29T10:00:00Z"], ["2024-02-29 10:00:00Z"]),
    "duration": (["P1Y2M3DT4H5M6S", "PT5M", "P2W"], ["P", "P1S", "1D"]),
    "email": (["a.b@c.org"], ["a", "a@", "@b"]),
    "hostname": (["a.b-c.org"], ["-a", "a..b"]),
    "ipv4": (["127.0.0.1"], ["127.0.0.256", "1.2.3"]),
    "ipv6": (["::", "::1", "2001:db8::8:800:200c:417a", "1:2:3:4:5:6:7:8", "1::"], ["1:2", ":::", "12345::"]),
    "uuid": (["12345678-1234-1234-1234-123456789abc"], ["12345678"]),
    "uri": (["https://a.org/b?c=d#e", "mailto:a@b.org"], ["a.org", "http://a b"]),
}
PATTERNS = {
    "a/b": (["xa/by"], ["a-b"]),
    "^[^$^/]{2}$": (["ab"], ["a/", "abc"]),
    r"^\d+\$$": (["12$"], ["12", "\u0967$"]),
    "(a|b)$": (["xa"], ["ax"]),
    "a|b": (["xay", "b"], ["c"]),
}


def text_matcher(table: LLTokenizer, schema: dict[str, Any]) -> LLMatcher:
    source = lark_grammar(f"start: TEXT\nTEXT: {text_constraints.text_terminal(schema, schema)}")
    matcher = LLMatcher(table, source, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher


@pytest.mark.parametrize(
    ("keyword", "value", "valid", "invalid"),
    [
        *(("format", name, *examples) for name, examples in FORMATS.items()),
        *(("pattern", pattern, *examples) for pattern, examples in PATTERNS.items()),
    ],
)
def test_bare_strings_are_held_to_what_the_schema_says(
    table: LLTokenizer, keyword: str, value: str, valid: list[str], invalid: list[str]
) -> None:
    matcher = text_matcher(table, {"type": "string", keyword: value})
    for text in (*valid, *invalid):
        each = matcher.deep_copy()
        passes = bool(each.consume_tokens(table.tokenize_str(text))) and each.is_accepting()
        assert passes == (text in valid), text


@pytest.mark.parametrize(
    "value",
    [
        {"type": "string", "not": {"const": "x"}},
        {"type": "string", "pattern": "^a|b$"},
        {"type": "string", "pattern": "a^b"},
        {"type": "string", "format": "idn-email"},
        {"type": "string", "$ref": "#/properties/a"},
    ],
)
def test_what_cannot_be_held_is_refused(value: dict[str, Any]) -> None:
    in_tags = [partial(tagged_arguments, tags) for tags in (QWEN3_CODER, SEED_OSS, MINIMAX_M2, GLM45, DEEPSEEK_V32)]
    forms = (*in_tags, python_arguments, gemma4_arguments)
    for form in forms:
        with pytest.raises(GrammarError):
            form(json.dumps(of({"a": value}, "a")), "args_0")
    for more in ({"minProperties": 1}, {"anyOf": [{"required": ["a"]}]}, {"patternProperties": {}}):
        for form in forms:
            with pytest.raises(GrammarError):
                form(json.dumps(of({}, **more)), "args_0")
    for form in in_tags:
        with pytest.raises(GrammarError):
            form(json.dumps(of({"a>b": {}})), "args_0")
    with pytest.raises(GrammarError):
        gemma4_arguments(json.dumps(of({"a:b": {}})), "args_0")
    with pytest.raises(GrammarError):
        gemma4_arguments(json.dumps(of({"a": {"const": '<|"|>'}})), "args_0")
    with pytest.raises(GrammarError):
        python_arguments(json.dumps(of({"a-b": {}})), "args_0")
