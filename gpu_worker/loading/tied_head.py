"""An output head that a config ties to the table of embeddings, and that the checkpoint has a tensor of its own for."""

from __future__ import annotations

import torch

from gpu_worker.loading.tensor_source import CheckpointError, TensorSource

ROWS_AT_ONCE = 4096


def check_tied_head(source: TensorSource, head: str, table: str) -> None:
    """Some tools store the head of a tied model as well; one with other values means that the config is wrong.

    Args:
        head: the tensor's name; nothing is read where the checkpoint lacks it.
        table: that of the embeddings.

    Raises:
        CheckpointError: the two differ.
    """
    infos = {info.name: info for info in source.names() if info.name in (head, table)}
    if len(infos) < 2:
        return
    alike = infos[head].shape == infos[table].shape
    num_rows = infos[head].shape[0] if alike else 0
    for start in range(0, num_rows, ROWS_AT_ONCE):
        rows = (slice(start, min(start + ROWS_AT_ONCE, num_rows)),)
        alike = alike and torch.equal(source.read(head, rows).float(), source.read(table, rows).float())
        if not alike:
            break
    if not alike:
        raise CheckpointError(
            infos[head].file,
            f"differs from {table}, and config.json says that both are the same",
            tensor=head,
            advice="set tie_word_embeddings to false in config.json",
        )
