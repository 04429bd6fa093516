"""Every format: the whole text's parse, the same however the text is cut, and no exception whatever a model writes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.frontend.parsers.registry import REASONING_FORMATS, TOOL_FORMATS, OutputFormat
from control_plane.frontend.parsers.tagged_calls import Tags

SCHEMAS = {"weather": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}}
CALL = '{"city": "Rome", "days": 3}'
Parsed = tuple[str, str, list[tuple[str, str, bool]]]


def parse(output_format: OutputFormat, pieces: Iterable[str], prompt_end: str = "") -> Parsed:
    """(text, reasoning, [(name, arguments, complete)]), joined over all deltas."""
    start = output_format.start(SCHEMAS, prompt_end)
    assert start is not None
    parser = start()
    text, reasoning, calls = "", "", {}
    for delta in [*(parser.push(piece) for piece in pieces), parser.finish()]:
        text += delta.text
        reasoning += delta.reasoning
        for piece in delta.calls:
            name, arguments, complete = calls.get(piece.index, ("", "", False))
            assert not (name and piece.name), "a name comes once"
            calls[piece.index] = (name + piece.name, arguments + piece.arguments, complete or piece.complete)
    assert list(calls) == list(range(len(calls)))
    return text, reasoning, list(calls.values())


EXAMPLES = [
    ("hermes", f'Sure.\n<tool_call>\n{{"name": "weather", "arguments": {CALL}}}\n</tool_call>', "Sure.\n", 1),
    ("hermes", f'<tool_call>{{"arguments": {CALL}, "name": "weather"}}</tool_call>' * 2, "", 2),
    ("llama3_json", f'<|python_tag|>{{"name": "weather", "parameters": {CALL}}}', "", 1),
    ("llama3_json", "; ".join([f'{{"name": "weather", "parameters": {CALL}}}'] * 2), "", 2),
    ("mistral", f'[TOOL_CALLS][{{"name": "weather", "arguments": {CALL}}}]', "", 1),
    ("mistral", f"[TOOL_CALLS]weather[ARGS]{CALL}[TOOL_CALLS]weather{CALL}", "", 2),
    ("granite", f'<|tool_call|>[{{"name": "weather", "arguments": {CALL}}}]', "", 1),
    ("phi4_mini_json", f'<|tool_call|>[{{"name": "weather", "arguments": {CALL}}}]<|/tool_call|>', "", 1),
    ("gemma3", f'```json\n{{"name": "weather", "parameters": {CALL}}}\n```', "", 1),
    ("gemma3", '[weather(city="Rome", days=3)]', "", 1),
    (
        "qwen3_coder",
        "Ok\n<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "</function>\n</tool_call>",
        "Ok\n",
        1,
    ),
    (
        "deepseek_v3",
        "Hm.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        + CALL
        + "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "Hm.",
        1,
    ),
    (
        "deepseek_v31",
        "<｜tool▁calls▁begin｜>"
        + f"<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{CALL}<｜tool▁call▁end｜>" * 2
        + "<｜tool▁calls▁end｜>",
        "",
        2,
    ),
    (
        "seed_oss",
        "Ok\n<seed:tool_call>\n<function=weather>\n<parameter=city>Rome</parameter>\n<parameter=days>3</parameter>\n"
        "</function>\n</seed:tool_call>",
        "Ok\n",
        1,
    ),
    (
        "minimax_m2",
        "Ok\n<minimax:tool_call>\n"
        + '<invoke name="weather">\n<parameter name="city">Rome</parameter>\n<parameter name="days">3</parameter>\n'
        "</invoke>\n" * 2 + "</minimax:tool_call>",
        "Ok\n",
        2,
    ),
    (
        "glm45",
        "Ok\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>3</arg_value>\n</tool_call>",
        "Ok\n",
        1,
    ),
    # 4.7.
    (
        "glm45",
        "<tool_call>weather<arg_key>city</arg_key><arg_value>Rome</arg_value><arg_key>days</arg_key>"
        "<arg_value>3</arg_value></tool_call>" * 2,
        "",
        2,
    ),
    ("glm45", f'<tool_call>\n{{"name": "weather", "arguments": {CALL}}}\n</tool_call>', "", 1),
    (
        "deepseek_v32",
        'Ok<｜DSML｜function_calls>\n<｜DSML｜invoke name="weather">\n<｜DSML｜parameter name="city" string="true">Rome'
        '</｜DSML｜parameter>\n<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        "</｜DSML｜function_calls>",
        "Ok",
        1,
    ),
    # V4 names its section otherwise, and either is read.
    (
        "deepseek_v4",
        '<｜DSML｜tool_calls><｜DSML｜invoke name="weather"><｜DSML｜parameter name="city" string="true">Rome'
        '</｜DSML｜parameter><｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter></｜DSML｜invoke>'
        "</｜DSML｜tool_calls>",
        "",
        1,
    ),
    (
        "kimi_k2",
        "Ok<|tool_calls_section_begin|>"
        + "".join(
            f"<|tool_call_begin|>functions.weather:{number}<|tool_call_argument_begin|>{CALL}<|tool_call_end|>"
            for number in range(2)
        )
        + "<|tool_calls_section_end|>",
        "Ok",
        2,
    ),
    ("gemma4", '<|tool_call>call:weather{city:<|"|>Rome<|"|>,days:3}<tool_call|>' * 2, "", 2),
    ("gemma4", 'Ok<|tool_call>call:weather{"city": "Rome", days: 3 }<tool_call|>', "Ok", 1),
    ("hunyuan_a13b", f'Ok<tool_calls>[{{"name": "weather", "arguments": {CALL}}}]</tool_calls>', "Ok", 1),
    ("llama4_pythonic", '<|python_start|>[weather(city="Rome", days=3)]<|python_end|>', "", 1),
    ("openai", f"<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{CALL}", "", 1),
    ("openai", f" to=functions.weather<|channel|>commentary json<|message|>{CALL}<|call|>", "", 1),
    (
        "openai",
        "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant to=functions.weather<|channel|>commentary "
        f"<|constrain|>json<|message|>{CALL}",
        "",
        1,
    ),
]


@pytest.mark.parametrize(("name", "text", "said", "num_calls"), EXAMPLES)
def test_calls_are_read_and_markup_is_not_shown(name: str, text: str, said: str, num_calls: int) -> None:
    shown, _, calls = parse(OutputFormat(name, ""), [text])
    assert (shown, len(calls)) == (said, num_calls)
    for called, arguments, complete in calls:
        assert (called, json.loads(arguments), complete) == ("weather", json.loads(CALL), True)


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, text, _, _ in EXAMPLES])
def test_a_call_that_is_cut_off_is_never_complete(name: str, text: str) -> None:
    whole = parse(OutputFormat(name, ""), [text])[2]
    for end in range(len(text)):
        for _, arguments, complete in parse(OutputFormat(name, ""), [text[:end]])[2]:
            if complete:
                json.loads(arguments)
        assert len(parse(OutputFormat(name, ""), [text[:end]])[2]) <= len(whole)


@pytest.mark.parametrize(
    ("name", "text"),
    [(name, text) for name, text, said, _ in EXAMPLES if TOOL_FORMATS[name].syntax.trigger or name == "openai"],
)
def test_nothing_of_a_marked_call_is_text_wherever_it_is_cut_off(name: str, text: str) -> None:
    """What stands before a call is; with tools that must be called, nothing at all is."""
    whole = parse(OutputFormat(name, ""), [text])[0]
    start = OutputFormat(name, "").start(SCHEMAS, "", calls_only=True)
    assert start is not None
    for end in range(len(text)):
        said = parse(OutputFormat(name, ""), [text[:end]])[0]
        # The beginning of a mark may be text, as long as nothing more has come.
        assert said.startswith(whole[:end]) and not any(mark in said for mark in ("{", "weather", "Rome")), said
        parser = start()
        assert parser.push(text[:end]).text == "" == parser.finish().text


@pytest.mark.parametrize("written", ["null", '""', "{}", '"{}"'])
def test_arguments_that_are_none_are_an_object(written: str) -> None:
    first, last = f'{{"name": "weather", "arguments": {written}}}', f'{{"arguments": {written}, "name": "weather"}}'
    for text in (f"<tool_call>{first}</tool_call>", f"<tool_call>{last}</tool_call>"):
        assert parse(OutputFormat("hermes", ""), text) == ("", "", [("weather", "{}", True)])
        assert parse(OutputFormat("hermes", ""), [text]) == ("", "", [("weather", "{}", True)])


def test_a_string_of_a_marked_call_comes_as_it_is_written() -> None:
    """A long text that a model writes into an argument is sent on piece by piece."""
    start = OutputFormat("qwen3_coder", "").start(SCHEMAS, "")
    assert start is not None
    parser = start()
    parser.push("<tool_call>\n<function=weather>\n<parameter=city>\nRome")
    pieces = [parser.push(piece).calls[0].arguments for piece in (" is", ' "old"', " and")]
    assert pieces == [" is", ' \\"old\\"', " and"]


@cache
def uncut(tool_parser: str, reasoning_parser: str, text: str) -> Parsed:
    """All at once; a character at a time gives the same."""
    whole = parse(OutputFormat(tool_parser, reasoning_parser), [text])
    assert parse(OutputFormat(tool_parser, reasoning_parser), text) == whole
    return whole


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, text, _, _ in EXAMPLES])
@given(data=st.data())
def test_cuts_change_nothing(name: str, text: str, data: st.DataObject) -> None:
    output_format = OutputFormat(name, "qwen3" if name != "openai" else "openai_gptoss")
    whole = f"<think>Let me see.</think>\n{text}" if name != "openai" else text
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=12)))
    pieces = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert parse(output_format, pieces) == uncut(output_format.tool_parser, output_format.reasoning_parser, whole)


def _parts(tags: Tags) -> tuple[str, ...]:
    keys = (tags.after_key, *(tags.string_keys or ()))
    return tags.before_name, *tags.name_ends, tags.before_key, *keys, tags.end_value, tags.end_call


_MARKS = sorted({mark for each in TOOL_FORMATS.values() for mark in each.marks})
_XML = ["<function=weather>", "<parameter=city>", "</parameter>", "</function>", "<think>", "</think>", "functools"]
_JSON = ['{"name": "weather", ', '"arguments": ', CALL, "{", "}", "[", "]", '"', "\\", ",", ":", "3", "null"]
_TAGS = [mark for each in TOOL_FORMATS.values() if (tags := each.syntax.tags) for mark in (*tags.begins, *tags.ends)]
_TAGS += [part for each in TOOL_FORMATS.values() if (tags := each.syntax.tags) for part in _parts(tags)]
_OTHER = [
    "call:weather{",
    "city:",
    "functions.weather:0",
    "weather",
    " ",
    "\n",
    "é",
    "[weather(city='a')",
    "analysis",
    " to=functions.x",
    "```json",
]
FRAGMENTS = st.sampled_from([*_MARKS, *sorted(set(_TAGS)), *_XML, *_JSON, *_OTHER])


@pytest.mark.parametrize("name", TOOL_FORMATS)
@given(fragments=st.lists(FRAGMENTS, max_size=16), data=st.data())
def test_nothing_raises_and_cuts_change_nothing_in_nonsense(
    name: str, fragments: list[str], data: st.DataObject
) -> None:
    reasoning = data.draw(st.sampled_from(["", *REASONING_FORMATS]))
    output_format = OutputFormat(name, reasoning)
    text = "".join(fragments)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = parse(output_format, [text])
    assert parse(output_format, pieces) == whole
    assert parse(output_format, text) == whole


@pytest.mark.parametrize(
    ("name", "text", "prompt_end", "reasoning", "said"),
    [
        ("qwen3", "<think>\nHm.\n</think>\n\nParis", "", "\nHm.\n", "Paris"),
        ("qwen3", "Hm.</think>Paris", "<think>\n", "Hm.", "Paris"),
        ("qwen3", "Paris", "<think>\n\n</think>\n\n", "", "Paris"),
        ("deepseek_r1", "Hm.</think>Paris", "", "Hm.", "Paris"),
        ("granite", "Here is my thought process: hm\nHere is my response: Paris", "", " hm\n", "Paris"),
        ("mistral", "[THINK]hm[/THINK]Paris", "", "hm", "Paris"),
        ("glm45", "\n<think>hm</think>\nParis", "<|assistant|>", "hm", "Paris"),
        ("glm45", "\nParis", "<|assistant|>\n<think></think>", "", "\nParis"),
        ("minimax_m2", "hm\n</think>\n\nParis", "]~b]ai\n<think>\n", "hm\n", "Paris"),
        ("seed_oss", "<seed:think>hm</seed:think>Paris", "", "hm", "Paris"),
        ("hunyuan_a13b", "<think>\nhm\n</think>\n<answer>\nParis\n</answer>", "", "\nhm\n", "Paris"),
        ("hunyuan_a13b", "<answer>\nParis\n</answer>\n", "<think>\n\n</think>\n", "", "Paris\n"),
        ("hunyuan_a13b", "<think>hm</think>Paris</answer>", "", "hm", "Paris</answer>"),
        ("hunyuan_a13b", "hm</think><answer>Paris\n</answ", "<think>\n", "hm", "Paris\n</answ"),
        (
            "seed_oss",
            "Paris",
            "<seed:think>\n<seed:cot_budget_reflect>0</seed:cot_budget_reflect>\n</seed:think>",
            "",
            "Paris",
        ),
        ("gemma4", "<|channel>thought\nhm<channel|>Paris", "<|turn>model\n", "hm", "Paris"),
        ("gemma4", "Paris", "<|turn>model\n<|channel>thought\n<channel|>", "", "Paris"),
        ("deepseek_v3", "hm</think>Paris", "<｜Assistant｜><think>", "hm", "Paris"),
        ("deepseek_v3", "Paris", "<｜Assistant｜></think>", "", "Paris"),
        ("deepseek_v3", "Paris", "<｜tool▁output▁end｜>", "", "Paris"),
        (
            "openai_gptoss",
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Paris",
            "",
            "hm",
            "Paris",
        ),
    ],
)
def test_reasoning(name: str, text: str, prompt_end: str, reasoning: str, said: str) -> None:
    assert parse(OutputFormat("", name), [text], prompt_end) == (said, reasoning, [])
    assert parse(OutputFormat("", name), text, prompt_end) == (said, reasoning, []), "a character at a time"
