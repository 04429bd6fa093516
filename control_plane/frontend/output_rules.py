"""What a request's text is held to: its structured output, and the calls that it must make."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial

from stepwire.v1 import inference_pb2 as pb

from control_plane.frontend import grammar, harmony_calls
from control_plane.frontend.argument_forms import ArgumentForm, json_arguments, tagged_arguments
from control_plane.frontend.errors import RequestRefused, Violation
from control_plane.frontend.format_tokens import TokenVocabulary
from control_plane.frontend.gemma4_arguments import gemma4_arguments
from control_plane.frontend.grammar import GrammarError, regex_literal
from control_plane.frontend.parsers.registry import CallSyntax, OutputFormat
from control_plane.frontend.python_arguments import python_arguments
from control_plane.frontend.text_formats import from_structural_tags, syntax_of, text_format_grammar
from control_plane.frontend.tokenizer import TextTokenizer

_ANY_TEXT = "/(.|\\n)*/"
_NO_ARGUMENTS = '{"type":"object","properties":{},"additionalProperties":false}'
_FORMS: Mapping[str, ArgumentForm] = {"json": json_arguments, "gemma": gemma4_arguments, "python": python_arguments}


class OutputRules:
    def __init__(
        self, tokenizer: TextTokenizer, output_format: OutputFormat, eos_token_ids: frozenset[int] = frozenset()
    ) -> None:
        self._tokenizer = tokenizer
        self._format = output_format
        self._eos_token_ids = eos_token_ids

    def structured(
        self,
        output: pb.StructuredOutput,
        prompt_end: str | None,
        chat: pb.ChatInput | None = None,
        *,
        vocab_size: int | None = None,
    ) -> str:
        """A grammar's source.

        prompt_end: how a chat's prompt ends; None for text completions. chat: one whose tools may be called instead.
        vocab_size: how many ids the model's logits have, if the tokenizer may have more.

        Raises:
            RequestRefused: INVALID_ARGUMENT, with the field.
        """
        kind = output.WhichOneof("format")
        field = f"structured_output.{kind}"
        try:
            match kind:
                case "json_object":
                    source = grammar.json_object_grammar(compact=output.compact_json)
                case "json_schema":
                    source = grammar.json_schema_grammar(output.json_schema, compact=output.compact_json)
                case "regex":
                    source = grammar.regex_grammar(output.regex)
                case "choice":
                    field += ".texts"
                    source = grammar.choice_grammar(output.choice.texts)
                case "grammar":
                    field += ".text"
                    source = grammar.context_free_grammar(output.grammar.text, syntax_of(output.grammar))
                case "structural_tags":
                    layout = from_structural_tags(output.structural_tags)
                    source = self._text_format(layout, vocab_size, compact=output.compact_json)
                case "text_format":
                    source = self._text_format(output.text_format, vocab_size, compact=output.compact_json)
                case _:
                    raise RequestRefused.invalid(Violation("structured_output", "is empty: give a format"))
        except GrammarError as error:
            raise RequestRefused.invalid(Violation(field, str(error))) from error
        except ValueError as error:
            raise RequestRefused.invalid(Violation(field, f"cannot be read: {error}")) from error
        thinking = self._thinking(prompt_end)
        if thinking is None and chat is None:
            return source
        before, rules = thinking or ("", "")
        header = ""
        if thinking is not None and self._format.is_harmony:
            header = " final"
            rules += "\n" + harmony_calls.final_rule(self._special)
        if chat is None:
            return grammar.after(source, before + header, rules)
        calls, call_rules = self._only_calls(chat)
        return grammar.after(source, f"{before} {calls} | {before}{header}", f"{rules}\n{call_rules}")

    def tells_calls(self, prompt_end: str) -> bool:
        """Whether a mark tells a call from an answer that is held to a format."""
        if self._format.is_harmony:
            return harmony_calls.can_be_told(self._special, prompt_end)
        return self._format.syntax is not None and bool(self._format.syntax.trigger)

    def forced_calls(self, chat: pb.ChatInput, prompt_end: str) -> str:
        """The grammar of an answer that is one or several calls and nothing else."""
        answer, calls = self._only_calls(chat)
        before, thoughts = self._thinking(prompt_end) or ("", "")
        return grammar.lark_grammar(f"start: {before} {answer}\n{calls}\n{thoughts}")

    def _only_calls(self, chat: pb.ChatInput) -> tuple[str, str]:
        """(expression, rules): one or several calls and nothing else."""
        syntax = self._format.syntax or CallSyntax('{"name": "', '", "parameters": ', "}", separator="\n")
        is_named = chat.tool_choice.WhichOneof("choice") == "function_name"
        allowed = [chat.tool_choice.function_name] if is_named else list(chat.tool_choice.allowed_function_names)
        several = not is_named and _may_be_several(chat)
        calls = self._calls(chat, syntax, allowed)
        more = f" ({self._literal(syntax.separator or '')} call)*" if several and syntax.separator is not None else ""
        section = [self._literal(syntax.begin_section), "call" + more, self._literal(syntax.end_section)]
        answer = " ".join(filter(None, section))
        if syntax.may_be_python and (python := self._python_calls(chat, allowed, several=several)):
            answer, calls = f"({answer} | {python[0]})", f"{calls}\n{python[1]}"
        return answer, calls

    def optional_calls(self, chat: pb.ChatInput, prompt_end: str) -> str | None:
        """Free text in which a call, once it has begun, is held to its tool; None where nothing tells its beginning."""
        syntax = self._format.syntax
        if self._format.is_harmony:
            return self._harmony_calls(chat, prompt_end)
        if syntax is None:
            return None
        body, rules = self._triggered_calls(chat, syntax) if syntax.trigger else self._whole_calls(chat, syntax)
        thinking = self._thinking(prompt_end)
        if thinking is None:
            return grammar.lark_grammar(f"start: {body}\n{rules}")
        before, thoughts = thinking
        if not self._format.is_reasoning_begun(prompt_end):
            return grammar.lark_grammar(f"start: {before} ({body})\n{rules}\n{thoughts}")
        # It may also think to its end.
        end = self._format.reasoning.end if self._format.reasoning is not None else ""
        unfinished = f"UNFINISHED: {_ANY_TEXT} & ~/(.|\\n)*{regex_literal(end)}(.|\\n)*/"
        return grammar.lark_grammar(f"start: UNFINISHED | {before} ({body})\n{rules}\n{thoughts}\n{unfinished}")

    def _triggered_calls(self, chat: pb.ChatInput, syntax: CallSyntax) -> tuple[str, str]:
        """(expression, rules): text with calls behind a mark."""
        calls = self._calls(chat, syntax, list(chat.tool_choice.allowed_function_names))
        several = _may_be_several(chat)
        in_section = bool(syntax.begin_section)
        begin = syntax.begin_section or syntax.before_name
        rest = self._literal(begin.partition(syntax.trigger)[2]) if in_section else ""
        trigger_id = self._tokenizer.special_id(syntax.trigger)
        if trigger_id is None:
            head = f"head[lazy]: TEXT {grammar.quoted(syntax.trigger)}"
        else:
            head = f"head: TEXT <[{trigger_id}]>"
        if in_section:
            more = f" ({self._literal(syntax.separator or '')} call)*" if several else ""
            body = f"{rest} call{more} {self._literal(syntax.end_section)}"
        else:
            calls = self._calls(chat, syntax, list(chat.tool_choice.allowed_function_names), after_trigger=True)
            body = "call"
        times = "*" if several else "?"
        return f"section{times} TEXT", f"section: head {body}\n{head}\nTEXT: {_ANY_TEXT}\n{calls}"

    def _whole_calls(self, chat: pb.ChatInput, syntax: CallSyntax) -> tuple[str, str]:
        """(expression, rules): calls and nothing else, or a text that does not begin like one.

        Where no mark tells a call from text, an object with a name at the very beginning does: for the format's parser
        it is one. So is a list of Python's calls of tools, where the format knows it. Each head is one terminal, so
        that a text and a call are told apart letter by letter.
        """
        tag_id = self._tokenizer.special_id(syntax.opening_token) if syntax.opening_token else None
        closing_id = self._tokenizer.special_id(syntax.closing_token) if syntax.closing_token else None
        opening = syntax.opening if tag_id is None else ""
        blank = r"[ \n]{0,8}"
        object_begin = rf'\{{{blank}("type"{blank}:{blank}"function"{blank},{blank})?"name"'
        begin = rf"[ \n]{{0,16}}{opening}{object_begin}"
        allowed = list(chat.tool_choice.allowed_function_names)
        text = f"TEXT: {_ANY_TEXT} & ~/{begin}(.|\\n)*/"
        several = _may_be_several(chat)
        python = self._python_calls(chat, allowed, several=several, opening=opening) if syntax.may_be_python else None
        if syntax.may_be_python:
            names_of_tools = "|".join(regex_literal(tool.function.name) for tool in chat.tools)
            text += rf" & ~/[ \n]{{0,16}}{opening}\[{blank}({names_of_tools})\((.|\n)*/"
        rules = [text]
        names = []
        for index, function, arguments in self._tools(chat, allowed, _form_of(syntax)):
            rest = (
                rf'{blank}:{blank}"{regex_literal(function.name)}"{blank},'
                rf'{blank}"(parameters|arguments)"{blank}:{blank}'
            )
            names.append(index)
            rules += [
                f"first_{index}: FIRST_{index} args_{index} END",
                f"FIRST_{index}: /{begin}{rest}/",
                f"next_{index}: NEXT_{index} args_{index} END",
                f"NEXT_{index}: /{object_begin}{rest}/",
                f"args_{index}: {arguments}",
            ]
        firsts, nexts = (" | ".join(f"{kind}_{index}" for index in names) for kind in ("first", "next"))
        more = f" (SEPARATOR ({nexts}))*" if several else ""
        closing = " CLOSING?" if syntax.closing else ""
        rules += [r"END: /[ \n]{0,16}\}/", r"SEPARATOR: /[ \n]{0,4};[ \n]{0,4}|\n{1,4}/"]
        if closing_id is not None:
            closing = rf" (BEFORE_CLOSING? <[{closing_id}]>)?"
            rules.append(r"BEFORE_CLOSING: /[ \n]{1,4}/")
        elif syntax.closing:
            rules.append(f"CLOSING: /{syntax.closing}/")
        calls = f"({firsts}){more}{closing}"
        if python is not None:
            calls = f"({calls} | {python[0]}{closing})"
            rules.append(python[1])
        if tag_id is not None:
            return f"TEXT | {calls} | TEXT <[{tag_id}]> {calls}", "\n".join(rules)
        return f"TEXT | {calls}", "\n".join(rules)

    def _python_calls(
        self, chat: pb.ChatInput, allowed: list[str], *, several: bool, opening: str = ""
    ) -> tuple[str, str] | None:
        """(expression, rules): a list of Python's calls; None where one of the tools has arguments that it cannot hold.

        Then the list is not the model's to write: objects are.
        """
        rules = [r"COMMA: /[ \n]{0,4},[ \n]{0,4}/", r"BRACKET: /[ \n]{0,4}\]/"]
        indexes = []
        try:
            for index, function, arguments in self._tools(chat, allowed, python_arguments, "pyargs"):
                name = regex_literal(function.name)
                indexes.append(index)
                rules += [
                    f'pyfirst_{index}: PYFIRST_{index} pyargs_{index} ")"',
                    rf"PYFIRST_{index}: /[ \n]{{0,16}}{opening}\[[ \n]{{0,8}}{name}\(/",
                    f'pynext_{index}: {grammar.quoted(function.name + "(")} pyargs_{index} ")"',
                    f"pyargs_{index}: {arguments}",
                ]
        except RequestRefused:
            return None
        firsts, nexts = (" | ".join(f"{kind}_{index}" for index in indexes) for kind in ("pyfirst", "pynext"))
        more = f" (COMMA ({nexts}))*" if several else ""
        return f"({firsts}){more} BRACKET", "\n".join(rules)

    def _harmony_calls(self, chat: pb.ChatInput, prompt_end: str) -> str | None:
        if not harmony_calls.can_be_told(self._special, prompt_end):
            return None
        tools = [
            (index, function.name, arguments)
            for index, function, arguments in self._tools(chat, list(chat.tool_choice.allowed_function_names))
        ]
        return grammar.lark_grammar(harmony_calls.conversation(self._special, tools))

    def _special(self, mark: str) -> str:
        """A mark as a token of Lark; empty where the tokenizer has no such special token."""
        token_id = self._tokenizer.special_id(mark)
        return "" if token_id is None else f"<[{token_id}]>"

    def _tools(
        self, chat: pb.ChatInput, allowed: list[str], form: ArgumentForm = json_arguments, prefix: str = "args"
    ) -> Iterator[tuple[int, pb.FunctionTool, str]]:
        """(index, function, its arguments as the end of a Lark rule) of the tools that may be called."""
        for index, tool in enumerate(chat.tools):
            function = tool.function
            if allowed and function.name not in allowed:
                continue
            try:
                arguments = form(function.parameters or _NO_ARGUMENTS, f"{prefix}_{index}", self._literal)
            except (GrammarError, ValueError) as error:
                field = f"chat.tools[{index}].function.parameters"
                raise RequestRefused.invalid(Violation(field, str(error))) from error
            yield index, function, arguments

    def _calls(self, chat: pb.ChatInput, syntax: CallSyntax, allowed: list[str], *, after_trigger: bool = False) -> str:
        """Rules `call` and one for each tool."""
        rules = []
        before = syntax.before_name[len(syntax.trigger) :] if after_trigger else syntax.before_name
        for index, function, arguments in self._tools(chat, allowed, _form_of(syntax)):
            parts = (
                self._literal(before + function.name),
                r"/:[0-9]{1,6}/" if syntax.is_numbered else "",
                self._literal(syntax.after_name),
                f"args_{index}",
                self._literal(syntax.end),
            )
            rules.append((f"call_{index}", f"call_{index}: {' '.join(filter(None, parts))}\nargs_{index}: {arguments}"))
        names = " | ".join(name for name, _ in rules)
        return "\n".join([f"call: {names}", *(rule for _, rule in rules)])

    def _thinking(self, prompt_end: str | None) -> tuple[str, str] | None:
        """What comes before an answer that is held to something: (its place in `start`, its rules)."""
        reasoning = self._format.reasoning
        if prompt_end is None:
            return None
        if self._format.is_harmony and harmony_calls.can_be_told(self._special, prompt_end):
            return "thought*", harmony_calls.thought_rules(self._special)
        if reasoning is None:
            return None
        end_id = self._tokenizer.special_id(reasoning.end)
        if end_id is None:
            rules = f"thoughts[lazy]: THOUGHT {grammar.quoted(reasoning.end)}"
        else:
            rules = f"thoughts: THOUGHT <[{end_id}]>"
        rules += f"\nTHOUGHT: {_ANY_TEXT}\nGAP: /[ \\n]{{0,4}}/"
        if self._format.is_reasoning_begun(prompt_end):
            return "thoughts GAP", rules
        if end_id is None and self._tokenizer.special_id(reasoning.begin) is None:
            # One terminal from mark to mark: a text that may begin with anything must not win over it.
            opened = f"opened[lazy]: {grammar.quoted(reasoning.begin)} THOUGHT {grammar.quoted(reasoning.end)}"
            return "(opened GAP)?", f"{opened}\n{rules}"
        return f"({self._literal(reasoning.begin)} thoughts GAP)?", rules

    def _literal(self, text: str) -> str:
        """A text in which the format's marks stand for themselves where they are special tokens."""
        return self._with_tokens(
            text, [mark for mark in self._format.marks if self._tokenizer.special_id(mark) is not None]
        )

    def _format_literal(self, text: str) -> str:
        """A client's text in which special tokens stand for themselves, but for those that would end the sequence."""
        names = self._tokenizer.special_texts
        return self._with_tokens(text, [name for name, each in names.items() if each not in self._eos_token_ids])

    def _with_tokens(self, text: str, marks: list[str]) -> str:
        marks = [mark for mark in marks if mark in text]
        if not text or not marks:
            return grammar.quoted(text)
        pieces = re.split("(" + "|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True)) + ")", text)
        written = []
        for piece in pieces:
            token_id = self._tokenizer.special_id(piece) if piece in marks else None
            written.append(grammar.quoted(piece) if token_id is None else f"<[{token_id}]>")
        return " ".join(filter(None, written))

    def _text_format(self, layout: pb.TextFormat, vocab_size: int | None, *, compact: bool) -> str:
        ranges = self._tokenizer.id_ranges
        if vocab_size is not None:
            ranges = tuple((first, min(last, vocab_size - 1)) for first, last in ranges if first < vocab_size)
        tokenizer = self._tokenizer
        vocabulary = TokenVocabulary(tokenizer.id_of_text, tokenizer.text_of_id, ranges, self._eos_token_ids)
        return text_format_grammar(
            layout,
            literal=self._format_literal,
            special_id=self._tokenizer.special_id,
            vocabulary=vocabulary,
            compact=compact,
        )


def _form_of(syntax: CallSyntax) -> ArgumentForm:
    return _FORMS[syntax.arguments] if syntax.tags is None else partial(tagged_arguments, syntax.tags)


def _may_be_several(chat: pb.ChatInput) -> bool:
    return not chat.HasField("parallel_tool_calls") or chat.parallel_tool_calls
