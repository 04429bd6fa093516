"""The environment that chat templates run in: jinja's sandbox with bounds on time and on the size of every value.

A template comes with a model, from whoever made the model: it may only turn messages into text. Jinja's sandbox takes
away what reaches outside of that; what is added here stops a template that never ends or fills the memory.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Longest text or list a template may build on its way.
MAX_VALUE_SIZE = 16 * 2**20
# Largest width, count or indent that a template may ask for.
MAX_REPEAT = 100_000
MAX_INTEGER_BITS = 4096

_LONG_NUMBER = re.compile(r"\d{6}")
_WIDTH_FROM_ARGUMENT = re.compile(r"%[^%a-zA-Z]*\*|\{[^{}]*[:!][^{}]*\{")


class TemplateLimitError(jinja2.TemplateError):
    """The template ran too long or built too much."""


class TemplateRefusal(jinja2.TemplateError):
    """The template itself refused the conversation: `raise_exception("...")`."""


def _too_large() -> NoReturn:
    raise TemplateLimitError(f"the chat template builds a value of more than {MAX_VALUE_SIZE} characters or items")


def _bounded_join(parts: Iterable[str]) -> str:
    parts = list(parts)
    if sum(map(len, parts)) > MAX_VALUE_SIZE:
        _too_large()
    return "".join(parts)


class _BoundedCodeGenerator(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """`a ~ b` through the environment, which knows the bound."""
        self.write("environment.concat((")
        for part in node.nodes:
            self.write("str(")
            self.visit(part, frame)
            self.write("), ")
        self.write("))")

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        """A loop that lets nothing pass `if` is one statement and no body."""
        if node.test is not None:
            look = nodes.Call(nodes.EnvironmentAttribute("may_go_on"), [], [], None, None)
            node.test = nodes.And(look, node.test)
        super().visit_For(node, frame)

    def blockvisit(self, block: Iterable[nodes.Node], frame: Frame) -> None:
        """A look at the clock before every statement, and in blocks without any: see `time_limit`."""
        self.writeline("environment.may_go_on()")
        for number, node in enumerate(_single_statements(block)):
            if number:
                self.writeline("environment.may_go_on()")
            super().blockvisit((node,), frame)


def _single_statements(block: Iterable[nodes.Node]) -> Iterator[nodes.Node]:
    """Each expression that a template prints as a statement of its own: jinja makes one of all between two tags."""
    for node in block:
        if isinstance(node, nodes.Output):
            for printed in node.nodes:
                yield nodes.Output([printed], lineno=printed.lineno)
        else:
            yield node


class _Deadline(threading.local):
    """When the template that this thread is rendering has to have ended, by the monotonic clock, and after how long."""

    at_s = math.inf
    limit_s = math.inf


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks what an assistant says, for training; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012 - the name and type are jinja's

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplateEnvironment(ImmutableSandboxedEnvironment):
    code_generator_class = _BoundedCodeGenerator
    concat = staticmethod(_bounded_join)
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock], optimized=False
        )
        self.globals.pop("lipsum")
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        for name in ("center", "indent", "wordwrap", "format", "replace", "join", "batch", "slice"):
            self.filters[name] = _bounded_filter(name, self.filters[name])
        self.filters["tojson"] = _tojson
        self._deadline = _Deadline()

    @contextmanager
    def time_limit(self, seconds: float) -> Iterator[None]:
        """Raise `TemplateLimitError` in a template of this thread that is still running after so long.

        A thread cannot be stopped from outside, so a compiled template looks at the clock before each of its
        statements; within one it can do no more than some operations on values of bounded size. (To trace its lines
        instead costs as much as rendering it, and since Python 3.12 every other thread a part of its speed.)
        """
        self._deadline.at_s, self._deadline.limit_s = time.monotonic() + seconds, seconds
        try:
            yield
        finally:
            self._deadline.at_s = math.inf

    def may_go_on(self) -> bool:
        """True; raises `TemplateLimitError` behind the deadline."""
        if time.monotonic() > self._deadline.at_s:
            raise TemplateLimitError(f"the chat template was still running after {self._deadline.limit_s:g} s")
        return True

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _check_binop(operator, left, right)
        return super().call_binop(context, operator, left, right)

    # Jinja's own parameter names: keyword arguments of the template must not clash with them.
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805, RUF100
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            _check_text_operation(__obj.__name__, owner, args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Jinja's stand-in for `"...".format` and `format_map`, which are no bound methods any more."""
        formatted = super().wrap_str_format(value)
        if formatted is None:
            return None
        text: str = value.__self__

        def bounded(*args: Any, **kwargs: Any) -> str:
            _check_format(text, args, kwargs)
            return formatted(*args, **kwargs)

        return bounded


def _raise_exception(message: object) -> NoReturn:
    raise TemplateRefusal(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja's own filter escapes <, > and & for HTML."""
    _check_repeat(indent)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _check_repeat(value: object) -> None:
    if isinstance(value, int) and abs(value) > MAX_REPEAT:
        raise TemplateLimitError(f"the chat template asks for {value} repetitions, more than {MAX_REPEAT}")


def _check_binop(operator: str, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(abs(right), 1) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MAX_INTEGER_BITS:
            raise TemplateLimitError(f"the chat template computes a number of more than {MAX_INTEGER_BITS} bits")
    elif operator == "*":
        for sequence, count in ((left, right), (right, left)):
            if hasattr(sequence, "__len__") and isinstance(count, int) and len(sequence) * count > MAX_VALUE_SIZE:
                _too_large()
    elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
        if len(left) + len(right) > MAX_VALUE_SIZE:
            _too_large()
    elif operator == "%" and isinstance(left, str):
        _check_format(left, right if isinstance(right, tuple) else (right,), {})


def _check_format(text: str, args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
    """A width makes blanks, inside the format string or as an argument; a field may show a long value many times."""
    if _LONG_NUMBER.search(text):
        raise TemplateLimitError("a format string of the chat template has a number of six digits or more")
    if _WIDTH_FROM_ARGUMENT.search(text):
        raise TemplateLimitError("a format string of the chat template takes a width from an argument")
    num_fields = text.count("{") + text.count("%")
    longest = max((len(str(value)) for value in (*args, *kwargs.values())), default=0)
    if len(text) + num_fields * longest > MAX_VALUE_SIZE:
        _too_large()


def _check_text_operation(name: str, text: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Before the operation, as afterwards is too late: its result must stay within the bound."""
    values = (*args, *kwargs.values())
    if name in ("center", "ljust", "rjust", "zfill", "expandtabs", "indent", "wordwrap", "batch", "slice"):
        for value in values:
            _check_repeat(value)
        if text.count("\n") * max((value for value in values if isinstance(value, int)), default=4) > MAX_VALUE_SIZE:
            _too_large()
    elif name == "replace" and len(values) >= 2:
        old, new = str(values[0]), str(values[1])
        num_found = text.count(old)
        if len(text) + num_found * (len(new) - len(old)) > MAX_VALUE_SIZE:
            _too_large()
    elif name == "format":  # the filter; the method of that name is wrapped by jinja, see wrap_str_format
        _check_format(text, args, kwargs)
    elif name == "join" and values and isinstance(values[0], list | tuple):
        _check_join(text, values[0])


def _check_join(separator: str, parts: list[Any] | tuple[Any, ...]) -> None:
    if len(separator) * len(parts) + sum(len(part) for part in parts if isinstance(part, str)) > MAX_VALUE_SIZE:
        _too_large()


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Jinja's filter behind the same checks; keeps the marks by which jinja passes an environment or a context."""
    takes_environment = hasattr(function, "jinja_pass_arg")

    def bounded(*args: Any, **kwargs: Any) -> Any:
        value, *rest = args[1:] if takes_environment else args
        if name == "join":
            value = list(value)
            separator = str(rest[0] if rest else kwargs.get("d", ""))
            _check_join(separator, value)
            args = (*args[:1], value, *rest) if takes_environment else (value, *rest)
        else:
            _check_text_operation(name, str(value) if isinstance(value, str) else "", tuple(rest), kwargs)
        return function(*args, **kwargs)

    for mark in ("jinja_pass_arg", "jinja_async_variant"):
        if hasattr(function, mark):
            setattr(bounded, mark, getattr(function, mark))
    return bounded
