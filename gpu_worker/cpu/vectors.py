"""Vectors written by hand, where the compiler would not find them: products of panels, and matrices turned around.

It takes two addresses for one memory unless it can prove that they are not: what is stored through one is then loaded
again through the other in every turn of a loop.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gpu_worker.cpu.layout import PANEL_COLUMNS, PANEL_ROWS, TURNED

_INT16, _INT32, _INT64, _FLOAT = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_VECTOR, _NUM_VECTORS = ir.VectorType(_FLOAT, 8), PANEL_COLUMNS // 8


def _place(builder: Any, base: Any, row_bytes: Any, row: Any, offset: int, kind: Any) -> Any:
    """A pointer to what lies `offset` bytes into a row of the matrix at `base`."""
    address = builder.add(builder.add(base, builder.mul(row_bytes, row)), ir.Constant(_INT64, offset))
    return builder.inttoptr(address, kind.as_pointer())


def _shuffle(builder: Any, a: Any, b: Any, lanes: tuple[int, ...]) -> Any:
    """Lanes of a (0 to 7) and b (8 to 15)."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT32, 8), lanes))


@intrinsic
def add_panel_product(
    typing_context: Any, a: Any, a_bytes: Any, b: Any, b_bytes: Any, depth: Any, c: Any, c_bytes: Any
) -> Any:
    """C [6, 16] += A [6, depth] B [depth, 16] in float32; each has its rows so many bytes apart.

    Twelve sums stay in registers, with two vectors of B and one number of A at a time.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, a_bytes, b, b_bytes, depth, c, c_bytes = arguments

        def c_place(row: int, vector: int) -> Any:
            return _place(builder, c, c_bytes, ir.Constant(_INT64, row), 32 * vector, _VECTOR)

        cells = [(row, vector) for row in range(PANEL_ROWS) for vector in range(_NUM_VECTORS)]
        sums = {cell: cgutils.alloca_once(builder, _VECTOR) for cell in cells}
        for cell in cells:
            builder.store(builder.load(c_place(*cell), align=4), sums[cell])
        with cgutils.for_range(builder, depth) as loop:
            vectors = [
                builder.load(_place(builder, b, b_bytes, loop.index, 32 * vector, _VECTOR), align=4)
                for vector in range(_NUM_VECTORS)
            ]
            column = builder.add(builder.mul(loop.index, ir.Constant(_INT64, 4)), a)
            for row in range(PANEL_ROWS):
                number = _place(builder, column, a_bytes, ir.Constant(_INT64, row), 0, _FLOAT)
                nothing = ir.Constant(_VECTOR, ir.Undefined)
                one = builder.insert_element(nothing, builder.load(number, align=4), ir.Constant(_INT32, 0))
                spread = _shuffle(builder, one, nothing, (0,) * 8)
                for vector in range(_NUM_VECTORS):
                    product = builder.fmul(spread, vectors[vector], flags=("contract",))
                    cell = sums[row, vector]
                    builder.store(builder.fadd(builder.load(cell), product, flags=("contract",)), cell)
        for cell in cells:
            builder.store(builder.load(sums[cell]), c_place(*cell), align=4)
        return context.get_dummy_value()

    return types.none(*(types.int64,) * 7), generate


@intrinsic
def turn_widened(typing_context: Any, source: Any, row_bytes: Any, target: Any, target_bytes: Any) -> Any:
    """bfloat16 [8, 8] -> float32 [8, 8] with rows for columns; each has its rows so many bytes apart."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, row_bytes, target, target_bytes = arguments
        shorts, integers = ir.VectorType(_INT16, TURNED), ir.VectorType(_INT32, TURNED)
        upper = ir.Constant(integers, [16] * TURNED)
        rows = []
        for number in range(TURNED):
            place = _place(builder, source, row_bytes, ir.Constant(_INT64, number), 0, shorts)
            rows.append(builder.load(place, align=2))
        for number, column in enumerate(_turned(builder, rows)):
            place = _place(builder, target, target_bytes, ir.Constant(_INT64, number), 0, _VECTOR)
            wide = builder.shl(builder.zext(column, integers), upper)
            builder.store(builder.bitcast(wide, _VECTOR), place, align=4)
        return context.get_dummy_value()

    return types.none(*(types.int64,) * 4), generate


def _turned(builder: Any, rows: list[Any]) -> list[Any]:
    """Eight vectors as the columns of eight others: three times each is mixed with the one four further on."""
    low, high = (0, 8, 1, 9, 2, 10, 3, 11), (4, 12, 5, 13, 6, 14, 7, 15)
    for _ in range(3):
        rows = [_shuffle(builder, rows[i], rows[i + 4], half) for i in range(4) for half in (low, high)]
    return rows


@intrinsic
def narrow_panel_row(typing_context: Any, source: Any, target: Any) -> Any:
    """PANEL_COLUMNS numbers of float32 as the nearest bfloat16, like `intrinsics.narrow`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, target = arguments
        shorts, integers = ir.VectorType(_INT16, 8), ir.VectorType(_INT32, 8)

        def all_of(value: int) -> Any:
            return ir.Constant(integers, [value] * 8)

        for vector in range(_NUM_VECTORS):
            none = ir.Constant(_INT64, 0)
            values = builder.load(_place(builder, source, none, none, 32 * vector, _VECTOR), align=4)
            bits = builder.bitcast(values, integers)
            is_odd = builder.and_(builder.lshr(bits, all_of(16)), all_of(1))
            rounded = builder.lshr(builder.add(builder.add(bits, all_of(0x7FFF)), is_odd), all_of(16))
            kept = builder.select(builder.fcmp_unordered("uno", values, values), all_of(0x7FC0), rounded)
            place = _place(builder, target, none, none, 16 * vector, shorts)
            builder.store(builder.trunc(kept, shorts), place, align=2)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), generate
