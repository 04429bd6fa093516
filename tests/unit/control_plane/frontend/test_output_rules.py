"""Grammars of calls: what they let through is what the format's own parser reads back."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from stepwire.v1 import inference_pb2 as pb
from tokenizers import AddedToken, Tokenizer

from control_plane.frontend.output_rules import OutputRules
from control_plane.frontend.parsers.registry import REASONING_FORMATS, TOOL_FORMATS, OutputFormat, schemas_of
from control_plane.frontend.tokenizer import TextTokenizer

SCHEMA = '{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}'
TOOL = pb.Tool(function=pb.FunctionTool(name="weather", parameters=SCHEMA))
ARGUMENTS = '{"city": "Rome"}'
ANSWER = '{"properties": {"is_warm": {"type": "boolean"}}, "required": ["is_warm"], "type": "object"}'
# In XML every text is a string.
WRONG = ('{"city": 3}', '{"town": "Rome"}')


def accepts(table: LLTokenizer, source: str, text: str) -> bool:
    """Whether the whole text, and its end there, are allowed."""
    matcher = LLMatcher(table, source, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return bool(matcher.consume_tokens(table.tokenize_str(text))) and matcher.is_accepting()


def written_call(name: str, arguments: str) -> str:
    syntax = TOOL_FORMATS[name].syntax
    tags = syntax.tags
    if tags is not None:
        after_key = (tags.string_keys or (tags.after_key,))[0]
        line = "\n" * tags.on_lines
        arguments = "".join(
            f"{tags.before_key}{key}{after_key}{line}{value}{line}{tags.end_value}\n"
            for key, value in json.loads(arguments).items()
        )
    elif syntax.arguments == "gemma":
        values = {
            key: f'<|"|>{value}<|"|>' if value == "Rome" else value for key, value in json.loads(arguments).items()
        }
        arguments = ",".join(f"{key}:{value}" for key, value in values.items())
    return (
        f"{syntax.begin_section}{syntax.before_name}weather{':0' * syntax.is_numbered}{syntax.after_name}{arguments}"
        f"{syntax.end}{syntax.end_section}"
    )


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_forced_calls_are_what_the_parser_reads(name: str, tokenizer: TextTokenizer, table: LLTokenizer) -> None:
    output_format = OutputFormat(name, "")
    chat = pb.ChatInput(tools=[TOOL], tool_choice=pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_REQUIRED))
    source = OutputRules(tokenizer, output_format).forced_calls(chat, "")
    assert accepts(table, source, written_call(name, ARGUMENTS))
    assert not accepts(table, source, written_call(name, WRONG[TOOL_FORMATS[name].syntax.tags is not None]))
    assert not accepts(table, source, "Sure.")
    start = output_format.start(schemas_of([("weather", SCHEMA)]), "")
    assert start is not None
    parser = start()
    calls = [*parser.push(written_call(name, ARGUMENTS)).calls, *parser.finish().calls]
    assert "".join(call.name for call in calls) == "weather" and calls[-1].complete
    assert json.loads("".join(call.arguments for call in calls)) == json.loads(ARGUMENTS)


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_of_several_tools_only_those_that_are_allowed_are_called(
    name: str, tokenizer: TextTokenizer, table: LLTokenizer
) -> None:
    rules = OutputRules(tokenizer, OutputFormat(name, ""))
    tools = [TOOL, pb.Tool(function=pb.FunctionTool(name="news", parameters=SCHEMA))]
    call = written_call(name, ARGUMENTS)
    other = call.replace("weather", "news")
    for mode in (pb.TOOL_CHOICE_MODE_REQUIRED, pb.TOOL_CHOICE_MODE_AUTO):
        for names, is_allowed in (([], True), (["weather"], False)):
            chat = pb.ChatInput(tools=tools, tool_choice=pb.ToolChoice(mode=mode, allowed_function_names=names))
            source = (
                rules.forced_calls(chat, "") if mode == pb.TOOL_CHOICE_MODE_REQUIRED else rules.optional_calls(chat, "")
            )
            if source is None:  # nothing tells a call from text here
                continue
            assert accepts(table, source, call)
            assert accepts(table, source, other) == is_allowed
    named = pb.ChatInput(tools=tools, tool_choice=pb.ToolChoice(function_name="news"))
    assert accepts(table, rules.forced_calls(named, ""), other)
    assert not accepts(table, rules.forced_calls(named, ""), call)


@pytest.mark.parametrize("name", [name for name in TOOL_FORMATS if TOOL_FORMATS[name].syntax.trigger])
def test_a_call_that_begins_in_free_text_is_held_to_its_tool(
    name: str, tokenizer: TextTokenizer, table: LLTokenizer
) -> None:
    source = OutputRules(tokenizer, OutputFormat(name, "")).optional_calls(pb.ChatInput(tools=[TOOL]), "")
    assert source is not None
    assert accepts(table, source, "Just text.")
    assert accepts(table, source, "Let me see. " + written_call(name, ARGUMENTS))
    assert not accepts(table, source, written_call(name, WRONG[TOOL_FORMATS[name].syntax.tags is not None]))


UNMARKED = [name for name, entry in TOOL_FORMATS.items() if entry.syntax.opening]


def matcher_of(rules: OutputRules, chat: pb.ChatInput, table: LLTokenizer, prompt_end: str = "") -> LLMatcher:
    source = rules.optional_calls(chat, prompt_end)
    assert source is not None
    matcher = LLMatcher(table, source, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def passes(matcher: LLMatcher, table: LLTokenizer, text: str) -> bool:
    each = matcher.deep_copy()
    return bool(each.consume_tokens(table.tokenize_str(text))) and each.is_accepting()


@pytest.mark.parametrize("name", UNMARKED)
def test_without_a_mark_a_call_is_told_by_how_the_text_begins(
    name: str, tokenizer: TextTokenizer, table: LLTokenizer
) -> None:
    rules = OutputRules(tokenizer, OutputFormat(name, ""))
    matcher = matcher_of(rules, pb.ChatInput(tools=[TOOL]), table)
    call = written_call(name, ARGUMENTS)
    loose = '{ "type":"function" ,"name" : "weather","arguments":\n' + ARGUMENTS + " }"
    for text in ("", "Just text.", "Look: " + call, '{"answer": 1}', '{"nam', '{"names": 1}', call, loose, "\n" + call):
        assert passes(matcher, table, text), text
    for wrong in ('{"name": "Bob"}', written_call(name, '{"city": 3}'), call.replace("weather", "other"), call[:-2]):
        assert not passes(matcher, table, wrong), wrong
    two = call + (TOOL_FORMATS[name].syntax.separator or "") + call
    assert passes(matcher, table, two)
    alone = matcher_of(rules, pb.ChatInput(tools=[TOOL], parallel_tool_calls=False), table)
    assert passes(alone, table, call) and not passes(alone, table, two)
    if name == "llama3_json":
        assert passes(matcher, table, "<|python_tag|>" + call)
        assert not passes(matcher, table, "<|python_tag|>" + written_call(name, "{}"))
    else:
        assert passes(matcher, table, f"```json\n{call}\n```")
        one, other = '[weather(city="Rome")]', "[ weather(city = 'Rome') , weather(city='Oslo')\n]"
        for text in (one, other, f"```tool_code\n{one}\n```", "[1, 2]", "[weather]", "[weathers(x=1)]"):
            assert passes(matcher, table, text), text
        for wrong in ("[weather(city=3)]", '[weather(town="Rome")]', "[weather()]", one[:-1]):
            assert not passes(matcher, table, wrong), wrong
        assert passes(alone, table, one) and not passes(alone, table, other)


PIECES = [
    "{",
    "}",
    '"name"',
    ": ",
    '"weather"',
    ", ",
    '"parameters"',
    '{"city": "Rome"}',
    '{"city": 3}',
    "{}",
    " ",
    "; ",
]
PIECES += ["\n", "<|python_tag|>", "```json\n", "```", "text", '"x"', written_call("llama3_json", ARGUMENTS)]


@pytest.mark.parametrize("name", UNMARKED)
def test_what_is_let_through_as_a_call_has_the_tools_arguments(
    name: str, tokenizer: TextTokenizer, table: LLTokenizer
) -> None:
    output_format = OutputFormat(name, "")
    matcher = matcher_of(OutputRules(tokenizer, output_format), pb.ChatInput(tools=[TOOL]), table)
    start = output_format.start(schemas_of([("weather", SCHEMA)]), "")
    assert start is not None

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.sampled_from(PIECES), max_size=9).map("".join))
    def check(text: str) -> None:
        parser = start()
        calls = [*parser.push(text).calls, *parser.finish().calls]
        begins_like_a_call = text.lstrip(" \n").removeprefix("<|python_tag|>").lstrip().startswith('{"name"')
        if passes(matcher, table, text):
            if begins_like_a_call and calls:
                assert calls[-1].complete
                joined: dict[int, str] = {}
                for call in calls:
                    joined[call.index] = joined.get(call.index, "") + call.arguments
                assert all(json.loads(each) == {"city": "Rome"} for each in joined.values())
        else:
            # Nothing is refused but what begins like a call.
            assert '{"name"' in text.replace(" ", "").replace("\n", "")

    check()


HARMONY = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|constrain|>", "<|return|>", "<|call|>")
OPENED = "<|start|>assistant"


@pytest.fixture(scope="module")
def harmony_tokenizer(tokenizer: TextTokenizer) -> TextTokenizer:
    with_marks = Tokenizer.from_str(tokenizer.to_json())
    with_marks.add_special_tokens([AddedToken(mark, special=True) for mark in (*HARMONY, "[THINK]", "[/THINK]")])
    return TextTokenizer(with_marks)


@pytest.fixture(scope="module")
def harmony_table(harmony_tokenizer: TextTokenizer) -> LLTokenizer:
    return LLTokenizer(harmony_tokenizer.to_json(), n_vocab=49152 + 16, eos_token=[2])


def harmony_passes(matcher: LLMatcher, tokenizer: TextTokenizer, text: str) -> bool:
    each = matcher.deep_copy()
    ids = asyncio.run(tokenizer.encode_text(text, add_special_tokens=False)).tolist()
    return bool(each.consume_tokens(ids)) and each.is_accepting()


def message(header: str, body: str) -> str:
    return f"<|channel|>{header}<|message|>{body}"


def test_calls_of_harmony_are_told_by_their_recipient(
    harmony_tokenizer: TextTokenizer, harmony_table: LLTokenizer
) -> None:
    rules = OutputRules(harmony_tokenizer, OutputFormat("openai", "openai_gptoss"))
    assert rules.optional_calls(pb.ChatInput(tools=[TOOL]), "elsewhere") is None
    matcher = matcher_of(rules, pb.ChatInput(tools=[TOOL]), harmony_table, OPENED)
    thought = message("analysis", "Hm, to=functions.weather?") + "<|end|>" + OPENED
    calls = [
        message("commentary to=functions.weather <|constrain|>json", ARGUMENTS),
        message("commentary to=functions.weather", ARGUMENTS),
        " to=functions.weather" + message("commentary <|constrain|>json", ARGUMENTS),
        " to=functions.weather" + message("commentary json", ARGUMENTS),
    ]
    for text in (message("final", "It is warm."), thought + message("final", "Yes = yes"), *calls, thought + calls[2]):
        assert harmony_passes(matcher, harmony_tokenizer, text), text
    for call in calls:
        for wrong in (call.replace('"Rome"', "3"), call.replace("weather", "other"), thought + call[:-1]):
            assert not harmony_passes(matcher, harmony_tokenizer, wrong), wrong
    forced = rules.forced_calls(pb.ChatInput(tools=[TOOL]), OPENED)
    held = LLMatcher(harmony_table, forced, log_level=0)
    assert harmony_passes(held, harmony_tokenizer, thought + calls[0])
    assert not harmony_passes(held, harmony_tokenizer, thought + message("final", "No."))


@pytest.mark.parametrize("name", [name for name in TOOL_FORMATS if TOOL_FORMATS[name].syntax.trigger])
@pytest.mark.parametrize("reasoning", ["", "qwen3"])
def test_a_format_leaves_room_for_calls(
    name: str, reasoning: str, tokenizer: TextTokenizer, table: LLTokenizer
) -> None:
    rules = OutputRules(tokenizer, OutputFormat(name, reasoning))
    assert rules.tells_calls("")
    source = rules.structured(pb.StructuredOutput(json_schema=ANSWER), "", pb.ChatInput(tools=[TOOL]))
    call = written_call(name, ARGUMENTS)
    thought = "<think>hm</think>\n\n" if reasoning else ""
    for text in ('{"is_warm": true}', call, f'{thought}{{"is_warm": true}}', thought + call):
        assert accepts(table, source, text), text
    wrong = written_call(name, WRONG[TOOL_FORMATS[name].syntax.tags is not None])
    for text in ("Sure.", f"Sure. {call}", wrong, '{"is_warm": 1}', f'{call}{{"is_warm": true}}'):
        assert not accepts(table, source, text), text


def test_a_format_of_harmony_leaves_room_for_calls(
    harmony_tokenizer: TextTokenizer, harmony_table: LLTokenizer
) -> None:
    rules = OutputRules(harmony_tokenizer, OutputFormat("openai", "openai_gptoss"))
    assert rules.tells_calls(OPENED) and not rules.tells_calls("elsewhere")
    source = rules.structured(pb.StructuredOutput(json_schema=ANSWER), OPENED, pb.ChatInput(tools=[TOOL]))
    held = LLMatcher(harmony_table, source, log_level=0)
    thought = message("analysis", "Hm.") + "<|end|>" + OPENED
    call = message("commentary to=functions.weather <|constrain|>json", ARGUMENTS)
    answer = message("final", '{"is_warm": true}')
    for text in (call, answer, thought + call, thought + answer):
        assert harmony_passes(held, harmony_tokenizer, text), text
    for text in (message("final", "Yes."), call.replace('"Rome"', "3"), call + answer):
        assert not harmony_passes(held, harmony_tokenizer, text), text


KINDS: list[tuple[pb.StructuredOutput, str, str]] = [
    (pb.StructuredOutput(json_schema=SCHEMA), ARGUMENTS, '{"city": 3}'),
    (pb.StructuredOutput(json_schema=SCHEMA, compact_json=True), ARGUMENTS.replace(" ", ""), '{ "city": "Rome"}'),
    (pb.StructuredOutput(json_object=pb.JsonObject()), '{"a": 1}', "[1]"),
    (pb.StructuredOutput(regex="[a-z]{3}[0-9]"), "abc1", "abc"),
    (pb.StructuredOutput(choice=pb.TextChoice(texts=["yes", "no"])), "no", "maybe"),
    (
        pb.StructuredOutput(grammar=pb.Grammar(text='start: "x" word+\nword: /[0-9]+/ ","')),
        "x12,3,",
        "x",
    ),
    (pb.StructuredOutput(grammar=pb.Grammar(text='root ::= "a" ("b" | root)')), "aab", "aa"),
    (
        pb.StructuredOutput(
            structural_tags=pb.StructuralTags(
                tags=[pb.StructuralTag(begin="<f>", json_schema=SCHEMA, end="</f>")], triggers=["<f>"]
            )
        ),
        f"See <f>{ARGUMENTS}</f>.",
        "See <f>1</f>",
    ),
    (
        pb.StructuredOutput(
            text_format=pb.TextFormat(tag=pb.FormatTag(begin="<f>", content=pb.TextFormat(regex="[a-z/]+"), end="</f>"))
        ),
        "<f>a/b</f>",
        "a/b</f>",
    ),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind[0].WhichOneof("format")))
@pytest.mark.parametrize("name", ["qwen3", "deepseek_r1", "granite", "mistral", "openai_gptoss"])
def test_every_kind_of_format_begins_after_the_reasoning(
    name: str,
    kind: tuple[pb.StructuredOutput, str, str],
    harmony_tokenizer: TextTokenizer,
    harmony_table: LLTokenizer,
) -> None:
    output, right, wrong = kind
    marks = REASONING_FORMATS[name]
    rules = OutputRules(harmony_tokenizer, OutputFormat("", name))
    if marks is None:
        prompt_end, before = OPENED, message("analysis", f"Hm, {wrong}") + "<|end|>" + OPENED + message("final", "")
        skipped = message("final <|constrain|>json", "")
    else:
        prompt_end, before, skipped = marks.begin, f"Hm, {wrong}{marks.end}\n\n", ""
    held = LLMatcher(harmony_table, rules.structured(output, prompt_end), log_level=0)
    assert not held.is_error(), held.get_error()
    assert harmony_passes(held, harmony_tokenizer, before + right)
    assert not harmony_passes(held, harmony_tokenizer, before + wrong)
    assert not harmony_passes(held, harmony_tokenizer, right if marks is None else "Hm.")
    # A prompt that leaves the thinking to the model: it may, or not.
    free = marks is not None and not marks.always
    if marks is None or free:
        asked = LLMatcher(harmony_table, rules.structured(output, OPENED if marks is None else "?"), log_level=0)
        opened = before if marks is None else marks.begin + before
        if marks is not None and output.HasField("structural_tags") and name != "mistral":
            # Where the marks are text, so is the thinking: a tag in it is held like any other.
            opened = marks.begin + "Hm" + marks.end
        assert harmony_passes(asked, harmony_tokenizer, skipped + right)
        assert harmony_passes(asked, harmony_tokenizer, opened + right)
        assert not harmony_passes(asked, harmony_tokenizer, skipped + wrong)
    # A text completion has no reasoning.
    plain = LLMatcher(harmony_table, rules.structured(output, None), log_level=0)
    assert harmony_passes(plain, harmony_tokenizer, right) and not harmony_passes(plain, harmony_tokenizer, wrong)


@pytest.mark.parametrize("name", ["qwen3", "deepseek_r1", "mistral"])
def test_free_calls_come_after_the_reasoning(
    name: str, harmony_tokenizer: TextTokenizer, harmony_table: LLTokenizer
) -> None:
    """What is thought of a call is not one; and a model that is free may think to its end."""
    marks = REASONING_FORMATS[name]
    assert marks is not None
    rules = OutputRules(harmony_tokenizer, OutputFormat("hermes", name))
    matcher = matcher_of(rules, pb.ChatInput(tools=[TOOL]), harmony_table, marks.begin)
    call, thought = written_call("hermes", ARGUMENTS), "I could say <tool_call>, or not."
    for text in (thought, thought + marks.end, thought + marks.end + "\n\nHi.", thought + marks.end + call):
        assert harmony_passes(matcher, harmony_tokenizer, text), text
    wrong = thought + marks.end + "\n" + written_call("hermes", '{"city": 3}')
    assert not harmony_passes(matcher, harmony_tokenizer, wrong)
    if not marks.always:
        asked = matcher_of(rules, pb.ChatInput(tools=[TOOL]), harmony_table, "?")
        for text in ("Hi.", call, marks.begin + "hm" + marks.end + call):
            assert harmony_passes(asked, harmony_tokenizer, text), text
        assert not harmony_passes(asked, harmony_tokenizer, written_call("hermes", '{"city": 3}'))


@pytest.mark.parametrize("name", [name for name, marks in REASONING_FORMATS.items() if marks is not None])
def test_an_answer_is_held_to_its_format_after_the_reasoning(
    name: str, tokenizer: TextTokenizer, table: LLTokenizer
) -> None:
    marks = REASONING_FORMATS[name]
    assert marks is not None
    rules = OutputRules(tokenizer, OutputFormat("", name))
    begun = rules.structured(pb.StructuredOutput(json_schema=SCHEMA), marks.begin)
    assert accepts(table, begun, f"Hm, {{well}}.{marks.end}\n\n{ARGUMENTS}")
    assert not accepts(table, begun, f"Hm.{marks.end}\n\nNo.")
    assert not accepts(table, begun, "Hm.")
    assert accepts(table, rules.structured(pb.StructuredOutput(json_schema=SCHEMA), None), ARGUMENTS)
