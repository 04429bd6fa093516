"""4-bit weights of bitsandbytes (NF4 and FP4; QLoRA, https://arxiv.org/abs/2305.14314), read as plain ones.

A weight [N, K] is one row of N * K codes, two in a byte, the first in the high half. Every `blocksize` of them,
wherever rows end, share a scale; a code stands for an entry of a table that lies beside the weight:
W = table[code] * absmax[block]. With double quantization the scales are 8-bit codes of a second table themselves:
absmax[i] = nested_table[code] * nested_absmax[i // nested_blocksize] + offset.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from gpu_worker.loading.tensor_source import CheckpointError, TensorIndex, TensorInfo, TensorSource, resolve_index

_STATE = re.compile(r"(?P<weight>.+)\.quant_state\.bitsandbytes__(?P<kind>nf4|fp4)")
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_ADVICE = "download the checkpoint again, or use the release of the model that is not quantized"


@dataclass(frozen=True, slots=True)
class _Weight:
    """One packed weight, as its `quant_state` describes it."""

    info: TensorInfo
    """Plain: the shape and type that the packed weight stands for."""
    packed: TensorInfo
    block_size: int
    nested_block_size: int | None
    nested_offset: float


class BitsAndBytesSource:
    """`source` with plain weights in place of those that bitsandbytes packed.

    Raises:
        CheckpointError: at construction, for a packed weight whose parts do not fit each other.
    """

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        infos = {info.name: info for info in source.names()}
        self._weights: dict[str, _Weight] = {}
        hidden: set[str] = set()
        for info in infos.values():
            match = _STATE.fullmatch(info.name)
            if match is None:
                continue
            name = match["weight"]
            self._weights[name] = self._read_state(name, info, infos)
            hidden |= {info.name, name, *(f"{name}.{part}" for part in _PARTS)}
        self._plain = [info for info in infos.values() if info.name not in hidden]

    def _read_state(self, name: str, state: TensorInfo, infos: dict[str, TensorInfo]) -> _Weight:
        def fail(problem: str, tensor: str = state.name) -> CheckpointError:
            return CheckpointError(state.file, problem, tensor=tensor, advice=_ADVICE)

        try:
            fields = json.loads(bytes(self._source.read(state.name).tolist()))
            shape = tuple(int(size) for size in fields["shape"])
            block_size, dtype = int(fields["blocksize"]), _DTYPES[fields["dtype"]]
            nested = int(fields["nested_blocksize"]) if "nested_blocksize" in fields else None
            offset = float(fields.get("nested_offset", 0.0))
        except (ValueError, KeyError, TypeError) as error:
            raise fail(f"does not describe a packed weight ({error!r})") from error
        needed = _PARTS if nested is not None else _PARTS[:2]
        for part in ("", *(f".{part}" for part in needed)):
            if name + part not in infos:
                raise fail("is missing", name + part)
        packed, absmax = infos[name], infos[f"{name}.absmax"]
        num_values = math.prod(shape)
        if packed.num_bytes * 2 != num_values + num_values % 2:
            raise fail(f"holds {packed.num_bytes:,} bytes, and {list(shape)} needs half a byte a weight", name)
        if block_size <= 0 or absmax.num_elements != -(-num_values // block_size):
            raise fail(f"has {absmax.num_elements:,} scales for {num_values:,} weights in blocks of {block_size}")
        if (absmax.dtype == torch.uint8) != (nested is not None):
            raise fail(f"is {absmax.dtype}, which its quant_state does not say", absmax.name)
        return _Weight(TensorInfo(name, shape, dtype, packed.file), packed, block_size, nested, offset)

    @property
    def path(self) -> Path:
        return self._source.path

    def names(self) -> Iterable[TensorInfo]:
        return [*self._plain, *(weight.info for weight in self._weights.values())]

    def read(self, name: str, index: TensorIndex | None = None) -> torch.Tensor:
        weight = self._weights.get(name)
        if weight is None:
            return self._source.read(name, index)
        rows, *others = resolve_index(name, weight.info.shape, index)
        row_size = math.prod(weight.info.shape[1:])
        values = self._decode(weight, rows[0] * row_size, rows[1] * row_size)
        decoded = values.view(rows[1] - rows[0], *weight.info.shape[1:])
        return decoded[(slice(None), *(slice(*bound) for bound in others))]

    def _decode(self, weight: _Weight, start: int, stop: int) -> torch.Tensor:
        """Values `start` to `stop` of the flat weight, rounded to its type as bitsandbytes does."""
        if start == stop:
            return torch.empty(0, dtype=weight.info.dtype)
        name, size = weight.info.name, weight.packed.dtype.itemsize
        first = start // 2 // size * size  # bytes; the packed weight may be stored as another type's bits
        entries = slice(first // size, -(-stop // (2 * size)))
        stored = self._source.read(name, (entries,)).contiguous().view(torch.uint8).flatten()
        codes = torch.stack((stored >> 4, stored & 15), -1).flatten()[start - 2 * first : stop - 2 * first]
        table = self._source.read(f"{name}.quant_map").float()
        block = weight.block_size
        begin = start // block
        scales = self._scales(weight, begin, -(-stop // block))
        values = torch.empty(stop - start, dtype=weight.info.dtype)
        # Blocks are counted from the weight's first value: the first of these may be cut.
        lead = min(begin * block + block, stop) - start
        values[:lead] = table[codes[:lead].int()] * scales[0]
        rest = codes[lead:]
        whole = rest.numel() // block * block
        wide = table[rest[:whole].int()].view(-1, block) * scales[1 : 1 + whole // block, None]
        values[lead : lead + whole] = wide.flatten()
        if whole < rest.numel():
            values[lead + whole :] = table[rest[whole:].int()] * scales[-1]
        return values

    def _scales(self, weight: _Weight, start: int, stop: int) -> torch.Tensor:
        """float32 [stop - start]: those of blocks `start` to `stop`."""
        stored = self._source.read(f"{weight.info.name}.absmax", (slice(start, stop),))
        if weight.nested_block_size is None:
            return stored.float()
        table = self._source.read(f"{weight.info.name}.nested_quant_map").float()
        outer = self._source.read(f"{weight.info.name}.nested_absmax").float()
        groups = torch.arange(start, stop) // weight.nested_block_size
        return table[stored.int()] * outer[groups] + weight.nested_offset

    def close(self) -> None:
        self._source.close()
