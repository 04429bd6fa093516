"""Grammars of a call's arguments, by the form in which a model writes them: here JSON and tags.

Each form turns a tool's JSON Schema into a Lark expression and the rules that it needs, so that what its parser makes
of the text is a value of the schema. In all but JSON a property that the schema does not name is only written where
the schema speaks of such, or names none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from control_plane.frontend import grammar
from control_plane.frontend.grammar import GrammarError, quoted
from control_plane.frontend.parsers.argument_types import Written, properties_of, top_level, written_as
from control_plane.frontend.parsers.tagged_calls import Tags
from control_plane.frontend.text_constraints import REFUSED, text_terminal

# A text as an expression of Lark, in which special tokens stand for themselves.
Literal = Callable[[str], str]
# (schema text, a prefix for the names of rules, literal) -> an expression of Lark, and rules on the lines after it.
ArgumentForm = Callable[[str, str, Literal], str]

# Of the arguments as a whole: what these forms do not hold.
OF_OBJECTS = frozenset({"anyOf", "oneOf", "allOf", "patternProperties", "minProperties", "maxProperties", "enum"})
OF_OBJECTS |= {"propertyNames", "dependentRequired", "dependentSchemas", "unevaluatedProperties", "const"} | REFUSED
OF_ARRAYS = REFUSED | {"prefixItems", "contains", "uniqueItems", "unevaluatedItems"}
OF_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


def json_arguments(schema: str, prefix: str, literal: Literal = quoted) -> str:
    return grammar.json_rule(schema)


def parsed_schema(schema: str) -> dict[str, Any]:
    parsed = json.loads(grammar.checked_schema(schema))
    return parsed if isinstance(parsed, dict) else {}


def check_keywords(schema: Mapping[str, Any], refused: frozenset[str]) -> None:
    found = sorted(refused & set(schema))
    if found:
        raise GrammarError(f"{found[0]!r} cannot be held in the form in which this model writes calls")


def names_of(schema: Mapping[str, Any]) -> tuple[dict[str, Any], frozenset[str]]:
    """(properties, the required ones among them) of an object."""
    check_keywords(schema, OF_OBJECTS)
    required = schema.get("required")
    needed = [key for key in required if isinstance(key, str)] if isinstance(required, list) else []
    properties = dict(properties_of(schema))
    for key in needed:
        properties.setdefault(key, {})
    return properties, frozenset(needed)


def further_of(schema: Mapping[str, Any], properties: Mapping[str, Any]) -> Any:
    """The schema of properties that have no name; False: there are none."""
    return schema.get("additionalProperties", not properties)


# ---- tags ----


def tagged_arguments(tags: Tags, schema: str, prefix: str, literal: Literal = quoted) -> str:
    """A name in its tags, the value, the tag that ends it, a line break, and so on; in the schema's order."""
    root = parsed_schema(schema)
    top = top_level(root)
    properties, required = names_of(top)
    parts: list[str] = []
    rules: list[str] = []
    for number, (key, value) in enumerate(properties.items()):
        if not key or re.search(r"[<>\"\n]", key):
            raise GrammarError(f"a property named {key[:80]!r} cannot be written in tags")
        name = f"{prefix}_{number}"
        parts.append(name if key in required else f"{name}?")
        tagged = _tagged_value(tags, value, root, name, rules, literal)
        rules.append(f"{name}: {literal(tags.before_key + key)} {tagged}")
    further = further_of(top, properties)
    if further is not False:
        name = f"{prefix}_more"
        taken = "".join(f" & ~/{grammar.regex_literal(key)}/" for key in properties)
        value = _tagged_value(tags, further, root, name, rules, literal)
        rules.append(f"{name}: {literal(tags.before_key)} {name.upper()}_KEY {value}")
        rules.append(f'{name.upper()}_KEY: /[^<>="\\n ]+/{taken}')
        parts.append(f"{name}*")
    return "\n".join([" ".join(parts) or '""', *rules])


def _tagged_value(
    tags: Tags, schema: Any, root: Mapping[str, Any], name: str, rules: list[str], literal: Literal
) -> str:
    """An expression from behind the name to the line break after the value; what it needs is added to the rules."""
    written = written_as(schema, root)
    line = "\n" * tags.on_lines
    end = f"{line}{tags.end_value}\n"
    as_string, as_json = tags.string_keys or (tags.after_key, tags.after_key)
    if written is Written.JSON:
        return f"{literal(as_json + line)} {_json_value(schema, root)} {literal(end)}"
    held = text_terminal(schema, root)
    is_told = tags.string_keys is not None
    if held and written is Written.TEXT_OR_NULL and not is_told:
        held = f'({held}) | "null"'
    text = f"{literal(as_string + line)} {text_until(end, tags.end_value, held, name, rules, literal)}"
    if written is Written.TEXT_OR_NULL and is_told:
        return f'({text} | {literal(as_json)} "null" {literal(end)})'
    return text


def text_until(end: str, mark: str, held: str, name: str, rules: list[str], literal: Literal) -> str:
    """A rule for a text, as `held` has it if that is not empty, and its end, in which stands the mark that ends it.

    It ends with the first mark, so that what is read is what was held.
    """
    terminal = f"{name.upper()}_TEXT"
    excluded = f"~/(.|\\n)*{grammar.regex_literal(mark)}(.|\\n)*/"
    rules.append(f"{terminal}: (/(.|\\n)*/ & {excluded}){f' & ({held})' if held else ''}")
    ending = literal(end)
    before, special, after = ending.partition("<[")
    if not special:
        rules.append(f"{name}_text[lazy]: {terminal} {ending}")
    elif before:
        rules.append(f"{terminal}_ENDED: {terminal} {before.strip()}")
        rules.append(f"{name}_text: {terminal}_ENDED {special}{after}")
    else:
        rules.append(f"{name}_text: {terminal} {ending}")
    return f"{name}_text"


def _json_value(schema: Any, root: Mapping[str, Any]) -> str:
    if not isinstance(schema, Mapping):
        return grammar.json_rule("{}" if schema is not False else '{"not": {}}')
    definitions = {name: root[name] for name in ("$defs", "definitions") if name in root}
    return grammar.json_rule(json.dumps({**definitions, **schema}))
