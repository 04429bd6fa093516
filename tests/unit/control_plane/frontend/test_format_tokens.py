"""Formats that name tokens, and those that repeat: which sequences of tokens they let through, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from llguidance import LLMatcher, LLTokenizer
from stepwire.v1 import inference_pb2 as pb

from control_plane.frontend.errors import RequestRefused
from control_plane.frontend.format_tokens import MAX_NAMED_TOKENS
from control_plane.frontend.output_rules import OutputRules
from control_plane.frontend.parsers.registry import OutputFormat
from control_plane.frontend.text_formats import MAX_FREE_TOKENS, MAX_REPEATS
from control_plane.frontend.tokenizer import TextTokenizer

VOCAB_SIZE, EOS = 49152, 2
# Special tokens.
START, REPO, NAME, FILE, STARS = 1, 3, 4, 5, 7
# What is generated: texts, and tokens by their ids.
Pieces = Sequence[str | int]

FREE: dict[str, Any] = {"any_text": {}}
JSON = {"json_schema": json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})}
A, B = {"const_string": "a"}, {"const_string": "b"}


def ids(*token_ids: int) -> list[dict[str, int]]:
    return [{"id": token_id} for token_id in token_ids]


def token(token_id: int) -> dict[str, Any]:
    return {"token": {"id": token_id}}


def between(begin: int, content: dict[str, Any], end: int) -> dict[str, Any]:
    return {"begin_token": {"id": begin}, "content": content, "end_token": {"id": end}}


def sequence(*formats: dict[str, Any]) -> dict[str, Any]:
    return {"sequence": {"formats": list(formats)}}


def repeat(layout: dict[str, Any], least: int = 0, most: int | None = None) -> dict[str, Any]:
    return {"repeat": {"format": layout, "min": least, **({} if most is None else {"max": most})}}


def any_tokens(*excluded: int, **fields: Any) -> dict[str, Any]:
    return {"any_tokens": {"excluded": ids(*excluded), **fields}}


def any_token(*excluded: int) -> dict[str, Any]:
    return {"any_token": {"excluded": ids(*excluded)}}


def source_of(
    tokenizer: TextTokenizer, fields: dict[str, Any], *, reasoning: str = "", prompt_end: str | None = None
) -> str:
    rules = OutputRules(tokenizer, OutputFormat("", reasoning), frozenset([EOS]))
    output = pb.StructuredOutput(text_format=json_format.ParseDict(fields, pb.TextFormat()))
    return rules.structured(output, prompt_end, vocab_size=VOCAB_SIZE)


def refusal(tokenizer: TextTokenizer, fields: dict[str, Any]) -> str:
    with pytest.raises(RequestRefused) as caught:
        source_of(tokenizer, fields)
    (violation,) = caught.value.violations
    assert violation.field == "structured_output.text_format"
    return violation.description


def accepts(table: LLTokenizer, source: str, pieces: Pieces) -> bool:
    """Whether each token may be drawn when it is its turn, and the sequence may end behind them."""
    matcher = LLMatcher(table, source, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    given = [each for piece in pieces for each in ([piece] if isinstance(piece, int) else table.tokenize_str(piece))]
    for token_id in given:
        mask = matcher.compute_bitmask()
        if matcher.is_stopped() or not mask[token_id // 8] >> token_id % 8 & 1:
            return False
        assert matcher.consume_token(token_id), matcher.get_error()
    return bool(matcher.is_accepting())


CASES: list[tuple[dict[str, Any], list[Pieces], list[Pieces]]] = [
    # --- repeat
    (repeat(A, 2, 3), [["aa"], ["aaa"]], [[], ["a"], ["aaaa"]]),
    (repeat({"const_string": "ab"}, 2, 2), [["abab"]], [["ab"], ["ababab"]]),
    (repeat(A), [[], ["a"], ["aaaaa"]], [["b"]]),
    (repeat(A, 1), [["a"], ["aaaaa"]], [[]]),
    (sequence(repeat(A, 0, 1), B), [["b"], ["ab"]], [["aab"], ["a"]]),
    (sequence(A, repeat(B, 0, 0)), [["a"]], [["ab"]]),
    (sequence(repeat({"regex": "x*"}, 2, 3), B), [["b"], ["xxb"]], [["xx"]]),
    (sequence(repeat(repeat(A, 0, 1), 3), B), [["b"], ["aaaaab"]], [["a"]]),
    (sequence(repeat(repeat(token(FILE), 1), 2), B), [[FILE, FILE, "b"], [FILE] * 5 + ["b"]], [[FILE, "b"]]),
    (sequence(repeat(repeat(A)), B), [["b"], ["aaab"]], [["a"]]),
    (repeat({"tag": {"begin": "<t>", "content": FREE, "end": "</t>"}}, 2, 2), [["<t>a</t><t></t>"]], [["<t>a</t>"]]),
    (repeat(FREE, 1, 1), [[], ["Hi"]], []),
    ({"tag": {"begin": "[", "content": repeat(FREE, 0, 1), "end": "]"}}, [["[]"], ["[a b]"]], [["["], ["[a] "]]),
    (sequence(repeat({"tag": {"begin": "a", "content": FREE, "end": "!"}}, 0, 1), B), [["b"], ["a ?!b"]], [["a b"]]),
    # --- one token
    (token(FILE), [[FILE]], [["<file", "_sep>"], [REPO], []]),
    ({"token": {"text": "<file_sep>"}}, [[FILE]], [["<file", "_sep>"], [REPO]]),
    ({"token": {"text": " the"}}, [[" the"]], [[" t", "he"], ["the"]]),
    (sequence(A, token(FILE), B), [["a", FILE, "b"]], [["ab"], ["a", REPO, "b"]]),
    (any_token(FILE), [["a"], [REPO], [" the"]], [[FILE], [EOS], [], ["a", "a"]]),
    (sequence(any_token(), B), [["a", "b"], [FILE, "b"]], [["b"]]),
    # --- tokens
    (any_tokens(), [[], ["Hi", FILE, "you"]], [["Hi", EOS, "you"]]),
    (any_tokens(FILE, EOS), [[], ["Hi", REPO]], [["Hi", FILE]]),
    (any_tokens(max_tokens=2), [[], ["a"], ["a", FILE]], [["a", "a", "a"]]),
    (sequence(any_tokens(max_tokens=0), B), [["b"]], [["a", "b"]]),
    (sequence(any_tokens(FILE), token(FILE), B), [[FILE, "b"], ["a", REPO, FILE, "b"]], [["a", "b"], ["a", FILE, "a"]]),
    # --- tags
    ({"tag": between(REPO, JSON, NAME)}, [[REPO, '{"a": 1}', NAME]], [['{"a": 1}', NAME], [REPO, '{"a": 1}']]),
    ({"tag": between(REPO, FREE, NAME)}, [[REPO, NAME], [REPO, "a b", NAME]], [[REPO, FILE, NAME], [REPO, "a"]]),
    (
        {"tag": between(REPO, any_tokens(STARS), NAME)},
        [[REPO, NAME], [REPO, "a", FILE, NAME]],
        [[REPO, "a", STARS, NAME], [REPO, NAME, NAME]],
    ),
    ({"tag": between(REPO, sequence(any_token(), B), NAME)}, [[REPO, FILE, "b", NAME]], [[REPO, NAME, "b", NAME]]),
    (
        {"tag": {"begin": "a", "content": FREE, "end_token": {"text": "<file_sep>"}}},
        [["ab", FILE]],
        [["a<file", "_sep>"]],
    ),
    ({"tag": {"begin": "a", "content": FREE, "end_token": {"text": "!"}}}, [["a b", "!"]], [["a b"], ["a!", "!"]]),
    ({"tag": {"begin_token": {"id": FILE}, "content": FREE, "end": "!"}}, [[FILE, "b!"]], [["b!"], [FILE, "b"]]),
    # An inner tag: neither its end nor that of the outer one is a token of it.
    (
        {"tag": between(REPO, {"tag": between(FILE, any_tokens(), STARS)}, NAME)},
        [[REPO, FILE, "a", STARS, NAME]],
        [[REPO, FILE, STARS, STARS, NAME], [REPO, FILE, NAME, STARS, NAME]],
    ),
    (
        {"tag": between(REPO, repeat({"tag": {"content": any_tokens(), "end_token": {"id": FILE}}}), NAME)},
        [[REPO, NAME], [REPO, "a", FILE, "b", FILE, NAME]],
        [[REPO, "a", NAME, FILE, NAME], [REPO, "a", NAME]],
    ),
    # One without an end ends with the outer one.
    (
        {"tag": between(REPO, {"tag": {"begin": "a", "content": any_tokens()}}, NAME)},
        [[REPO, "a", NAME], [REPO, "a", "b", NAME]],
        [[REPO, "a", "b", NAME, NAME]],
    ),
    # --- tags among tokens
    (
        {"token_triggered_tags": {"tags": [between(REPO, JSON, NAME)], "excluded": ids(STARS)}},
        [[], ["Hi", FILE], ["Hi", REPO, '{"a": 1}', NAME, "you", NAME, REPO, '{"a": 2}', NAME]],
        [["Hi", STARS], [REPO, "Hi"], [REPO, '{"a": 1}'], ["Hi", EOS, "you"]],
    ),
    (
        {"token_triggered_tags": {"tags": [between(REPO, A, NAME)], "trigger_tokens": ids(REPO, FILE)}},
        [["Hi", REPO, "a", NAME]],
        [["Hi", FILE], [REPO, "b", NAME]],
    ),
    (
        {"token_triggered_tags": {"tags": [between(REPO, A, NAME), between(REPO, B, FILE)], "at_least_one": True}},
        [[REPO, "a", NAME], [REPO, "b", FILE, "Hi", REPO, "a", NAME]],
        [[], ["Hi"], ["Hi", REPO, "a", NAME], [REPO, "a", FILE]],
    ),
    (
        {"token_triggered_tags": {"tags": [between(REPO, A, NAME)], "stop_after_first": True}},
        [[], ["Hi"], ["Hi", REPO, "a", NAME]],
        [[REPO, "a", NAME, "Hi"]],
    ),
    (
        {
            "token_triggered_tags": {
                "tags": [between(REPO, A, NAME), {"begin_token": {"id": FILE}, "content": any_tokens()}],
                "stop_after_first": True,
                "at_least_one": True,
            }
        },
        [[REPO, "a", NAME], [FILE, "Hi", REPO]],
        [[], ["Hi"], [REPO, "a", NAME, "Hi"]],
    ),
    (
        {"tag": between(FILE, {"token_triggered_tags": {"tags": [between(REPO, A, NAME)]}}, STARS)},
        [[FILE, STARS], [FILE, "Hi", REPO, "a", NAME, "Hi", STARS]],
        [[FILE, STARS, STARS], [FILE, REPO, STARS]],
    ),
    (
        {
            "separated_tags": {
                "tags": [between(REPO, any_tokens(), NAME), between(FILE, A, NAME)],
                "separator": ",",
            }
        },
        [[], [REPO, NAME], [REPO, "Hi", NAME, ",", FILE, "a", NAME]],
        [[REPO, NAME, REPO, NAME], [REPO, "Hi"]],
    ),
    # --- constant text is text, whatever it looks like
    ({"const_string": "<[5]>"}, [["<[5]>"]], [[FILE]]),
    ({"tag": {"begin": "<[3]>", "content": FREE, "end": "<[5]>"}}, [["<[3]>a<[5]>"]], [[REPO, "a", FILE], ["<[3]>a"]]),
]


@pytest.mark.parametrize(("fields", "right", "wrong"), CASES, ids=lambda each: json.dumps(each)[:60])
def test_which_tokens_are_let_through(
    fields: dict[str, Any], right: list[Pieces], wrong: list[Pieces], tokenizer: TextTokenizer, table: LLTokenizer
) -> None:
    source = source_of(tokenizer, fields)
    for pieces in right:
        assert accepts(table, source, pieces), pieces
    for pieces in wrong:
        assert not accepts(table, source, pieces), pieces


@pytest.mark.parametrize("fields", [any_tokens(), repeat(any_token()), any_token(), token(FILE)])
def test_the_end_of_the_sequence_is_no_token_of_a_format(
    fields: dict[str, Any], tokenizer: TextTokenizer, table: LLTokenizer
) -> None:
    matcher = LLMatcher(table, source_of(tokenizer, fields), log_level=0)
    mask = matcher.compute_bitmask()
    assert bool(mask[EOS // 8] >> EOS % 8 & 1) == matcher.is_accepting()
    if matcher.is_accepting():
        assert matcher.consume_token(EOS) and matcher.is_stopped() and not matcher.is_error()


@pytest.mark.parametrize("text", ["<[5]>", "<[*]>", "<[^5]>"])
def test_constant_text_names_no_token(text: str, tokenizer: TextTokenizer, table: LLTokenizer) -> None:
    matcher = LLMatcher(table, source_of(tokenizer, {"const_string": text}), log_level=0)
    assert matcher.compute_ff_bytes() == text.encode()
    assert not matcher.compute_bitmask()[0] >> FILE & 1


def test_free_tokens_are_ids_that_tokenizer_and_model_have(smollm2_dir: Path, tokenizer: TextTokenizer) -> None:
    """A model's logits may be padded; a tokenizer may know more than its model."""
    padded = LLTokenizer(tokenizer.to_json(), n_vocab=VOCAB_SIZE + 64, eos_token=[EOS])
    rules = OutputRules(tokenizer, OutputFormat("", ""), frozenset([EOS]))
    output = pb.StructuredOutput(text_format=json_format.ParseDict(any_tokens(), pb.TextFormat()))
    for vocab_size, most in ((VOCAB_SIZE + 64, VOCAB_SIZE), (1000, 1000)):
        mask = LLMatcher(padded, rules.structured(output, None, vocab_size=vocab_size), log_level=0).compute_bitmask()
        assert [index for index in range(VOCAB_SIZE + 64) if mask[index // 8] >> index % 8 & 1] == list(range(most))


def test_tokens_are_named_after_the_reasoning_as_well(tokenizer: TextTokenizer, table: LLTokenizer) -> None:
    fields = {"tag": between(REPO, any_tokens(), NAME)}
    source = source_of(tokenizer, fields, reasoning="qwen3", prompt_end="")
    for pieces in ([REPO, "a", FILE, NAME], ["<think>hm</think>\n\n", REPO, "a", NAME]):
        assert accepts(table, source, pieces), pieces
    assert not accepts(table, source, ["<think>hm</think>\n\n", "a", NAME])


def nested_names(count: int) -> dict[str, Any]:
    return any_tokens(*range(count - 1), FILE)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (token(EOS), "the token 2, which ends the sequence"),
        ({"token": {"text": "<|im_end|>"}}, "'<|im_end|>', which ends the sequence"),
        ({"tag": between(EOS, A, FILE)}, "ends the sequence"),
        ({"tag": between(FILE, A, EOS)}, "ends the sequence"),
        ({"token_triggered_tags": {"tags": [between(EOS, A, FILE)]}}, "ends the sequence"),
        (
            {"token_triggered_tags": {"tags": [between(FILE, A, REPO)], "trigger_tokens": ids(FILE, EOS)}},
            "ends the sequence",
        ),
        (token(VOCAB_SIZE), "the token 49152, which is no token"),
        (any_tokens(10**6), "the token 1000000, which is no token"),
        ({"token": {"text": "<nothing of the kind>"}}, "'<nothing of the kind>', which is no token"),
        ({"token": {"text": "\u0120the"}}, "which is no token"),
        ({"token": {"text": ""}}, "which is no token"),
        ({"token": {}}, "neither its id nor its text"),
        (nested_names(MAX_NAMED_TOKENS + 1), "names more than 128 tokens"),
        (repeat(A, MAX_REPEATS + 1), "4097 times; at most 4096"),
        (repeat(A, 0, MAX_REPEATS + 1), "4097 times; at most 4096"),
        (any_tokens(max_tokens=MAX_FREE_TOKENS + 1), "max_tokens 65537; at most 65536"),
        (repeat(A, 3, 2), "at least 3 and at most 2 times"),
        (repeat({}, 1, 2), "empty"),
        (sequence(repeat(FREE, 0, 1), A), "free text has no end"),
        (sequence(repeat(FREE, 1, 1), A), "free text has no end"),
        (repeat(FREE, 0, 2), "free text has no end"),
        (repeat(FREE), "free text has no end"),
        (
            {"tag": {"begin": "a", "content": repeat({"tag": {"content": FREE, "end": "!"}}, 1), "end": "?"}},
            "begins with free text",
        ),
        (sequence(any_tokens(), A), "free tokens are followed"),
        (sequence(any_tokens(), token(FILE)), "free tokens are followed"),
        (sequence(any_tokens(FILE), any_token()), "free tokens are followed"),
        (sequence(any_tokens(FILE), repeat(token(FILE), 0, 1), A), "free tokens are followed"),
        (sequence(repeat(any_token(), 0, 2), A), "free tokens are followed"),
        (sequence(repeat(any_token(), 0, 1), A), "free tokens are followed"),
        (repeat(any_tokens()), "free tokens are followed"),
        ({"tag": {"begin": "a", "content": any_tokens(), "end": "!"}}, "ended by tokens, not by text"),
        ({"separated_tags": {"tags": [{"begin": "a", "content": any_tokens()}]}}, "free tokens have no end"),
        ({"token_triggered_tags": {"tags": [{"begin_token": {"id": 5}, "content": FREE}]}}, "free text has no end"),
        (
            sequence(repeat({"tag": {"begin_token": {"text": "!"}, "content": A, "end": "?"}}), {"const_string": "!a"}),
            "nothing tells it from the text",
        ),
        (
            {"tag": between(FILE, {"token_triggered_tags": {"tags": [between(REPO, A, NAME)]}}, REPO)},
            "nothing tells one from the other",
        ),
        ({"tag": between(FILE, repeat(token(REPO)), REPO)}, "nothing tells one from the other"),
        (sequence(repeat(token(REPO), 1), token(REPO)), "nothing tells one from the other"),
        ({"token_triggered_tags": {}}, "at least one format or tag"),
        ({"token_triggered_tags": {"tags": [{"begin": "a", "content": A}]}}, "tag 0 begins with no token"),
        (
            {"token_triggered_tags": {"tags": [between(FILE, A, REPO)], "trigger_tokens": ids(REPO)}},
            "tag 0 begins with none of the trigger_tokens",
        ),
        ({"triggered_tags": {"tags": [between(FILE, A, REPO)]}}, "tag 0 begins with a token"),
        ({"tag": {**between(FILE, A, REPO), "begin": "a"}}, "both begin and begin_token"),
        ({"tag": {**between(FILE, A, REPO), "end": "a"}}, "both end and end_token"),
    ],
    ids=lambda each: json.dumps(each)[:60],
)
def test_what_is_refused_is_named(fields: dict[str, Any], reason: str, tokenizer: TextTokenizer) -> None:
    assert reason in refusal(tokenizer, fields)


def test_the_most_that_is_taken(tokenizer: TextTokenizer, table: LLTokenizer) -> None:
    assert accepts(table, source_of(tokenizer, nested_names(MAX_NAMED_TOKENS)), [" the", STARS + 1000])
    assert accepts(table, source_of(tokenizer, repeat(A, 0, MAX_REPEATS)), ["a" * 50])
    assert not accepts(table, source_of(tokenizer, repeat(A, MAX_REPEATS, MAX_REPEATS)), ["a" * 50])
    assert accepts(table, source_of(tokenizer, any_tokens(max_tokens=MAX_FREE_TOKENS)), [" the"] * 50)


def test_all_tokens_cannot_be_excluded(tokenizer: TextTokenizer) -> None:
    output = pb.StructuredOutput(text_format=json_format.ParseDict(any_tokens(0, 1, 3), pb.TextFormat()))
    rules = OutputRules(tokenizer, OutputFormat("", ""), frozenset([EOS]))
    with pytest.raises(RequestRefused) as caught:
        rules.structured(output, None, vocab_size=4)
    assert "excludes every token" in caught.value.violations[0].description
