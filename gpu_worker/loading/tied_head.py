"""An output head that a config ties to the table of embeddings, and that the checkpoint has tensors of its own for."""

from __future__ import annotations

import torch

from gpu_worker.loading.tensor_source import TensorInfo, TensorSource
from gpu_worker.quant.api import PLAIN_DTYPES

ROWS_AT_ONCE = 4096


def has_own_head(source: TensorSource, head: str, table: str) -> bool:
    """Whether the head is another matrix than the table, whatever a config says of them.

    Some tools store the head of a tied model as well: plain ones are compared. Packed ones, which only a tool that
    took them for two writes, are not.

    Args:
        head: the head's module; `table`: that of the embeddings.
    """
    heads, tables = ([info for info in source.names() if info.name.startswith(f"{name}.")] for name in (head, table))
    if not heads or not tables:
        return False
    if not (_is_plain(heads, head) and _is_plain(tables, table)) or heads[0].shape != tables[0].shape:
        return True
    num_rows = heads[0].shape[0]
    for start in range(0, num_rows, ROWS_AT_ONCE):
        rows = (slice(start, min(start + ROWS_AT_ONCE, num_rows)),)
        parts = [source.read(f"{name}.weight", rows).float() for name in (head, table)]
        if not torch.equal(*parts):
            return True
    return False


def _is_plain(tensors: list[TensorInfo], module: str) -> bool:
    return [info.name for info in tensors] == [f"{module}.weight"] and tensors[0].dtype in PLAIN_DTYPES
