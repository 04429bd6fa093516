"""Grammars of calls: what they let through is what the format's own parser reads back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from llguidance import LLMatcher, LLTokenizer
from stepwire.v1 import inference_pb2 as pb

from control_plane.frontend.output_rules import OutputRules
from control_plane.frontend.parsers.registry import REASONING_FORMATS, TOOL_FORMATS, OutputFormat, schemas_of
from control_plane.frontend.tokenizer import TextTokenizer

SCHEMA = '{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}'
TOOL = pb.Tool(function=pb.FunctionTool(name="weather", parameters=SCHEMA))
ARGUMENTS = '{"city": "Rome"}'


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: Path) -> TextTokenizer:
    return TextTokenizer.from_file(smollm2_dir / "tokenizer.json")


@pytest.fixture(scope="module")
def table(tokenizer: TextTokenizer) -> LLTokenizer:
    return LLTokenizer(tokenizer.to_json(), n_vocab=49152, eos_token=[2])


def accepts(table: LLTokenizer, source: str, text: str) -> bool:
    """Whether the whole text, and its end there, are allowed."""
    matcher = LLMatcher(table, source, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return bool(matcher.consume_tokens(table.tokenize_str(text))) and matcher.is_accepting()


def written_call(name: str, arguments: str) -> str:
    syntax = TOOL_FORMATS[name].syntax
    return (
        f"{syntax.begin_section}{syntax.before_name}weather{syntax.after_name}{arguments}{syntax.end}"
        f"{syntax.end_section}"
    )


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_forced_calls_are_what_the_parser_reads(name: str, tokenizer: TextTokenizer, table: LLTokenizer) -> None:
    output_format = OutputFormat(name, "")
    chat = pb.ChatInput(tools=[TOOL], tool_choice=pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_REQUIRED))
    source = OutputRules(tokenizer, output_format).forced_calls(chat, "")
    assert accepts(table, source, written_call(name, ARGUMENTS))
    assert not accepts(table, source, written_call(name, '{"city": 3}'))
    assert not accepts(table, source, "Sure.")
    start = output_format.start(schemas_of([("weather", SCHEMA)]), "")
    assert start is not None
    parser = start()
    calls = [*parser.push(written_call(name, ARGUMENTS)).calls, *parser.finish().calls]
    assert "".join(call.name for call in calls) == "weather" and calls[-1].complete
    assert json.loads("".join(call.arguments for call in calls)) == json.loads(ARGUMENTS)


@pytest.mark.parametrize("name", [name for name in TOOL_FORMATS if TOOL_FORMATS[name].syntax.trigger])
def test_a_call_that_begins_in_free_text_is_held_to_its_tool(
    name: str, tokenizer: TextTokenizer, table: LLTokenizer
) -> None:
    source = OutputRules(tokenizer, OutputFormat(name, "")).optional_calls(pb.ChatInput(tools=[TOOL]))
    if name == "qwen3_coder":
        assert source is None  # it writes XML, whose values no schema describes
        return
    assert source is not None
    assert accepts(table, source, "Just text.")
    assert accepts(table, source, "Let me see. " + written_call(name, ARGUMENTS))
    assert not accepts(table, source, written_call(name, '{"city": 3}'))


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
