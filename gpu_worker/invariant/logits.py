"""Logits of a fixed number of rows, on a CPU."""

from __future__ import annotations

import torch

from gpu_worker.invariant.row_tiles import choose_tile, in_row_tiles
from gpu_worker.layers.decoder import HiddenStates
from gpu_worker.models.family import ModelFamily


class TiledLogits:
    """`ModelFamily.logits` by tiles of rows."""

    @torch.inference_mode()
    def __init__(self, model: ModelFamily) -> None:
        self._model = model
        hidden_size = model.spec.hidden_size
        self._tile_rows = choose_tile(self._of_pairs, 2 * hidden_size, model.dtype, "logits")
        if model.spec.logit_softcap is not None:
            # tanh over a whole table of logits: see `torch_ops`.
            self._tile_rows = 1

    def __call__(self, hidden: HiddenStates) -> torch.Tensor:
        """[num_rows, vocab_size]"""
        return in_row_tiles(self._of_pairs, torch.cat((hidden.output, hidden.residual), dim=1), self._tile_rows)

    def _of_pairs(self, pairs: torch.Tensor) -> torch.Tensor:
        """Outputs and residuals side by side, [num_rows, 2 * hidden]."""
        output, residual = pairs.chunk(2, dim=1)
        return self._model.logits(HiddenStates(output.contiguous(), residual.clone()))
