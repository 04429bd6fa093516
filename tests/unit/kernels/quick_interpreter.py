"""Triton's interpreter without what it does again and again to no effect: the same results in half the time.

Measured over a step of a small model: a third of the time went into patching `triton.language` anew for every call of
one jitted function by another, into a table of dtypes that was built for every value, and into the operands of
assertions on overflow, which its options leave off. Of what was left, another third went into shapes: every value had
its own, made of objects for each of its sizes.
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
    _share_shapes()
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
    interpreter._patch_attr = _patch_attr


def _patch_attr(target: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    """What marks a function as built in only asks whether it is called from a kernel, which it is."""
    function = getattr(member, "__wrapped__", member)
    semantic = interpreter.interpreter_semantic

    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = semantic
        return function(*args, **kwargs)

    scope.set_attr(target, name, call)


def _share_shapes() -> None:
    """Values of one shape have one shape: as sizes in their type, and as constants in themselves."""
    core = tl.core
    make_type = core.block_type.__init__
    # Those that are shared live as long as the process, so that none of them is taken for another.
    shared: dict[tuple[int, ...], Any] = {}
    num_elements: dict[int, int] = {}
    of_values: dict[int, tuple[Any, Any]] = {}
    scalar = core.tuple([]), core.constexpr(1)

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        if id(shape) not in num_elements:
            sizes = tuple(size.value if isinstance(size, core.constexpr) else size for size in shape)
            if sizes not in shared or not all(type(size) is int for size in sizes):
                # Checks what the shape may be.
                make_type(self, element_ty, shape)
                if shared.setdefault(sizes, self.shape) is self.shape:
                    num_elements[id(self.shape)] = self.numel
                    of_values[id(self.shape)] = core.tuple(map(core.constexpr, sizes)), core.constexpr(self.numel)
            shape = shared[sizes]
        self.element_ty, self.shape, self.numel = element_ty, shape, num_elements[id(shape)]

    def tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = of_values[id(type.shape)] if type.is_block() else scalar

    broadcast = TritonSemantic.broadcast_impl_value

    def broadcast_unless_alike(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape is rhs.type.shape:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    TritonSemantic.broadcast_impl_value = broadcast_unless_alike
    core.block_type.__init__ = block_type
    # Named only when somebody asks.
    core.block_type.__getattr__ = _named
    core.tensor.__init__ = tensor


def _named(self: Any, attribute: str) -> str:
    if attribute != "name":
        raise AttributeError(attribute)
    self.name = f"<{self.shape}, {self.element_ty}>"
    return self.name


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
