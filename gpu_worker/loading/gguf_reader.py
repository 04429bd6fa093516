"""Reads a GGUF file as if it were a Hugging Face checkpoint: HF names, HF row order, decoded to float32."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from gpu_worker.loading.gguf_blocks import GgmlType, decode_rows
from gpu_worker.loading.gguf_file import GgufFile, GgufTensor, of_every_layer
from gpu_worker.loading.gguf_latent import KEYS, VALUES, WHOLE, HeadParts
from gpu_worker.loading.gguf_names import (
    GATE_AND_UP,
    GgufArchitecture,
    RowOrder,
    TensorRule,
    architecture_of,
    is_beyond,
    num_layers_of,
    rule_for,
)
from gpu_worker.loading.tensor_source import CheckpointError, TensorIndex, TensorInfo, resolve_index

EXPERT = "{expert}"


@dataclass(frozen=True, slots=True)
class _Stored:
    """One tensor by its Hugging Face name: all of a tensor in the file, or one expert of it."""

    tensor: GgufTensor
    rule: TensorRule
    shape: tuple[int, ...]
    first_row: int = 0


class GgufReader:
    """The weights of one `.gguf` file. Tensors are decoded to float32 when they are read, the asked rows only.

    Raises:
        CheckpointError: at construction, when the file is damaged or of an architecture that is not known.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = GgufFile(path)
        try:
            self.architecture_name, self.architecture = architecture_of(path, self.file.metadata)
            self._parts: dict[str, dict[str, GgufTensor]] = {}
            self._weights = self._map_tensors(self.architecture)
            self._latent = {name: self._joined(name, parts) for name, parts in self._parts.items()}
        except BaseException:
            self.file.close()
            raise

    def _map_tensors(self, architecture: GgufArchitecture) -> dict[str, _Stored]:
        weights: dict[str, _Stored] = {}
        metadata, name = self.file.metadata, self.architecture_name
        num_layers = num_layers_of(name, metadata) if metadata.get(f"{name}.nextn_predict_layers") else None
        for gguf_name, tensor in self.file.tensors.items():
            if is_beyond(gguf_name, num_layers):
                continue
            rule = rule_for(self.path, architecture, gguf_name)
            if rule is None:
                continue
            if EXPERT in rule.hf_name:
                weights |= self._experts(tensor, rule)
                continue
            part = next((part for part in (KEYS, VALUES) if rule.hf_name.endswith(part)), None)
            if part is not None:
                self._parts.setdefault(rule.hf_name.removesuffix(part) + WHOLE, {})[part] = tensor
                continue
            if len(tensor.shape) > 2:
                raise CheckpointError(
                    self.path, f"has the shape {list(tensor.shape)}, not 1 or 2 sizes", tensor=gguf_name
                )
            self._head_rows(tensor, rule)
            shape = (1, *tensor.shape) if rule.lacks_row and len(tensor.shape) == 1 else tensor.shape
            weights[rule.hf_name] = _Stored(tensor, rule, shape)
        return weights

    def _joined(self, name: str, parts: dict[str, GgufTensor]) -> HeadParts:
        if len(parts) == 2 and (joined := HeadParts(parts[KEYS], parts[VALUES])).is_valid:
            return joined
        shapes = ", ".join(f"{tensor.name} {list(tensor.shape)}" for tensor in parts.values())
        raise CheckpointError(self.path, f"has of it only {shapes}, which make no whole", tensor=name)

    def _experts(self, tensor: GgufTensor, rule: TensorRule) -> dict[str, _Stored]:
        """Every expert of one tensor: [experts, rows, columns], biases [experts, rows]."""
        num_experts = self.file.metadata.get(f"{self.architecture_name}.expert_count")
        is_bias = rule.hf_name.endswith(".bias")
        if len(tensor.shape) != (2 if is_bias else 3) or tensor.shape[0] != num_experts:
            raise CheckpointError(
                self.path, f"has the shape {list(tensor.shape)}, not those of {num_experts} experts", tensor=tensor.name
            )
        _, *shape = tensor.shape
        rows_each = 1 if is_bias else shape[0]
        halves = ("gate", "up") if GATE_AND_UP in rule.hf_name else ("",)
        if not is_bias:
            shape[0] //= len(halves)
        return {
            rule.hf_name.replace(EXPERT, str(expert)).replace(GATE_AND_UP, half): _Stored(
                tensor, rule, tuple(shape), expert * rows_each + number * shape[0]
            )
            for expert in range(tensor.shape[0])
            for number, half in enumerate(halves)
        }

    def names(self) -> Iterable[TensorInfo]:
        shapes = {name: stored.shape for name, stored in (self._weights | self._latent).items()}
        return [TensorInfo(name, shape, torch.float32, self.path) for name, shape in shapes.items()]

    def read(self, name: str, index: TensorIndex | None = None) -> torch.Tensor:
        if name in self._latent:
            asked_rows, asked_columns = resolve_index(name, self._latent[name].shape, index)
            return self._latent[name].read(*asked_rows, self._decoded_rows)[:, slice(*asked_columns)]
        stored = self._weights[name]
        tensor, rule = stored.tensor, stored.rule
        bounds = resolve_index(name, stored.shape, index)
        if len(stored.shape) == 1:
            raw = self.file.read_rows(tensor.name, stored.first_row, stored.first_row + 1)
            values = self._decode(tensor, raw)[0]  # [size]
            if rule.row_order is not RowOrder.PLAIN:
                values = _unpair(values[:, None], self._head_rows(tensor, rule))[:, 0]
            values = values[slice(*bounds[0])]
        else:
            rows = self._read_rows_in_hf_order(stored, *bounds[0])  # [num_rows, row_bytes]
            values = self._decode(tensor, rows)[:, slice(*bounds[1])]  # [num_rows, num_columns]
        return values - 1 if rule.plus_one else values

    def stored_type(self, name: str) -> GgmlType:
        """How the file stores a tensor; one that is joined of two, as its first."""
        if name in self._latent:
            return self._latent[name].keys.ggml_type
        return self._weights[name].tensor.ggml_type

    def read_packed(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows of a matrix without decoding, in HF row order: `[num_rows, row_bytes]` uint8.

        For layers that keep weights packed. Row order and packing are independent: a block never spans rows.
        """
        stored = self._weights[name]
        if len(stored.shape) != 2 or stored.rule.plus_one:
            raise ValueError(f"tensor {name!r} with shape {list(stored.shape)} is no matrix that can stay packed")
        return self._read_rows_in_hf_order(stored, start, stored.shape[0] if stop is None else stop)

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> GgufReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _decoded_rows(self, tensor: GgufTensor, start: int, stop: int) -> torch.Tensor:
        return self._decode(tensor, self.file.read_rows(tensor.name, start, stop))

    def _decode(self, tensor: GgufTensor, raw: torch.Tensor) -> torch.Tensor:
        try:
            return decode_rows(raw, tensor.ggml_type)
        except ModuleNotFoundError as error:
            raise CheckpointError(self.path, str(error), tensor=tensor.name) from error

    def _read_rows_in_hf_order(self, stored: _Stored, start: int, stop: int) -> torch.Tensor:
        tensor = stored.tensor
        head_rows = self._head_rows(tensor, stored.rule)
        if head_rows == 0:
            return self.file.read_rows(tensor.name, stored.first_row + start, stored.first_row + stop)
        # rows move within their head only: read the heads that the asked rows touch
        first = start // head_rows * head_rows
        last = -(-stop // head_rows) * head_rows
        rows = _unpair(self.file.read_rows(tensor.name, first, last), head_rows)
        return rows[start - first : stop - first]

    def _head_rows(self, tensor: GgufTensor, rule: TensorRule) -> int:
        """Rows of one head in a tensor whose rope halves are interleaved, 0 for any other."""
        if rule.row_order is RowOrder.PLAIN:
            return 0
        metadata = self.file.metadata
        num_heads = metadata.get(f"{self.architecture_name}.attention.head_count")
        if rule.row_order is RowOrder.ROPE_PAIRS_OF_KV_HEADS:
            num_heads = metadata.get(f"{self.architecture_name}.attention.head_count_kv", num_heads)
        num_heads = of_every_layer(num_heads)
        num_rows = tensor.shape[0]
        if not isinstance(num_heads, int) or num_heads < 1 or num_rows % (2 * num_heads):
            raise CheckpointError(
                self.path,
                f"has {num_rows} rows, which {num_heads} heads (by the metadata) do not divide into pairs",
                tensor=tensor.name,
            )
        return num_rows // num_heads


def _unpair(rows: torch.Tensor, head_rows: int) -> torch.Tensor:
    """Undoes the interleaving of rope's two halves: row 2i + j of a head becomes row j * head_rows / 2 + i."""
    width = rows.shape[-1]
    paired = rows.reshape(-1, head_rows // 2, 2, width)  # [num_heads, head_rows / 2, 2, width]
    return paired.transpose(1, 2).reshape(-1, width)  # [num_rows, width]
