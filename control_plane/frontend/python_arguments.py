"""Grammars of arguments as Python writes them: keywords with literals, in the schema's order."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from control_plane.frontend import grammar
from control_plane.frontend.argument_forms import (
    OF_ARRAYS,
    OF_NUMBERS,
    OF_OBJECTS,
    Literal,
    check_keywords,
    further_of,
    names_of,
    parsed_schema,
)
from control_plane.frontend.grammar import GrammarError, quoted
from control_plane.frontend.parsers.argument_types import resolved, top_level, type_of
from control_plane.frontend.text_constraints import REFUSED, check_disjoint, text_terminal

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_BLANKS = r"/[ \n]{1,4}/"
_MAX_RULES = 2000


def python_arguments(schema: str, prefix: str, literal: Literal = quoted) -> str:
    """`key=value, key=value` with literals of Python; in the schema's order."""
    root = parsed_schema(schema)
    values = PythonValues(root, prefix)
    top = top_level(root)
    properties, required = names_of(top)
    wrong = next((key for key in properties if not _IDENTIFIER.fullmatch(key)), None)
    if wrong is not None:
        raise GrammarError(f"a property named {wrong[:80]!r} cannot be written as an argument of Python")
    members = [
        (f'"{key}" {values.blank} "=" {values.blank}', value, key in required) for key, value in properties.items()
    ]
    further = further_of(top, properties)
    if further is not False:
        taken = "".join(f" & ~/{key}/" for key in properties)
        values.rules.append(f"{prefix.upper()}_KEY: /[A-Za-z_][A-Za-z0-9_]*/{taken}")
        key = f'{prefix.upper()}_KEY {values.blank} "=" {values.blank}'
    else:
        key = ""
    expression = values.members(members, key, further)
    return "\n".join([expression or '""', *values.rules])


class PythonValues:
    """Rules of literals of Python for one schema."""

    def __init__(self, root: Mapping[str, Any], prefix: str) -> None:
        self.rules: list[str] = [f"{prefix}_blank: {_BLANKS}"]
        # Between any two signs.
        self.blank = f"{prefix}_blank?"
        self._root = root
        self._prefix = prefix
        self._by_reference: dict[str, str] = {}
        self._num_rules = 0
        self._any = ""

    def _add(self, expression: str, name: str = "") -> str:
        name = name or self._name()
        self.rules.append(f"{name}: {expression}")
        return name

    def _name(self) -> str:
        self._num_rules += 1
        if self._num_rules > _MAX_RULES:
            raise GrammarError("is too large")
        return f"{self._prefix}_{self._num_rules}"

    def members(self, members: Sequence[tuple[str, Any, bool]], further_key: str, further: Any) -> str:
        """Members in their order, each (key and sign, schema, whether it must be there), and others after them."""
        comma = f'{self.blank} "," {self.blank}'
        # From the last to the first: what may follow a member, and what the list is from there on.
        following, whole = "", ""
        if further_key:
            another = self._add(f"{further_key} {self.value(further)}")
            following, whole = self._add(f"({comma} {another})*"), f"({another} ({comma} {another})*)?"
        for head, schema, is_needed in reversed(members):
            member = self._add(f"{head} {self.value(schema)}")
            listed = f"{member} {following}".strip()
            whole = listed if is_needed else f"({listed} | {whole})" if whole else f"({listed})?"
            after = f"{comma} {member} {following}".strip()
            following = self._add(after if is_needed else f"({after} | {following})" if following else f"({after})?")
            whole = self._add(whole)
        return whole

    def value(self, schema: Any) -> str:
        if schema is False:
            raise GrammarError("a value that must not be there")
        if not isinstance(schema, Mapping) or not schema:
            return self._anything()
        if isinstance(schema.get("$ref"), str):
            check_keywords(
                schema,
                OF_OBJECTS | OF_ARRAYS | frozenset(OF_NUMBERS) | {"minLength", "maxLength", "pattern", "format"},
            )
            return self._referred(schema["$ref"])
        for keyword in ("anyOf", "oneOf"):
            if isinstance(schema.get(keyword), list):
                if keyword == "oneOf":
                    check_disjoint(schema[keyword], self._root)
                rest = {key: value for key, value in schema.items() if key != keyword}
                return self._either(
                    [{**rest, **each} if isinstance(each, Mapping) else each for each in schema[keyword]]
                )
        branches = schema.get("allOf")
        if isinstance(branches, list):
            if len(branches) != 1 or not isinstance(branches[0], Mapping):
                raise GrammarError("'allOf' of several cannot be held in the form in which this model writes calls")
            return self.value({**{key: each for key, each in schema.items() if key != "allOf"}, **branches[0]})
        if "const" in schema or isinstance(schema.get("enum"), list):
            return self._listed([schema["const"]] if "const" in schema else schema["enum"], schema)
        declared = schema.get("type")
        if isinstance(declared, list):
            return self._either([{**schema, "type": each} for each in declared])
        return self._of_type(declared, schema)

    def _of_type(self, declared: Any, schema: Mapping[str, Any]) -> str:
        match declared:
            case "string":
                return self._string(schema)
            case "integer" | "number":
                check_keywords(schema, REFUSED)
                limits = {key: schema[key] for key in OF_NUMBERS if key in schema}
                return grammar.json_rule(json.dumps({"type": declared, **limits}))
            case "boolean":
                return self._listed([True, False], {})
            case "null":
                return self._listed([None], {})
            case "array":
                return self._array(schema)
            case "object":
                return self._object(schema)
            case _:
                check_keywords(schema, OF_OBJECTS | OF_ARRAYS | frozenset(OF_NUMBERS))
                return self._anything()

    def _referred(self, reference: str) -> str:
        name = self._by_reference.get(reference)
        if name is None:
            found = resolved(reference, self._root)
            if found is None:
                raise GrammarError(f"{reference[:80]!r} refers to nothing")
            name = self._by_reference[reference] = self._name()
            expression = self.value(found)
            if expression == name:
                raise GrammarError(f"{reference[:80]!r} refers to itself")
            self.rules.append(f"{name}: {expression}")
        return name

    def _either(self, branches: Sequence[Any]) -> str:
        return f"({' | '.join(self._add(self.value(each)) for each in branches)})"

    def _listed(self, values: Sequence[Any], schema: Mapping[str, Any]) -> str:
        declared = schema.get("type")
        allowed = [declared] if isinstance(declared, str) else declared
        kept = [each for each in values if allowed is None or _is_of(each, allowed)]
        if not kept:
            raise GrammarError("a value that nothing satisfies")
        return f"({' | '.join(spelling for each in kept for spelling in self._spelled(each))})"

    def _spelled(self, value: Any) -> list[str]:
        """A value as expressions, each one of the ways to write it."""
        return [quoted(spelling) for spelling in _spellings(value)]

    def _string(self, schema: Mapping[str, Any]) -> str:
        name = self._name().upper()
        held = text_terminal(schema, self._root)
        if held:
            # Nothing in it needs an escape.
            quotes = [(mark, f"(/[^{mark}\\\\\\n\\r]*/ & ({held}))") for mark in "\"'"]
        else:
            quotes = [(mark, rf"/([^{mark}\\\n\r]|\\[\\'\"ntr])*/") for mark in "\"'"]
        self.rules.append(f"{name}: " + " | ".join(f"{quoted(mark)} {body} {quoted(mark)}" for mark, body in quotes))
        return name

    def _array(self, schema: Mapping[str, Any]) -> str:
        check_keywords(schema, OF_ARRAYS)
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        items = schema.get("items", True)
        if most == 0 or items is False:
            return f'"[" {self.blank} "]"'
        item = self._add(self.value(items))
        more = f"{{{max(0, least - 1)},{'' if most is None else most - 1}}}"
        listed = f'{item} ({self.blank} "," {self.blank} {item}){more}'
        return f'"[" {self.blank} {listed if least else f"({listed})?"} {self.blank} "]"'

    def _object(self, schema: Mapping[str, Any]) -> str:
        return f'"{{" {self.blank} {self.inside(schema)} {self.blank} "}}"'

    def inside(self, schema: Mapping[str, Any]) -> str:
        """What stands between an object's braces."""
        properties, required = names_of(schema)
        members = [
            (f'({" | ".join(self._spelled_key(key))}) {self.blank} ":" {self.blank}', value, key in required)
            for key, value in properties.items()
        ]
        further, key = further_of(schema, properties), ""
        if further is not False:
            key = f'{self._further_key(properties)} {self.blank} ":" {self.blank}'
        return self.members(members, key, further)

    def _spelled_key(self, key: str) -> list[str]:
        return self._spelled(key)

    def _further_key(self, properties: Iterable[str]) -> str:
        """A rule of the names that none of the properties has."""
        name = self._name().upper()
        taken = "".join(f" & ~/{grammar.regex_literal(each)}/" for each in properties)
        self.rules.append(f'{name}: "\\"" (/[^"\\\\\\n\\r]*/{taken}) "\\""')
        return name

    def _anything(self) -> str:
        if not self._any:
            name = self._any = self._name()
            types = ("string", "number", "boolean", "null")
            plain = [self._of_type(each, {"type": each}) for each in types]
            listed = self._array({"items": True})
            self.rules.append(f"{name}: {' | '.join(plain)} | {listed} | {self._object({})}")
        return self._any


def _is_of(value: Any, allowed: Sequence[str]) -> bool:
    kind = type_of(value)
    return kind in allowed or (kind == "integer" and "number" in allowed)


def _spellings(value: Any) -> list[str]:
    """A value as Python writes it; a string in either of its quotes."""
    if not isinstance(value, str):
        return [repr(value)]
    escaped = value.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return [f"{mark}{escaped.replace(mark, chr(92) + mark)}{mark}" for mark in "\"'"]
