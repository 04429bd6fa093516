"""What a JSON Schema says of a string, as a terminal of Lark, for strings that stand outside of JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from control_plane.frontend.grammar import GrammarError, quoted, with_plain_digits
from control_plane.frontend.parsers.argument_types import resolved, value_types

# They may say something of a string that no terminal holds.
REFUSED = frozenset({"not", "if", "$dynamicRef"})
_MAX_DEPTH = 16

_DATE = "[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
_OFFSET = "([Zz]|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_TIME = rf"([01][0-9]|2[0-3]):[0-5][0-9]:([0-5][0-9]|60)(\.[0-9]{{1,9}})?{_OFFSET}"
_LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = rf"{_LABEL}(\.{_LABEL})*"
_ATOM = "[A-Za-z0-9!#$%&'*+=?^_`{|}~-]+"
_OCTET = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = rf"{_OCTET}(\.{_OCTET}){{3}}"
_GROUP = "[0-9A-Fa-f]{1,4}"
_DAYS, _SECONDS = "[0-9]{1,9}D", "[0-9]{1,9}S"
_MONTHS, _MINUTES = f"[0-9]{{1,9}}M({_DAYS})?", f"[0-9]{{1,9}}M({_SECONDS})?"
_CLOCK = f"T([0-9]{{1,9}}H({_MINUTES})?|{_MINUTES}|{_SECONDS})"
_CALENDAR = f"([0-9]{{1,9}}Y({_MONTHS})?|{_MONTHS}|{_DAYS})"
# By the RFCs that JSON Schema (draft 2020-12, 7.3) names; an IPv6 address with one run of zeros left out, or none.
_FORMATS: Mapping[str, str] = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}[Tt]{_TIME}",
    "duration": f"P([0-9]{{1,9}}W|{_CALENDAR}({_CLOCK})?|{_CLOCK})",
    "email": rf"{_ATOM}(\.{_ATOM})*@{_HOST}",
    "hostname": _HOST,
    "ipv4": _IPV4,
    "ipv6": "|".join(
        [
            f"({_GROUP}:){{7}}{_GROUP}",
            f"({_GROUP}:){{1,7}}:",
            *(f"({_GROUP}:){{1,{7 - after}}}(:{_GROUP}){{1,{after}}}" for after in range(1, 7)),
            f":(:{_GROUP}){{1,7}}",
            "::",
        ]
    ),
    "uuid": "[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "uri": r"[A-Za-z][A-Za-z0-9+.-]*:([A-Za-z0-9._~:?#@!$&'()*+,;=\/\[\]-]|%[0-9A-Fa-f]{2})+",
}


def text_terminal(schema: Any, root: Mapping[str, Any], depth: int = _MAX_DEPTH) -> str:
    """An expression over the string itself; empty where any will do. Other types that the schema allows are left out.

    Raises:
        GrammarError: it says something that no terminal can hold.
    """
    if not isinstance(schema, Mapping):
        return ""
    refused = sorted(REFUSED & set(schema))
    if refused or not depth:
        raise GrammarError(f"cannot hold a string to {refused[0] if refused else 'a reference to itself'!r}")
    parts = [
        _listed(schema),
        _length(schema),
        _of_pattern(schema["pattern"]) if isinstance(schema.get("pattern"), str) else "",
        _of_format(schema["format"]) if isinstance(schema.get("format"), str) else "",
    ]
    if isinstance(schema.get("$ref"), str):
        parts.append(text_terminal(resolved(schema["$ref"], root), root, depth - 1))
    if isinstance(schema.get("oneOf"), list):
        check_disjoint(schema["oneOf"], root)
    for keyword in ("anyOf", "oneOf"):
        parts.append(_either(schema.get(keyword), root, depth))
    for branch in schema["allOf"] if isinstance(schema.get("allOf"), list) else ():
        parts.append(text_terminal(branch, root, depth - 1))
    return " & ".join(f"({part})" for part in parts if part)


def check_disjoint(branches: Sequence[Any], root: Mapping[str, Any]) -> None:
    """Raise `GrammarError` unless the branches of a `oneOf` are of different types: no two may hold at once."""
    seen: set[str] = set()
    for types in (value_types(branch, root) for branch in branches):
        if seen & types or ({"integer", "number"} <= seen | types):
            raise GrammarError("a 'oneOf' whose branches may both hold cannot be held")
        seen |= types


def _either(branches: Any, root: Mapping[str, Any], depth: int) -> str:
    """Of several branches, those that a string can be of."""
    if not isinstance(branches, list):
        return ""
    texts = [text_terminal(each, root, depth - 1) for each in branches if not _is_null(each)]
    return " | ".join(texts) if all(texts) else ""


def _is_null(schema: Any) -> bool:
    return isinstance(schema, Mapping) and schema.get("type") == "null"


def _listed(schema: Mapping[str, Any]) -> str:
    values = schema.get("enum") if isinstance(schema.get("enum"), list) else None
    if "const" in schema:
        values = [schema["const"]]
    if values is None:
        return ""
    return " | ".join(quoted(value) or "/()/" for value in values if isinstance(value, str))


def _length(schema: Mapping[str, Any]) -> str:
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    return f"/(.|\\n){{{least},{most}}}/" if least or most != "" else ""


def _of_format(name: str) -> str:
    if name not in _FORMATS:
        raise GrammarError(f"format {name!r} is not one that can be held")
    return f"/{_FORMATS[name]}/"


def _of_pattern(pattern: str) -> str:
    """A pattern is looked for anywhere in a string, unless it says where."""
    is_begin = pattern.startswith("^")
    is_end = pattern.endswith("$") and not pattern.endswith("\\$")
    body = pattern[is_begin : len(pattern) - is_end]
    if not body:
        return "/()/" if is_begin and is_end else ""
    has_alternatives = _check_anchors(body)
    if has_alternatives and is_begin != is_end:
        raise GrammarError(f"pattern {pattern[:80]!r} is anchored in some of its alternatives only")
    if has_alternatives and is_begin:
        # `^a|b$` is either end alone.
        raise GrammarError(f"pattern {pattern[:80]!r}: put its alternatives into brackets")
    anything, body = "(.|\\n)*", with_plain_digits(body)
    return f"/{'' if is_begin else anything}({_with_escaped_slashes(body)}){'' if is_end else anything}/"


def _check_anchors(body: str) -> bool:
    """Whether there are alternatives outside of brackets. Raises `GrammarError` for an anchor inside."""
    depth, in_class, is_escaped, found = 0, False, False, False
    previous = ""
    for character in body:
        if is_escaped:
            is_escaped = False
        elif character == "\\":
            is_escaped = True
        elif in_class:
            in_class = character != "]"
        elif character == "[":
            in_class = True
        elif character in "^$" and previous != "[":
            raise GrammarError("a pattern with an anchor in its middle cannot be held")
        else:
            depth += (character == "(") - (character == ")")
            found = found or (character == "|" and not depth)
        previous = character
    return found


def _with_escaped_slashes(regex: str) -> str:
    pieces, is_escaped = [], False
    for character in regex:
        pieces.append("\\/" if character == "/" and not is_escaped else "\\n" if character == "\n" else character)
        is_escaped = character == "\\" and not is_escaped
    return "".join(pieces)
