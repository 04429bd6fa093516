"""What numba's Python lacks: memory by address, bfloat16 as bits, and atomic operations between threads.

An address is an int64; `float32s(address)[i]` is the i-th number there. Nothing is checked: whoever computes an address
answers for it. Importing this module imports numba.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic


def compiled(function: Callable[..., Any]) -> Any:
    """A function that kernels call. Division by zero gives infinity: a check would keep loops from becoming vectors."""
    return njit(nogil=True, error_model="numpy")(function)


def summing(function: Callable[..., Any]) -> Any:
    """`compiled`, and sums are taken in any order, a vector at a time. Infinities and NaN keep their meaning."""
    return njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})(function)


def comparing(function: Callable[..., Any]) -> Any:
    """`compiled`, for finding the largest of numbers that are not NaN; with a NaN among them it is any of them."""
    return njit(nogil=True, error_model="numpy", fastmath={"nnan", "nsz"})(function)


_BYTE, _INT32, _INT64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)


def _pointer_to(element: ir.Type, numba_type: Any) -> Any:
    @intrinsic
    def pointer(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], element.as_pointer())

        return types.CPointer(numba_type)(types.int64), generate

    return pointer


uint16s = _pointer_to(ir.IntType(16), types.uint16)
float32s = _pointer_to(ir.FloatType(), types.float32)
float64s = _pointer_to(ir.DoubleType(), types.float64)
int64s = _pointer_to(_INT64, types.int64)


@intrinsic
def widen(typing_context: Any, bits: Any) -> Any:
    """The float32 of a bfloat16's bits, which are its upper half."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        upper = builder.shl(builder.zext(arguments[0], _INT32), ir.Constant(_INT32, 16))
        return builder.bitcast(upper, ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def _bits_of(typing_context: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _INT32)

    return types.uint32(types.float32), generate


@intrinsic
def float_of_bits(typing_context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@compiled
def narrow(value: float) -> int:
    """The bits of the bfloat16 that is nearest to a float32, ties to even; NaN stays NaN."""
    bits = _bits_of(value)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.uint16(np.uint32(0x7FC0) if value != value else rounded)


@intrinsic
def prefetch(typing_context: Any, address: Any) -> Any:
    """Begin to read a cache line that will be wanted soon. Any address will do."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _BYTE.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _INT32, _INT32, _INT32])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind)
        read, keep, data = (ir.Constant(_INT32, value) for value in (0, 3, 1))
        builder.call(function, [pointer, read, keep, data])
        return context.get_dummy_value()

    return types.none(types.int64), generate


@intrinsic
def load_acquire(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _INT64.as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def store_release(typing_context: Any, address: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _INT64.as_pointer())
        builder.store_atomic(arguments[1], pointer, "release", 8)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), generate


@intrinsic
def add_atomically(typing_context: Any, address: Any, value: Any) -> Any:
    """Returns what was there before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _INT64.as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "acq_rel")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def replace_atomically(typing_context: Any, address: Any, expected: Any, value: Any) -> Any:
    """Put `value` there if `expected` is there; whether it was."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _INT64.as_pointer())
        pair = builder.cmpxchg(pointer, arguments[1], arguments[2], "acq_rel", "acquire")
        return builder.extract_value(pair, 1)

    return types.boolean(types.int64, types.int64, types.int64), generate


@intrinsic
def call_item(typing_context: Any, function: Any, arguments: Any, item: Any, buffer: Any) -> Any:
    """Call the C function void(int64, int64, int64) at an address."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_INT64, _INT64, _INT64])
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), values[1:])
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.int64, types.int64), generate


yield_core = types.ExternalFunction("sched_yield", types.int32())
"""POSIX: let another thread of this core run, if there is one."""


@intrinsic
def pause(typing_context: Any) -> Any:
    """Between two looks at what another thread will write."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if platform.machine() == "x86_64":
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(builder.module.declare_intrinsic("llvm.x86.sse2.pause", (), kind), [])
        return context.get_dummy_value()

    return types.none(), generate
