"""Which parser reads which model: by name (vLLM's), or found in the model's chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from control_plane.frontend.parsers import gemma4_calls, json_calls, marked_calls, python_calls, tagged_calls
from control_plane.frontend.parsers.reasoning import ReasoningMarks, only_text, with_reasoning
from control_plane.frontend.parsers.scanner import IncrementalParser, Parsing, Scanner
from control_plane.frontend.parsers.tagged_calls import Tags

Program = Callable[[Scanner], Parsing[None]]
NONE = "none"


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """How a model writes calls, for holding it to that: section(call(name, arguments) separator ...)."""

    before_name: str
    after_name: str
    end: str
    begin_section: str = ""
    # Between two calls; None: the answer ends after one.
    separator: str | None = None
    end_section: str = ""
    # What tells a call from text; empty where nothing does before its name.
    trigger: str = ""
    # Where there is no trigger: a whole text that begins so, and goes on with an object that has a name, is calls.
    opening: str = ""
    # What may follow the last of them.
    closing: str = ""
    # How the arguments are written: "json" or "gemma"; in `tags` where there are any.
    arguments: str = "json"
    tags: Tags | None = None
    # A call's number follows its name, after a colon.
    is_numbered: bool = False
    # A token that may open a text of calls, and one that may close it.
    opening_token: str = ""
    closing_token: str = ""
    # Calls may also be a list of Python's.
    may_be_python: bool = False


@dataclass(frozen=True, slots=True)
class ToolFormat:
    program: Callable[[Mapping[str, Mapping[str, Any]]], Program]
    syntax: CallSyntax
    # Tokens that must be seen although they are special.
    marks: tuple[str, ...] = ()


def _format(program: Program, syntax: CallSyntax, *marks: str) -> ToolFormat:
    return ToolFormat(lambda schemas: program, syntax, marks)


def _tagged(syntax: CallSyntax, *marks: str) -> ToolFormat:
    if syntax.tags is None:
        raise ValueError("arguments in tags need tags")
    return ToolFormat(tagged_calls.tagged_calls(syntax.tags), syntax, marks)


HERMES = CallSyntax(
    '<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", separator="\n", trigger="<tool_call>"
)
_PYTHON_TAG = "<|python_tag|>"
_PARAMETERS = CallSyntax(
    '{"name": "',
    '", "parameters": ',
    "}",
    separator="; ",
    opening=r"(<\|python_tag\|>[ \n]{0,4})?",
    opening_token=_PYTHON_TAG,
)
_FENCED = CallSyntax(
    '{"name": "',
    '", "parameters": ',
    "}",
    separator="\n",
    opening=r"(```(json|tool_code|python)?[ \n]{0,4})?",
    closing=r"([ \n]{0,4}```)?[ \n]{0,4}",
    may_be_python=True,
)
_PYTHON_START, _PYTHON_END = "<|python_start|>", "<|python_end|>"
_LLAMA4 = replace(
    _FENCED,
    opening=r"(<\|python_start\|>[ \n]{0,4})?",
    closing=r"[ \n]{0,4}(<\|python_end\|>)?",
    opening_token=_PYTHON_START,
    closing_token=_PYTHON_END,
)
_XML = CallSyntax(
    "<tool_call>\n<function=",
    ">\n",
    "</function>\n</tool_call>",
    separator="\n",
    trigger="<tool_call>",
    tags=tagged_calls.QWEN3_CODER,
)
_SEED = CallSyntax(
    "<seed:tool_call>\n<function=",
    ">\n",
    "</function>\n</seed:tool_call>",
    separator="\n",
    trigger="<seed:tool_call>",
    tags=tagged_calls.SEED_OSS,
)
_MINIMAX = CallSyntax(
    '<invoke name="',
    '">\n',
    "</invoke>",
    "<minimax:tool_call>\n",
    "\n",
    "\n</minimax:tool_call>",
    "<minimax:tool_call>",
    tags=tagged_calls.MINIMAX_M2,
)
_GLM = CallSyntax("<tool_call>", "\n", "</tool_call>", separator="\n", trigger="<tool_call>", tags=tagged_calls.GLM45)


def _dsml(section: str) -> CallSyntax:
    return CallSyntax(
        '<｜DSML｜invoke name="',
        '">\n',
        "</｜DSML｜invoke>",
        f"<｜DSML｜{section}>\n",
        "\n",
        f"\n</｜DSML｜{section}>",
        "｜DSML｜",
        tags=tagged_calls.DEEPSEEK_V32,
    )


_KIMI_MARKS = (
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
)
_KIMI = CallSyntax(
    "<|tool_call_begin|>functions.",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    _KIMI_MARKS[0],
    "",
    _KIMI_MARKS[1],
    _KIMI_MARKS[0],
    is_numbered=True,
)
_GEMMA4 = CallSyntax(
    "<|tool_call>call:", "{", "}<tool_call|>", separator="", trigger=gemma4_calls.BEGIN, arguments="gemma"
)


def _array(begin: str, end: str = "") -> CallSyntax:
    return CallSyntax('{"name": "', '", "arguments": ', "}", begin + "[", ", ", "]" + end, trigger=begin)


_DEEPSEEK_MARKS = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
)
_HARMONY_MARKS = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>", "<|call|>", "<|constrain|>")


def _deepseek(before_name: str, after_name: str, end: str, separator: str) -> CallSyntax:
    begin, finish = _DEEPSEEK_MARKS[:2]
    return CallSyntax(before_name, after_name, end, begin, separator, finish, begin)


TOOL_FORMATS: Mapping[str, ToolFormat] = {
    "hermes": _format(json_calls.hermes, HERMES, "<tool_call>", "</tool_call>"),
    "qwen3_coder": _tagged(_XML, "<tool_call>", "</tool_call>"),
    "seed_oss": _tagged(_SEED, "<seed:tool_call>", "</seed:tool_call>"),
    "minimax_m2": _tagged(_MINIMAX, "<minimax:tool_call>", "</minimax:tool_call>"),
    "glm45": _tagged(_GLM, "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    "llama3_json": _format(json_calls.llama3, _PARAMETERS, _PYTHON_TAG),
    "pythonic": ToolFormat(python_calls.pythonic, _FENCED),
    "gemma3": ToolFormat(python_calls.pythonic, _FENCED),
    "llama4_pythonic": ToolFormat(python_calls.pythonic, _LLAMA4, (_PYTHON_START, _PYTHON_END)),
    "mistral": _format(json_calls.mistral, _array("[TOOL_CALLS]"), "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    "hunyuan_a13b": _format(
        json_calls.hunyuan, _array("<tool_calls>", "</tool_calls>"), "<tool_calls>", "</tool_calls>"
    ),
    "granite": _format(json_calls.granite, _array("<|tool_call|>"), "<|tool_call|>", "<tool_call>"),
    "phi4_mini_json": _format(
        json_calls.phi4_mini, _array("<|tool_call|>", "<|/tool_call|>"), "<|tool_call|>", "<|/tool_call|>"
    ),
    "deepseek_v3": _format(
        marked_calls.deepseek,
        _deepseek("<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "\n```json\n", "\n```<｜tool▁call▁end｜>", "\n"),
        *_DEEPSEEK_MARKS,
    ),
    "deepseek_v31": _format(
        marked_calls.deepseek,
        _deepseek("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", ""),
        *_DEEPSEEK_MARKS,
    ),
    "deepseek_v32": _tagged(_dsml("function_calls"), "｜DSML｜"),
    "deepseek_v4": _tagged(_dsml("tool_calls"), "｜DSML｜"),
    "kimi_k2": _format(marked_calls.kimi_k2, _KIMI, *_KIMI_MARKS),
    "gemma4": _format(gemma4_calls.gemma4, _GEMMA4, gemma4_calls.BEGIN, gemma4_calls.END, gemma4_calls.QUOTE),
    "openai": _format(
        marked_calls.harmony,
        CallSyntax("<|channel|>commentary to=functions.", " <|constrain|>json<|message|>", ""),
        *_HARMONY_MARKS,
    ),
}

_THINK = ReasoningMarks("<think>", "</think>")
# Harmony's reasoning is read together with its calls.
REASONING_FORMATS: Mapping[str, ReasoningMarks | None] = {
    "qwen3": _THINK,
    "deepseek_r1": ReasoningMarks("<think>", "</think>", always=True),
    "deepseek_v3": _THINK,
    "glm45": _THINK,
    "kimi_k2": _THINK,
    "minimax_m2": _THINK,
    "seed_oss": ReasoningMarks("<seed:think>", "</seed:think>"),
    "hunyuan_a13b": ReasoningMarks("<think>", "</think>", answer=("<answer>", "</answer>")),
    "gemma4": ReasoningMarks("<|channel>", "<channel|>", heading="thought\n"),
    "granite": ReasoningMarks("Here is my thought process:", "Here is my response:"),
    "mistral": ReasoningMarks("[THINK]", "[/THINK]"),
    "openai_gptoss": None,
}


# The first mark that a template has tells the format; Hermes' where there is none.
_MARKS_OF_TOOLS = (
    ("<|channel|>", "openai"),
    ("｜DSML｜", "deepseek_v32"),
    ("<|tool_call>", "gemma4"),
    ("<minimax:tool_call>", "minimax_m2"),
    ("<seed:tool_call>", "seed_oss"),
    ("<|tool_calls_section_begin|>", "kimi_k2"),
    ("<arg_key>", "glm45"),
    ("<function=", "qwen3_coder"),
    ("[TOOL_CALLS]", "mistral"),
    (_DEEPSEEK_MARKS[0], "deepseek_v31"),
    ("<tool_call>", "hermes"),
    ("<tool_calls>", "hunyuan_a13b"),
    ("<|tool|>", "phi4_mini_json"),
    ("<|tool_call|>", "granite"),
    ("<|python_tag|>", "llama3_json"),
    ("<|start_header_id|>", "llama3_json"),
    ("<|header_start|>", "llama4_pythonic"),
    ("<start_of_turn>", "gemma3"),
)
_MARKS_OF_REASONING = (
    ("<|channel|>", "openai_gptoss"),
    ("<|channel>", "gemma4"),
    ("<seed:think>", "seed_oss"),
    ("[THINK]", "mistral"),
    ("Here is my thought process", "granite"),
    ("</think>", "qwen3"),
)
# Others that tell a model to answer between marks do not need it.
_MARKS_OF_HUNYUAN = ("<|extra_0|>", "<｜hy_")
# V4's section, in one piece or put together with the mark.
_DSML_TOOL_CALLS = re.compile(r"""(｜DSML｜|['"])tool_calls>""")


def find_tool_format(template: str) -> str:
    """By the marks in the model's chat template; Hermes' format where there are none."""
    found = next((name for mark, name in _MARKS_OF_TOOLS if mark in template), "hermes")
    if found == "deepseek_v32" and _DSML_TOOL_CALLS.search(template):
        return "deepseek_v4"
    return "deepseek_v3" if found == "deepseek_v31" and "```json" in template else found


def find_reasoning_format(template: str) -> str:
    """Empty where the template knows of no reasoning."""
    found = next((name for mark, name in _MARKS_OF_REASONING if mark in template), "")
    if found == "qwen3" and "<｜Assistant｜>" in template and _DEEPSEEK_MARKS[0] in template:
        # R1 always thinks; since V3.1 the prompt's end says whether the model does.
        return "deepseek_r1" if "```json" in template else "deepseek_v3"
    if found == "qwen3" and "<answer>" in template and any(mark in template for mark in _MARKS_OF_HUNYUAN):
        return "hunyuan_a13b"
    return found


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """How one model's text is read."""

    tool_parser: str
    # Empty: no reasoning.
    reasoning_parser: str

    @classmethod
    def choose(
        cls, template: str, tool_parser: str, reasoning_parser: str, *, shows_tools: bool = True
    ) -> OutputFormat:
        """Names of parsers, "auto" or "none".

        A template that shows no tools leaves it to us what the model is asked for: Gemma's own form, or Hermes'.
        """
        tool = find_tool_format(template) if tool_parser == "auto" else tool_parser
        if tool_parser == "auto" and not shows_tools and tool != "gemma3":
            tool = "hermes"
        reasoning = find_reasoning_format(template) if reasoning_parser == "auto" else reasoning_parser
        return cls("" if tool == NONE else tool, "" if reasoning == NONE else reasoning)

    @property
    def marks(self) -> tuple[str, ...]:
        """Special tokens that the parsers must see."""
        marks: tuple[str, ...] = TOOL_FORMATS[self.tool_parser].marks if self.tool_parser else ()
        reasoning = self.reasoning
        if reasoning is not None:
            marks += (reasoning.begin, reasoning.end, *(reasoning.answer or ()))
        return marks + (_HARMONY_MARKS if self.reasoning_parser == "openai_gptoss" else ())

    @property
    def reasoning(self) -> ReasoningMarks | None:
        return REASONING_FORMATS[self.reasoning_parser] if self.reasoning_parser else None

    @property
    def is_harmony(self) -> bool:
        return self.tool_parser == "openai" or self.reasoning_parser == "openai_gptoss"

    @property
    def syntax(self) -> CallSyntax | None:
        return TOOL_FORMATS[self.tool_parser].syntax if self.tool_parser else None

    def start(
        self, schemas: Mapping[str, Mapping[str, Any]] | None, prompt_end: str, *, calls_only: bool = False
    ) -> Callable[[], IncrementalParser] | None:
        """Parsers of one request's sequences; None where text is text.

        schemas: those of the tools, by name; None without tools. prompt_end: the rendered prompt's last characters.
        calls_only: the answer is held to calls.
        """
        reasoning = self.reasoning
        if self.is_harmony:
            return lambda: IncrementalParser(marked_calls.harmony, is_mute=calls_only)
        has_tools = schemas is not None and bool(self.tool_parser)
        if not has_tools and reasoning is None:
            return None
        program = TOOL_FORMATS[self.tool_parser].program(schemas or {}) if has_tools else only_text
        if reasoning is not None:
            program = with_reasoning(reasoning, program, is_begun=self.is_reasoning_begun(prompt_end))
        return lambda: IncrementalParser(program, is_mute=calls_only)

    def is_reasoning_begun(self, prompt_end: str) -> bool:
        reasoning = self.reasoning
        if reasoning is None:
            return False
        prompt_end = prompt_end.rstrip().removesuffix(reasoning.heading.rstrip())
        return prompt_end.endswith(reasoning.begin) or (reasoning.always and not prompt_end.endswith(reasoning.end))


def schemas_of(tools: Sequence[tuple[str, str]]) -> dict[str, Mapping[str, Any]]:
    """(name, schema text) to name -> schema; what is no schema is an empty one."""
    schemas: dict[str, Mapping[str, Any]] = {}
    for name, text in tools:
        try:
            schema = json.loads(text) if text else {}
        except (ValueError, RecursionError):
            schema = {}
        schemas[name] = schema if isinstance(schema, dict) else {}
    return schemas
