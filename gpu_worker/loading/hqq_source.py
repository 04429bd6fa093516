"""Weights of HQQ (https://github.com/mobiusml/hqq), of which the codes lie in an order of their own, read row by row.

A weight [N, K] is seen as a table: with axis 1 its groups are the rows, [N * K / group_size, group_size], with axis 0
its columns, [group_size, N * K / group_size]. Rows of the table are packed together: the first entry of a word, from
the highest bits on, is of the first n-th of the rows, the second of the next n-th. W = (code - zero) * scale.

Beside `W_q`, `scale` and `zero` lie tensors that say how it was made (`nbits`, `axis`, `shape`, ...).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from gpu_worker.loading.tensor_source import CheckpointError, TensorIndex, TensorInfo, TensorSource, resolve_index

CODES, SCALE, ZERO = "W_q", "scale", "zero"
_NEEDED = ("nbits", "group_size", "axis", "shape")
_SAID = (
    *_NEEDED,
    *("channel_wise", "compute_dtype", "encoded_state_dict", "offload_meta", "optimize", "packing", "quant_scale"),
    *("quant_zero", "round_zero", "stores_quant_config", "unpack_view_dtype", "view_as_float"),
)
# Width of codes -> of the field of a byte that each gets; of 3 bits ten share 32.
_FIELDS = {1: 1, 2: 2, 4: 4, 5: 8, 6: 8, 8: 8}
_ADVICE = "download the checkpoint again, or use the release of the model that is not quantized"


@dataclass(frozen=True, slots=True)
class _Weight:
    name: str
    """Of the module."""
    shape: tuple[int, int]
    bits: int
    group_size: int
    axis: int

    @property
    def per_word(self) -> int:
        return 10 if self.bits == 3 else 8 // _FIELDS[self.bits]

    @property
    def field(self) -> int:
        return 3 if self.bits == 3 else _FIELDS[self.bits]

    @property
    def table(self) -> tuple[int, int]:
        num_groups = self.shape[0] * self.shape[1] // self.group_size
        return (num_groups, self.group_size) if self.axis == 1 else (self.group_size, num_groups)

    @property
    def num_packed(self) -> int:
        """Rows of the packed table."""
        return -(-self.table[0] // self.per_word)


class HqqSource:
    """`source` with codes as uint8 [N, K] and their scales and zeros as [N, K / group_size].

    Weights with axis 0, whose groups run along the outputs, are seen as plain ones.

    Raises:
        CheckpointError: at construction, for a packed weight whose parts do not fit each other.
    """

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self._stored = infos = {info.name: info for info in source.names()}
        self._weights: dict[str, _Weight] = {}
        self._listed: dict[str, TensorInfo] = {}
        hidden: set[str] = set()
        for name, info in infos.items():
            module, _, kind = name.rpartition(".")
            if kind != CODES:
                continue
            weight = self._read_weight(module, infos)
            hidden |= {f"{module}.{one}" for one in (*_SAID, CODES, SCALE, ZERO)}
            if weight.axis == 0:
                self._list(weight, "weight", weight.shape, torch.float32, info)
                continue
            groups = (weight.shape[0], weight.shape[1] // weight.group_size)
            self._list(weight, CODES, weight.shape, torch.uint8, info)
            for part in (SCALE, ZERO):
                self._list(weight, part, groups, infos[f"{module}.{part}"].dtype, infos[f"{module}.{part}"])
        self._plain = [info for info in infos.values() if info.name not in hidden]

    def _list(self, weight: _Weight, part: str, shape: tuple[int, int], dtype: torch.dtype, stored: TensorInfo) -> None:
        name = f"{weight.name}.{part}"
        self._weights[name] = weight
        self._listed[name] = TensorInfo(name, shape, dtype, stored.file)

    def _read_weight(self, module: str, infos: dict[str, TensorInfo]) -> _Weight:
        packed = infos[f"{module}.{CODES}"]

        def fail(problem: str, part: str = CODES) -> CheckpointError:
            return CheckpointError(packed.file, problem, tensor=f"{module}.{part}", advice=_ADVICE)

        for part in (*_NEEDED, SCALE, ZERO):
            if f"{module}.{part}" not in infos:
                raise fail("is missing", part)
        said = {part: self._source.read(f"{module}.{part}").flatten().tolist() for part in _NEEDED}
        if any(len(said[part]) != (2 if part == "shape" else 1) for part in _NEEDED):
            raise fail(f"does not go with {said!r:.200}")
        [bits], [group_size], [axis] = said["nbits"], said["group_size"], said["axis"]
        num_outputs, num_inputs = (int(size) for size in said["shape"])
        if bits not in (*_FIELDS, 3) or axis not in (0, 1):
            raise fail(f"is of {bits} bits along axis {axis}, which is not supported")
        if group_size <= 0 or (num_inputs, num_outputs)[1 - int(axis)] % group_size:
            raise fail(f"has groups of {group_size} that are no whole part of a {[num_outputs, num_inputs]}")
        weight = _Weight(module, (num_outputs, num_inputs), int(bits), int(group_size), int(axis))
        # Codes may be stored as the bits of another type (`view_as_float`).
        num_bytes = weight.num_packed * weight.table[1] * (4 if bits == 3 else 1)
        if bits != 3 and weight.table[0] % weight.per_word:
            raise fail(f"has {weight.table[0]} groups, which do not fill whole words")
        if packed.num_bytes != num_bytes or not packed.shape or packed.shape[0] != weight.num_packed:
            raise fail(f"has the shape {list(packed.shape)}, and {list(weight.shape)} needs {num_bytes:,} bytes")
        num_groups = num_outputs * num_inputs // group_size
        for part in (SCALE, ZERO):
            if infos[f"{module}.{part}"].num_elements != num_groups:
                raise fail(f"has the shape {list(infos[f'{module}.{part}'].shape)} for {num_groups} groups", part)
        return weight

    @property
    def path(self) -> Path:
        return self._source.path

    def names(self) -> Iterable[TensorInfo]:
        return [*self._plain, *self._listed.values()]

    def read(self, name: str, index: TensorIndex | None = None) -> torch.Tensor:
        weight = self._weights.get(name)
        if weight is None:
            return self._source.read(name, index)
        rows, cols = (slice(*bound) for bound in resolve_index(name, self._listed[name].shape, index))
        part = name.rpartition(".")[2]
        if part == CODES:
            return self._codes_of_rows(weight, rows, cols)
        if part == "weight":
            return self._plain_weight(weight)[rows, cols]
        per_row = weight.shape[1] // weight.group_size
        if self._stored[name].shape[:1] == (weight.shape[0] * per_row,):
            stored = self._source.read(name, (slice(rows.start * per_row, rows.stop * per_row),))
        else:
            stored = self._source.read(name).flatten()[rows.start * per_row : rows.stop * per_row]
        return stored.reshape(-1, per_row)[:, cols]

    def _packed(self, weight: _Weight, taken: slice) -> torch.Tensor:
        """Rows of the packed table, as words."""
        stored = self._source.read(f"{weight.name}.{CODES}", (taken,)).contiguous()
        return stored.view(torch.int32 if weight.bits == 3 else torch.uint8)

    def _shifts(self, weight: _Weight, field_number: torch.Tensor) -> torch.Tensor:
        return (weight.per_word - 1 - field_number) * weight.field

    def _codes_of_rows(self, weight: _Weight, rows: slice, cols: slice) -> torch.Tensor:
        """uint8 [rows, cols], for groups along the inputs."""
        size = weight.group_size
        groups = slice(cols.start // size, -(-cols.stop // size))
        per_row, num_packed = weight.shape[1] // size, weight.num_packed
        wanted = torch.arange(rows.start, rows.stop)[:, None] * per_row + torch.arange(groups.start, groups.stop)
        wanted = wanted.flatten()
        if not wanted.numel():
            return torch.empty(rows.stop - rows.start, cols.stop - cols.start, dtype=torch.uint8)
        first, last = int(wanted[0]), int(wanted[-1])
        taken = slice(0, num_packed)
        if first // num_packed == last // num_packed:
            taken = slice(first % num_packed, last % num_packed + 1)
        packed = self._packed(weight, taken)[wanted % num_packed - taken.start]
        shifts = self._shifts(weight, wanted // num_packed).to(packed.dtype)
        codes = ((packed >> shifts[:, None]) & ((1 << weight.field) - 1)).to(torch.uint8)
        codes = codes.view(rows.stop - rows.start, -1)
        return codes[:, cols.start - groups.start * size : cols.stop - groups.start * size]

    def _plain_weight(self, weight: _Weight) -> torch.Tensor:
        """float32 [N, K], for groups along the outputs."""
        packed = self._packed(weight, slice(0, weight.num_packed))
        shifts = self._shifts(weight, torch.arange(weight.per_word)).to(packed.dtype)
        codes = (packed >> shifts[:, None, None]) & ((1 << weight.field) - 1)  # [a word's, packed rows, columns]
        table = codes.flatten(0, 1)[: weight.group_size].float()
        scale, zero = (self._source.read(f"{weight.name}.{part}").float().flatten() for part in (SCALE, ZERO))
        return ((table - zero) * scale).reshape(weight.shape)

    def close(self) -> None:
        self._source.close()
