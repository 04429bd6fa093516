"""Gluon kernels' source run on torch tensors: what they compute, without a GPU and without layouts.

Gluon has no interpreter. Here a kernel's Python is called with a language in which tensors are torch's, shared memory
is a tensor, a copy is done when its group is waited for and a layout is nothing. So this says that the arithmetic,
every address and every wait are right; whether values lie in the registers in which a product takes them is what the
compiler checks (`assert_trivial`), and what the tests on a GPU show. A load or store outside a tensor that no mask
hides is an error.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

DTYPES = {name: getattr(torch, name) for name in ("int8", "int16", "int32", "int64", "float16", "bfloat16", "float32")}


class Value:
    """A tensor of the language; a scalar has no dimensions."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Value:
        return Value(self.data.contiguous().view(dtype) if bitcast else self.data.to(dtype))

    def reshape(self, shape: list[int]) -> Value:
        return Value(self.data.reshape(shape))

    def __getitem__(self, index: Any) -> Value:
        return Value(self.data[index])

    def __bool__(self) -> bool:
        return bool(self.data)

    def __neg__(self) -> Value:
        return Value(-self.data)

    def __index__(self) -> int:
        return int(self.data)


def _operator(name: str) -> Callable[[Value, Any], Value]:
    # Integers divide towards zero, as on the device.
    special = {
        "__floordiv__": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
        "__mod__": torch.fmod,
    }

    def apply(self: Value, other: Any) -> Any:
        if isinstance(other, Pointer):
            return other + self
        return Value(special.get(name, getattr(torch.Tensor, name))(self.data, _data(other)))

    return apply


for _name in (
    "add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "mod", "rshift", "lshift", "and", "or", "lt", "le", "ge",
    "gt", "eq",
):  # fmt: skip
    setattr(Value, f"__{_name}__", _operator(f"__{_name}__"))


class Pointer:
    """A tensor's memory from its first element on, and offsets into it."""

    def __init__(self, tensor: torch.Tensor, offsets: torch.Tensor | None = None) -> None:
        size = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
        self.memory = tensor if offsets is not None else tensor.as_strided((size,), (1,))
        self.offsets = torch.tensor(0) if offsets is None else offsets
        self.dtype = SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.offsets + _data(other))

    def places(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(offsets, mask) of one shape; an offset that is masked is zero."""
        mask = torch.tensor(True) if mask is None else _data(mask)
        offsets, mask = torch.broadcast_tensors(self.offsets, mask)
        outside = mask & ((offsets < 0) | (offsets >= self.memory.numel()))
        assert not outside.any(), f"{int(outside.sum())} of {outside.numel()} addresses lie outside a tensor"
        return torch.where(mask, offsets, 0), mask


class Shared:
    """A descriptor of shared memory."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    def index(self, at: Any) -> Shared:
        return Shared(self.data[int(_data(at))])

    def load(self, layout: Any) -> Value:
        return Value(self.data.clone())

    def store(self, value: Value) -> None:
        self.data.copy_(value.data)

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order))


def _data(value: Any) -> Any:
    return value.data if isinstance(value, Value) else value


class _Language:
    """What kernels call `gl`. Unknown names are layouts."""

    def __init__(self) -> None:
        self.constexpr = object
        self.static_range = range
        self.program = (0, 0, 0)
        self.grid: tuple[int, ...] = ()
        # Copies that are under way: (target, what it will hold), not yet in a group and in groups, oldest first.
        self.group: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.groups: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        vars(self).update(DTYPES)

    def __getattr__(self, name: str) -> Any:
        if not name.endswith("Layout"):
            raise AttributeError(name)
        return lambda *_, **__: name

    def program_id(self, axis: int) -> Value:
        return Value(torch.tensor(self.program[axis], dtype=torch.int32))

    def arange(self, start: int, end: int, layout: Any) -> Value:
        return Value(torch.arange(start, end, dtype=torch.int32))

    def full(self, shape: list[int], value: float, dtype: torch.dtype, layout: Any) -> Value:
        return Value(torch.full(shape, value, dtype=dtype))

    def full_like(self, like: Value, value: Any) -> Value:
        return Value(torch.full_like(like.data, value))

    def num_programs(self, axis: int) -> int:
        return self.grid[axis]

    def zeros(self, shape: list[int], dtype: torch.dtype, layout: Any) -> Value:
        return self.full(shape, 0, dtype, layout)

    def join(self, a: Value, b: Value) -> Value:
        return Value(torch.stack((a.data, b.data), dim=-1))

    def split(self, value: Value) -> tuple[Value, Value]:
        return Value(value.data[..., 0]), Value(value.data[..., 1])

    def permute(self, value: Value, order: list[int]) -> Value:
        return Value(value.data.permute(order))

    def convert_layout(self, value: Value, layout: Any, assert_trivial: bool = False) -> Value:
        return value

    def minimum(self, a: Any, b: Any) -> Value:
        return Value(torch.minimum(torch.as_tensor(_data(a)), torch.as_tensor(_data(b))))

    def where(self, condition: Value, a: float, b: float) -> Value:
        return Value(torch.where(condition.data, a, b))

    def sum(self, value: Value, axis: int) -> Value:
        return Value(value.data.sum(dim=axis))

    def load(self, pointer: Pointer, mask: Any = None, other: Any = None, cache_modifier: str = "") -> Value:
        offsets, mask = pointer.places(mask)
        found = pointer.memory[offsets.long()]
        # Where nothing is said of what a masked load gives, it is not to be used.
        hidden = float("nan") if other is None and found.is_floating_point() else other or 0
        return Value(torch.where(mask, found, torch.tensor(hidden, dtype=found.dtype)))

    def store(self, pointer: Pointer, value: Any, mask: Any = None) -> None:
        offsets, mask = pointer.places(mask)
        data = torch.as_tensor(_data(value)).to(pointer.memory.dtype).expand(offsets.shape)
        pointer.memory[offsets[mask].long()] = data[mask]

    def atomic_add(self, pointer: Pointer, value: int, sem: str, scope: str) -> Value:
        before = pointer.memory[pointer.offsets.long()].clone()
        pointer.memory[pointer.offsets.long()] += value
        return Value(before)

    def allocate_shared_memory(self, dtype: torch.dtype, shape: list[int], layout: Any, value: Any = None) -> Shared:
        # What was never written is no number.
        fill = float("nan") if dtype.is_floating_point else -1
        shared = Shared(torch.full(shape, fill, dtype=dtype))
        if value is not None:
            shared.store(value)
        return shared

    def async_copy_global_to_shared(self, shared: Shared, pointer: Pointer, mask: Any = None) -> None:
        offsets, mask = pointer.places(mask)
        shared.data.fill_(-1)
        self.group.append((shared.data, torch.where(mask, pointer.memory[offsets.long()], 0)))

    def commit_group(self) -> None:
        self.groups.append(self.group)
        self.group = []

    def wait_group(self, num_outstanding: int) -> None:
        while len(self.groups) > num_outstanding:
            for target, copied in self.groups.pop(0):
                target.copy_(copied)

    def mma_v2(self, a: Value, b: Value, acc: Value) -> Value:
        return Value(acc.data + a.data.float() @ b.data.float())

    def warpgroup_mma(self, a: Value, b: Shared, acc: Value, is_async: bool) -> Value:
        return Value(acc.data + a.data.float() @ b.data.float())

    def warpgroup_mma_wait(self, num_outstanding: int, deps: tuple[Value, ...]) -> tuple[Value, ...]:
        return deps

    def inline_asm_elementwise(self, asm: str, constraints: str, args: list[Value], **_: Any) -> Value:
        """Of two 16-bit floats in each of some words: add, sub, mul or fma, rounded once."""
        name, _, kind = asm.split(" ")[0].partition(".rn.")
        dtype = torch.bfloat16 if kind == "bf16x2" else torch.float16
        a, b, *c = (value.data.contiguous().view(dtype).double() for value in args)
        found = {"add": a + b, "sub": a - b, "mul": a * b, "fma": a * b + (c[0] if c else 0)}[name]
        return Value(found.to(dtype).view(torch.int32))


class OnTorch:
    """A Gluon kernel, launched as a compiled one is."""

    def __init__(self, kernel: Any) -> None:
        self._language = _Language()
        self._names = kernel.arg_names
        self._run = _plain(kernel, self._language, {})

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            values = dict(zip(self._names, arguments, strict=False))
            values |= {name: value for name, value in options.items() if name in self._names}
            for name, value in values.items():
                if isinstance(value, torch.Tensor):
                    values[name] = Pointer(value)
            self._language.grid = grid
            # The last program of a tile is found by counting: the order of programs is not to matter.
            for self._language.program in itertools.product(*(reversed(range(size)) for size in grid)):
                self._run(**values)

        return launch


def _plain(jitted: Any, language: _Language, known: dict[Any, Any]) -> Any:
    """The Python function of a jitted one, with the language above and with all that it calls made plain as well."""
    if jitted not in known:
        function = jitted.fn
        names: dict[str, Any] = {}
        known[jitted] = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__)
        for name, value in function.__globals__.items():
            names[name] = (
                _plain(value, language, known) if hasattr(value, "fn") and hasattr(value, "arg_names") else value
            )
        names |= {"gl": language, "async_copy": language}
        names |= {name: getattr(language, name) for name in ("mma_v2", "warpgroup_mma", "warpgroup_mma_wait")}
        names |= dict.fromkeys(("barrier", "fence_async_shared"), lambda: None)
        names |= {"grid_control": lambda instruction: None}
    return known[jitted]
