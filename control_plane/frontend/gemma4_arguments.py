"""Grammars of arguments as Gemma 4 writes them: `key:value,key:value`, keys bare, strings in quotes of their own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from control_plane.frontend import grammar
from control_plane.frontend.argument_forms import Literal, names_of, parsed_schema, text_until
from control_plane.frontend.grammar import GrammarError, quoted
from control_plane.frontend.parsers.argument_types import top_level
from control_plane.frontend.parsers.gemma4_calls import QUOTE
from control_plane.frontend.python_arguments import PythonValues
from control_plane.frontend.text_constraints import text_terminal

_KEY = re.compile(r"[^\s:,{}\[\]<>\"]+")


def gemma4_arguments(schema: str, prefix: str, literal: Literal = quoted) -> str:
    """The inside of the braces; in the schema's order."""
    root = parsed_schema(schema)
    top = top_level(root)
    names_of(top)  # refuses what it cannot hold
    values = _GemmaValues(root, prefix, literal)
    expression = values.inside(top)
    return "\n".join([expression or '""', *values.rules])


class _GemmaValues(PythonValues):
    def __init__(self, root: Mapping[str, Any], prefix: str, literal: Literal) -> None:
        super().__init__(root, prefix)
        self.rules.clear()
        self.blank = ""
        self._literal = literal

    def _string(self, schema: Mapping[str, Any]) -> str:
        name = self._name()
        text = text_until(QUOTE, QUOTE, text_terminal(schema, self._root), name, self.rules, self._literal)
        self.rules.append(f"{name}: {self._literal(QUOTE)} {text}")
        return name

    def _spelled(self, value: Any) -> list[str]:
        return [self._literal(_written(value))]

    def _spelled_key(self, key: str) -> list[str]:
        return [quoted(_checked_key(key))]

    def _further_key(self, properties: Iterable[str]) -> str:
        name = self._name().upper()
        taken = "".join(f" & ~/{grammar.regex_literal(each)}/" for each in properties)
        self.rules.append(f"{name}: /[A-Za-z0-9_.-]+/{taken}")
        return name


def _checked_key(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise GrammarError(
            f"a property named {key[:80]!r} cannot be written in the form in which this model writes calls"
        )
    return key


def _written(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            if QUOTE in value:
                raise GrammarError(f"a value with {QUOTE} in it cannot be written by this model")
            return f"{QUOTE}{value}{QUOTE}"
        case list():
            return f"[{','.join(map(_written, value))}]"
        case dict():
            return f"{{{','.join(f'{_checked_key(key)}:{_written(each)}' for key, each in value.items())}}}"
        case _:
            return repr(value)
