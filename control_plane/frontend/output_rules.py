"""What a request's text is held to: its structured output, and the calls that it must make."""

from __future__ import annotations

import re

from stepwire.v1 import inference_pb2 as pb

from control_plane.frontend import grammar
from control_plane.frontend.errors import RequestRefused, Violation
from control_plane.frontend.grammar import GrammarError
from control_plane.frontend.parsers.registry import CallSyntax, OutputFormat
from control_plane.frontend.tokenizer import TextTokenizer

_ANY_TEXT = "/(.|\\n)*/"
_ANY_OBJECT = '{"type":"object"}'


class OutputRules:
    def __init__(self, tokenizer: TextTokenizer, output_format: OutputFormat) -> None:
        self._tokenizer = tokenizer
        self._format = output_format

    def structured(self, output: pb.StructuredOutput, prompt_end: str | None) -> str:
        """A grammar's source. prompt_end: how a chat's prompt ends; None for text completions.

        Raises:
            RequestRefused: INVALID_ARGUMENT, with the field.
        """
        kind = output.WhichOneof("format")
        field = f"structured_output.{kind}"
        try:
            match kind:
                case "json_object":
                    source, rule = grammar.json_object_grammar(compact=output.compact_json), _ANY_OBJECT
                    rule = grammar.json_rule(rule)
                case "json_schema":
                    source = grammar.json_schema_grammar(output.json_schema, compact=output.compact_json)
                    rule = grammar.json_rule(output.json_schema)
                case "regex":
                    source, rule = grammar.regex_grammar(output.regex), ""
                case "choice":
                    field += ".texts"
                    source = grammar.choice_grammar(output.choice.texts)
                    rule = " | ".join(map(grammar.quoted, output.choice.texts))
                case "grammar":
                    field += ".text"
                    source, rule = grammar.context_free_grammar(output.grammar.text, _syntax(output.grammar)), ""
                case "structural_tags":
                    source, rule = self._structural_tags(output.structural_tags), ""
                case _:
                    raise RequestRefused.invalid(Violation("structured_output", "is empty: give a format"))
        except GrammarError as error:
            raise RequestRefused.invalid(Violation(field, str(error))) from error
        except ValueError as error:
            raise RequestRefused.invalid(Violation(field, f"cannot be read: {error}")) from error
        thinking = self._thinking(prompt_end)
        if thinking and rule:
            return grammar.lark_grammar(f"start: {thinking[0]} answer\nanswer: {rule}\n{thinking[1]}")
        return source

    def forced_calls(self, chat: pb.ChatInput, prompt_end: str) -> str:
        """The grammar of an answer that is one or several calls and nothing else."""
        syntax = self._format.syntax or CallSyntax('{"name": "', '", "parameters": ', "}", separator="\n")
        is_named = chat.tool_choice.WhichOneof("choice") == "function_name"
        allowed = [chat.tool_choice.function_name] if is_named else list(chat.tool_choice.allowed_function_names)
        several = not is_named and (not chat.HasField("parallel_tool_calls") or chat.parallel_tool_calls)
        calls = self._calls(chat, syntax, allowed)
        thinking = self._thinking(prompt_end)
        more = f" ({self._literal(syntax.separator)} call)*" if several and syntax.separator else ""
        start = " ".join(
            part
            for part in (
                thinking[0] if thinking else "",
                self._literal(syntax.begin_section),
                "call" + more,
                self._literal(syntax.end_section),
            )
            if part
        )
        return grammar.lark_grammar(f"start: {start}\n{calls}\n{thinking[1] if thinking else ''}")

    def optional_calls(self, chat: pb.ChatInput) -> str | None:
        """Free text in which a call, once it has begun, is held to its tool; None where nothing tells its beginning."""
        syntax = self._format.syntax
        if syntax is None or not syntax.trigger or self._format.tool_parser == "qwen3_coder":
            return None
        calls = self._calls(chat, syntax, list(chat.tool_choice.allowed_function_names))
        several = not chat.HasField("parallel_tool_calls") or chat.parallel_tool_calls
        in_section = bool(syntax.begin_section)
        begin = syntax.begin_section or syntax.before_name
        rest = self._literal(begin[len(syntax.trigger) :]) if in_section else ""
        trigger_id = self._tokenizer.special_id(syntax.trigger)
        if trigger_id is None:
            head = f"head[lazy]: TEXT {grammar.quoted(syntax.trigger)}"
        else:
            head = f"head: TEXT <[{trigger_id}]>"
        if in_section:
            more = f" ({self._literal(syntax.separator)} call)*" if several else ""
            body = f"{rest} call{more} {self._literal(syntax.end_section)}"
        else:
            calls = self._calls(chat, syntax, list(chat.tool_choice.allowed_function_names), after_trigger=True)
            body = "call"
        times = "*" if several else "?"
        return grammar.lark_grammar(
            f"start: section{times} TEXT\nsection: head {body}\n{head}\nTEXT: {_ANY_TEXT}\n{calls}"
        )

    def _calls(self, chat: pb.ChatInput, syntax: CallSyntax, allowed: list[str], *, after_trigger: bool = False) -> str:
        """Rules `call` and one for each tool."""
        rules = []
        before = syntax.before_name[len(syntax.trigger) :] if after_trigger else syntax.before_name
        for index, tool in enumerate(chat.tools):
            function = tool.function
            if allowed and function.name not in allowed:
                continue
            try:
                arguments = grammar.json_rule(function.parameters or _ANY_OBJECT)
            except (GrammarError, ValueError) as error:
                field = f"chat.tools[{index}].function.parameters"
                raise RequestRefused.invalid(Violation(field, str(error))) from error
            parts = (
                self._literal(before + function.name + syntax.after_name),
                f"args_{index}",
                self._literal(syntax.end),
            )
            rules.append((f"call_{index}", f"call_{index}: {' '.join(filter(None, parts))}\nargs_{index}: {arguments}"))
        names = " | ".join(name for name, _ in rules)
        return "\n".join([f"call: {names}", *(rule for _, rule in rules)])

    def _thinking(self, prompt_end: str | None) -> tuple[str, str] | None:
        """What comes before an answer that is held to something: (its place in `start`, its rules)."""
        reasoning = self._format.reasoning
        if reasoning is None or prompt_end is None:
            return None
        end_id = self._tokenizer.special_id(reasoning.end)
        if end_id is None:
            rules = f"thoughts[lazy]: THOUGHT {grammar.quoted(reasoning.end)}"
        else:
            rules = f"thoughts: THOUGHT <[{end_id}]>"
        rules += f"\nTHOUGHT: {_ANY_TEXT}\nGAP: /[ \\n]{{0,4}}/"
        if self._format.is_reasoning_begun(prompt_end):
            return "thoughts GAP", rules
        return f"({self._literal(reasoning.begin)} thoughts GAP)?", rules

    def _literal(self, text: str) -> str:
        """A text in which special tokens stand for themselves."""
        marks = [mark for mark in self._format.marks if self._tokenizer.special_id(mark) is not None]
        if not text or not marks:
            return grammar.quoted(text)
        pieces = re.split("(" + "|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True)) + ")", text)
        written = []
        for piece in pieces:
            token_id = self._tokenizer.special_id(piece) if piece in marks else None
            written.append(grammar.quoted(piece) if token_id is None else f"<[{token_id}]>")
        return " ".join(filter(None, written))

    def _structural_tags(self, tags: pb.StructuralTags) -> str:
        if not tags.tags:
            raise GrammarError("must hold at least one tag")
        rules, names = [], []
        for index, tag in enumerate(tags.tags):
            trigger = next((each for each in tags.triggers if each and tag.begin.startswith(each)), tag.begin)
            if not tag.begin or (tags.triggers and trigger not in tags.triggers):
                raise GrammarError(f"tag {index} begins with none of the triggers")
            names.append(f"tag_{index}")
            head = f"head_{index}[lazy]: TEXT {grammar.quoted(trigger)}"
            body = [
                f"head_{index}",
                grammar.quoted(tag.begin[len(trigger) :]),
                f"body_{index}",
                grammar.quoted(tag.end),
            ]
            rules.append(f"tag_{index}: {' '.join(filter(None, body))}\n{head}")
            rules.append(f"body_{index}: {grammar.json_rule(tag.json_schema or '{}')}")
        lines = [f"start: ({' | '.join(names)})* TEXT", f"TEXT: {_ANY_TEXT}", *rules]
        return grammar.lark_grammar("\n".join(lines))


def _syntax(message: pb.Grammar) -> str:
    if message.syntax == pb.GRAMMAR_SYNTAX_UNSPECIFIED:
        return "gbnf" if "::=" in message.text else "lark"
    return "gbnf" if message.syntax == pb.GRAMMAR_SYNTAX_GBNF else "lark"
