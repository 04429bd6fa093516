"""Formats become grammars: what they allow, which keywords are refused, and that nothing explodes."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizers import Tokenizer

from control_plane.frontend import grammar
from control_plane.frontend.bad_words import BadWords
from control_plane.frontend.grammar import GrammarCompiler, GrammarError
from control_plane.frontend.tokenizer import TextTokenizer

VOCAB_SIZE = 49152
EOS = 2


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))


@pytest.fixture(scope="module")
def shared(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer.to_str(), VOCAB_SIZE, [EOS])


@pytest.fixture
async def compiler(shared: GrammarCompiler) -> AsyncIterator[GrammarCompiler]:
    yield shared


def allowed(matcher: Any) -> set[int]:
    words = np.zeros(-(-VOCAB_SIZE // 32), dtype=np.uint32)
    matcher.fill_mask(words)
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


async def accepts(compiler: GrammarCompiler, tokenizer: Tokenizer, source: str, text: str) -> bool:
    """Every token of the text is in the mask of its place, and the end is allowed after it."""
    matcher = (await compiler.compile(source)).start()
    for token_id in tokenizer.encode(text, add_special_tokens=False).ids:
        if matcher.is_over or token_id not in allowed(matcher):
            return False
        matcher.accept([token_id])
        assert not matcher.error
    return matcher.is_over or EOS in allowed(matcher)


# (schema, valid values, values that are not)
KEYWORDS: list[tuple[dict[str, Any], list[Any], list[Any]]] = [
    ({"type": "integer"}, [3, -7], [1.5, "x"]),
    ({"type": ["string", "null"]}, ["x", None], [3]),
    ({"enum": ["a", 1, None]}, ["a", 1, None], ["b", 2]),
    ({"const": {"a": 1}}, [{"a": 1}], [{"a": 2}]),
    ({"anyOf": [{"type": "string"}, {"type": "boolean"}]}, ["x", True], [3]),
    ({"allOf": [{"minimum": 3}, {"type": "integer", "maximum": 5}]}, [3, 5], [2, 6]),
    ({"oneOf": [{"type": "string"}, {"type": "integer"}]}, ["x", 3], [None]),
    ({"$ref": "#/$defs/x", "$defs": {"x": {"type": "null"}}}, [None], [0]),
    ({"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2}, [[1], [1, 2]], [[], [1, 2, 3]]),
    (
        {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}], "items": False, "minItems": 2},
        [["a", 1]],
        [[1, "a"], ["a"]],
    ),
    (
        {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
            "required": ["a"],
            "additionalProperties": False,
        },
        [{"a": 1}, {"a": 1, "b": "x"}],
        [{}, {"b": "x"}, {"a": 1, "c": 2}],
    ),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, [{}, {"x": 1}], [{"x": "y"}]),
    (
        {"patternProperties": {"^x": {"type": "null"}}, "type": "object", "additionalProperties": False},
        [{"xa": None}],
        [{"a": None}],
    ),
    ({"type": "object", "minProperties": 1, "maxProperties": 1}, [{"a": 1}], [{}, {"a": 1, "b": 2}]),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "abc"], ["a", "abcd"]),
    ({"type": "string", "pattern": "^[A-Z]{2}[0-9]$"}, ["AB1"], ["ab1", "AB12"]),
    ({"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 10, "multipleOf": 3}, [3, 9], [0, 4, 12]),
    ({"type": "number", "minimum": -1, "maximum": 1}, [0.5, -1], [1.5]),
    ({"type": "string", "format": "date"}, ["2024-02-29"], ["2024-13-01"]),
    ({"type": "string", "format": "time"}, ["10:00:00Z"], ["25:00:00Z"]),
    ({"type": "string", "format": "date-time"}, ["2024-02-29T10:00:00Z"], ["2024-02-29"]),
    ({"type": "string", "format": "uuid"}, ["12345678-1234-1234-1234-123456789abc"], ["x"]),
    ({"type": "string", "format": "ipv4"}, ["127.0.0.1"], ["127.0.0.256"]),
    ({"type": "string", "format": "email"}, ["a@b.org"], ["a"]),
    ({"type": "string", "format": "duration"}, ["P1DT2H", "PT5M"], ["1D", "P"]),
    ({"type": "string", "format": "hostname"}, ["a.b-c.org"], ["-a.org"]),
    ({"type": "string", "format": "ipv6"}, ["::1", "2001:db8::8:800:200c:417a"], ["12345::"]),
    ({"type": "string", "format": "uri"}, ["https://a.org/b?c=d#e"], ["a b"]),
    ({"type": "number", "multipleOf": 0.5}, [1.5, 2], [1.3]),
    ({"type": "string", "pattern": "b"}, ["abc", "b"], ["ac"]),
    ({"minLength": 2, "type": ["string", "integer"]}, ["ab", 1], ["a"]),
    ({"type": "array", "items": {"$ref": "#"}}, [[], [[], [[]]]], [[1]]),
    # Without effect: annotations, and what the specification does not know.
    (
        {"type": "null", "title": "t", "default": 3, "examples": [1], "x-odd": {}, "contentEncoding": "base64"},
        [None],
        [3],
    ),
    # A property that is required without being described.
    ({"type": "object", "properties": {}, "required": ["a"]}, [{"a": [1]}], [{}]),
    ({"type": "object", "properties": {"a": False}}, [{}, {"b": 1}], [{"a": 1}]),
]


@pytest.mark.parametrize(("schema", "valid", "invalid"), KEYWORDS)
async def test_documented_keywords_are_enforced(
    compiler: GrammarCompiler, tokenizer: Tokenizer, schema: dict[str, Any], valid: list[Any], invalid: list[Any]
) -> None:
    source = grammar.json_schema_grammar(json.dumps(schema))
    # The examples are what the specification says, formats apart: those need packages of their own to be checked.
    judge = jsonschema.Draft202012Validator(schema)
    assert all(map(judge.is_valid, valid))
    assert "format" in schema or not any(map(judge.is_valid, invalid))
    for value in valid:
        assert await accepts(compiler, tokenizer, source, json.dumps(value)), value
    for value in invalid:
        assert not await accepts(compiler, tokenizer, source, json.dumps(value)), value


@pytest.mark.parametrize(
    "schema",
    [
        {"not": {}},
        {"if": {"type": "string"}, "then": {"minLength": 2}},
        {"contains": {"type": "string"}},
        {"type": "array", "contains": {"type": "null"}, "minContains": 2, "maxContains": 3},
        {"type": "array", "unevaluatedItems": False},
        {"type": "string", "minLength": 3, "maxLength": 2},
        {"type": "array", "uniqueItems": True},
        {"dependentRequired": {"a": ["b"]}},
        {"dependentSchemas": {}},
        {"propertyNames": {"pattern": "a"}},
        {"unevaluatedProperties": False},
        {"$dynamicRef": "#x"},
        {"$ref": "http://example.org/schema"},
        {"type": "string", "format": "idn-email"},
        {"type": "string", "pattern": "(?=a)b"},
        {"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 2}]},
        {"patternProperties": {"a": {"type": "string"}, "ab": {"type": "number"}}},
    ],
)
async def test_keywords_that_cannot_be_enforced_are_refused(compiler: GrammarCompiler, schema: dict[str, Any]) -> None:
    with pytest.raises(GrammarError):
        await compiler.compile(grammar.json_schema_grammar(json.dumps(schema)))


def deep(levels: int) -> str:
    return '{"items":' * levels + "{}" + "}" * levels


REFERENCES = {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}, {"$ref": f"#/$defs/a{i + 1}"}]} for i in range(20)}
BOMB = json.dumps({"$ref": "#/$defs/a0", "$defs": {**REFERENCES, "a20": {"type": "string", "minLength": 99999}}})


@pytest.mark.parametrize(
    "make",
    [
        lambda: grammar.json_schema_grammar(deep(5000)),
        lambda: grammar.json_schema_grammar('{"enum":["' + "x" * 300_000 + '"]}'),
        lambda: grammar.json_schema_grammar("{"),
        lambda: grammar.json_schema_grammar("[]"),
        lambda: grammar.regex_grammar("(" * 500 + ")" * 500),
        lambda: grammar.regex_grammar("((a{900}){900}){900}b"),
        lambda: grammar.regex_grammar("((a{900}){900}){9}b"),
        lambda: grammar.regex_grammar("["),
        lambda: grammar.choice_grammar([]),
        lambda: grammar.choice_grammar(["a"] * 5000),
        lambda: grammar.context_free_grammar("start: missing", "lark"),
        lambda: grammar.context_free_grammar("start: " + "(" * 100_000, "lark"),
        lambda: grammar.context_free_grammar("nonsense ::=", "gbnf"),
    ],
)
async def test_bombs_and_nonsense_are_refused(compiler: GrammarCompiler, make: Any) -> None:
    with pytest.raises((GrammarError, ValueError)):
        await compiler.compile(make())


ENDLESS = "x x\nx: /a+/"


@pytest.mark.parametrize(
    "text",
    [
        f"start: {ENDLESS}",
        f'start: "b" {ENDLESS}',
        f'%llguidance {{"no_forcing": false}}\nstart: {ENDLESS}',
        f'start: "b" n\nn: %lark {{\n%llguidance {{"no_forcing": false}}\nstart: {ENDLESS}\n}}',
    ],
)
async def test_text_that_is_forced_without_end_holds_nobody_up(
    compiler: GrammarCompiler, tokenizer: Tokenizer, text: str
) -> None:
    """Neither when it is compiled nor when a text comes to it."""
    source = grammar.context_free_grammar(text, "lark")
    for whole, before in ((source, ""), (grammar.after(source, '"c"', ""), "c")):
        await goes_on(compiler, tokenizer, whole, before + ("b" if '"b"' in text else "") + "aaa")


async def goes_on(compiler: GrammarCompiler, tokenizer: Tokenizer, source: str, text: str) -> None:
    """With another "a" after the text."""
    matcher = (await compiler.compile(source)).start()
    for character in text:
        token_id = tokenizer.token_to_id(character)
        assert token_id in allowed(matcher)
        matcher.accept([token_id])
    assert tokenizer.token_to_id("a") in allowed(matcher) and not matcher.is_over


async def test_whoever_waits_behind_a_bomb_is_served(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes too long cannot be interrupted; it keeps its thread, and others get another one."""
    compiler = GrammarCompiler(tokenizer.to_str(), VOCAB_SIZE, [EOS])
    await compiler.compile(grammar.regex_grammar("a"))
    begun, stuck, compile_one = threading.Event(), threading.Event(), compiler._compile

    def slow(source: str) -> Any:
        if "bomb" in source:
            begun.set()
            stuck.wait(300)
        return compile_one(source)

    monkeypatch.setattr(compiler, "_compile", slow)
    monkeypatch.setattr(grammar, "COMPILE_TIMEOUT_S", 0.5)
    bomb = asyncio.create_task(compiler.compile(grammar.regex_grammar("bomb")))
    assert await asyncio.to_thread(begun.wait, 100)
    monkeypatch.setattr(grammar, "COMPILE_TIMEOUT_S", 100)
    behind = asyncio.create_task(compiler.compile(grammar.regex_grammar("b")))
    with pytest.raises(GrammarError, match="took longer"):
        await bomb
    assert await behind is not None
    stuck.set()
    compiler.close()


async def test_references_to_references_are_never_written_out(compiler: GrammarCompiler) -> None:
    """Two to the twentieth copies of one string are the same string."""
    matcher = (await compiler.compile(grammar.json_schema_grammar(BOMB))).start()
    assert allowed(matcher) and not matcher.error


async def test_equal_formats_are_compiled_once(compiler: GrammarCompiler) -> None:
    source = grammar.regex_grammar("[a-z]{3}")
    assert await compiler.compile(source) is await compiler.compile(source)


async def test_sequences_of_a_request_do_not_disturb_each_other(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    compiled = await compiler.compile(grammar.choice_grammar(["red", "blue"]))
    one, other = compiled.start(), compiled.start()
    before = allowed(other)
    one.accept(tokenizer.encode("red", add_special_tokens=False).ids)
    assert one.is_over and not other.is_over and allowed(other) == before


async def test_a_token_that_was_not_allowed_is_an_error(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = (await compiler.compile(grammar.regex_grammar("a+"))).start()
    matcher.accept(tokenizer.encode("b", add_special_tokens=False).ids)
    assert matcher.error and not matcher.is_over


def test_bad_words_take_away_the_last_token_of_what_stands() -> None:
    matcher = BadWords([(5,), (7, 8, 9)]).start()
    everything = set(range(-(-VOCAB_SIZE // 32) * 32))
    assert allowed(matcher) == everything - {5}
    matcher.accept([7])
    assert allowed(matcher) == everything - {5}
    matcher.accept([8])
    assert allowed(matcher) == everything - {5, 9}
    matcher.accept([1])
    assert allowed(matcher) == everything - {5}


async def only_way(compiler: GrammarCompiler, tokenizer: Tokenizer, source: str) -> str:
    """What comes of always drawing the first token that is allowed."""
    matcher = (await compiler.compile(source)).start()
    ids: list[int] = []
    while not matcher.is_over and (token_id := min(allowed(matcher))) != EOS:
        ids.append(token_id)
        matcher.accept([token_id])
        assert not matcher.error
    return tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("name", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
async def test_the_text_of_a_special_token_is_text(smollm2_dir: Path, tokenizer: Tokenizer, name: str) -> None:
    """A format that has no other way writes it out, in tokens that are no special ones."""
    texts = TextTokenizer.from_file(smollm2_dir / "tokenizer.json")
    compiler = GrammarCompiler(texts.to_json(), VOCAB_SIZE, [EOS], plain_json=texts.to_plain_json())
    constant = json.dumps({"const": f"a{name}b"})
    for source, wanted in (
        (grammar.choice_grammar([name]), name),
        (grammar.regex_grammar(f"x{re.escape(name)}y"), f"x{name}y"),
        (grammar.json_schema_grammar(constant, compact=True), f'"a{name}b"'),
        (grammar.context_free_grammar(f'start: "{name}!"', "lark"), f"{name}!"),
    ):
        assert await only_way(compiler, tokenizer, source) == wanted
    # By its name in Lark it is the token.
    named = (await compiler.compile(grammar.lark_grammar('start: <|im_start|> "a"'))).start()
    assert allowed(named) == {tokenizer.token_to_id("<|im_start|>")}
    compiler.close()


@pytest.mark.parametrize(
    ("regex", "valid", "invalid"),
    [
        (r"\d{3}", ["123"], ["\u0967\u0968\u0969", "\U0001fbf8" * 3]),
        (r"[\d.x-]+", ["1.5x-"], ["\u0967"]),
        (r"[^\d]\D", ["ab", "\u0967\u0968"], ["a1", "1a"]),
        (r"\\d\[\d\]", ["\\d[1]"], ["\\1[1]"]),
    ],
)
async def test_digits_are_0_to_9(
    compiler: GrammarCompiler, tokenizer: Tokenizer, regex: str, valid: list[str], invalid: list[str]
) -> None:
    source = grammar.regex_grammar(regex)
    assert [text for text in valid if not await accepts(compiler, tokenizer, source, text)] == []
    assert [text for text in invalid if await accepts(compiler, tokenizer, source, text)] == []
