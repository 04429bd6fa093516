"""Reads a GGUF file as if it were a Hugging Face checkpoint: HF names, HF row order, decoded to float32."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import torch

from gpu_worker.loading.gguf_blocks import GgmlType, decode_rows
from gpu_worker.loading.gguf_file import GgufFile, GgufTensor
from gpu_worker.loading.gguf_names import GgufArchitecture, RowOrder, TensorRule, architecture_of, rule_for
from gpu_worker.loading.tensor_source import CheckpointError, TensorIndex, TensorInfo, resolve_index


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
            self._weights = self._map_tensors(self.architecture)
        except BaseException:
            self.file.close()
            raise

    def _map_tensors(self, architecture: GgufArchitecture) -> dict[str, tuple[GgufTensor, TensorRule]]:
        weights: dict[str, tuple[GgufTensor, TensorRule]] = {}
        for gguf_name, tensor in self.file.tensors.items():
            rule = rule_for(self.path, architecture, gguf_name)
            if rule is None:
                continue
            if len(tensor.shape) > 2:
                raise CheckpointError(
                    self.path, f"has the shape {list(tensor.shape)}, not 1 or 2 sizes", tensor=gguf_name
                )
            self._head_rows(tensor, rule)
            weights[rule.hf_name] = (tensor, rule)
        return weights

    def names(self) -> Iterable[TensorInfo]:
        return [TensorInfo(name, tensor.shape, torch.float32, self.path) for name, (tensor, _) in self._weights.items()]

    def read(self, name: str, index: TensorIndex | None = None) -> torch.Tensor:
        tensor, rule = self._weights[name]
        bounds = resolve_index(name, tensor.shape, index)
        if len(tensor.shape) == 1 and rule.row_order is RowOrder.PLAIN:
            values = self._decode(tensor, self.file.read_rows(tensor.name))[0]  # [size]
            values = values[slice(*bounds[0])]
        elif len(tensor.shape) == 1:
            values = self._decode(tensor, self.file.read_rows(tensor.name))[0]  # [num_rows]
            values = _unpair(values[:, None], self._head_rows(tensor, rule))[:, 0][slice(*bounds[0])]
        else:
            rows = self._read_rows_in_hf_order(tensor, rule, *bounds[0])  # [num_rows, row_bytes]
            values = self._decode(tensor, rows)[:, slice(*bounds[1])]  # [num_rows, num_columns]
        return values - 1 if rule.plus_one else values

    def stored_type(self, name: str) -> GgmlType:
        """How the file stores a tensor."""
        return self._weights[name][0].ggml_type

    def read_packed(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows of a matrix without decoding, in HF row order: `[num_rows, row_bytes]` uint8.

        For layers that keep weights packed. Row order and packing are independent: a block never spans rows.
        """
        tensor, rule = self._weights[name]
        if len(tensor.shape) != 2 or rule.plus_one:
            raise ValueError(f"tensor {name!r} with shape {list(tensor.shape)} is no matrix that can stay packed")
        return self._read_rows_in_hf_order(tensor, rule, start, tensor.num_rows if stop is None else stop)

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> GgufReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _decode(self, tensor: GgufTensor, raw: torch.Tensor) -> torch.Tensor:
        try:
            return decode_rows(raw, tensor.ggml_type)
        except ModuleNotFoundError as error:
            raise CheckpointError(self.path, str(error), tensor=tensor.name) from error

    def _read_rows_in_hf_order(self, tensor: GgufTensor, rule: TensorRule, start: int, stop: int) -> torch.Tensor:
        head_rows = self._head_rows(tensor, rule)
        if head_rows == 0:
            return self.file.read_rows(tensor.name, start, stop)
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
