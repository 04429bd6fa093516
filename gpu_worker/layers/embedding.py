"""Token embedding and output head. Both are split over the vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gpu_worker.layers.linear import BuildContext
from gpu_worker.layers.weighted import Weighted
from gpu_worker.quant import none
from gpu_worker.quant.api import ExpectedTensors, RandomValues, StoredTensor


class VocabTable(Weighted):
    """A [vocab_size, hidden] table, this rank's rows of it."""

    def __init__(self, vocab_size: int, hidden_size: int, build: BuildContext, *, num_unused: int = 0) -> None:
        """`num_unused`: rows that the checkpoint has behind these, and are not read."""
        self._parallel, self._ops = build.parallel, build.ops
        self._stored_shape = (vocab_size + num_unused, hidden_size)
        self.vocab_size = vocab_size
        self.share = build.parallel.padded_share(vocab_size)
        # Rows past the vocabulary (padding to equal shares) stay zero.
        self.weight = torch.zeros(self.share.size, hidden_size, dtype=build.dtype, device=build.device)

    def load(self, part: str, tensor: str, source: StoredTensor) -> None:
        start, stop = (min(bound, self.vocab_size) for bound in (self.share.start, self.share.stop))
        self.weight[: stop - start] = source.read((slice(start, stop),))

    def expected(self) -> ExpectedTensors:
        return {("", "weight"): self._stored_shape}

    def fill_random(self, source: RandomValues) -> None:
        source.fill(self.weight, std=self.weight.shape[1] ** -0.5)

    def num_bytes(self) -> int:
        return self.weight.numel() * self.weight.element_size()


class Embedding(VocabTable):
    def lookup(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids [num_tokens] -> [num_tokens, hidden]."""
        if self._parallel.size == 1:
            return F.embedding(token_ids, self.weight)
        return self._parallel.all_reduce(self._ops.look_up_part(token_ids, self.weight, self.share.start))


class OutputHead:
    """Logits from hidden states. Reads a table that it may share with the embedding."""

    def __init__(self, table: VocabTable, build: BuildContext) -> None:
        self.table = table
        self._parallel = build.parallel
        self._ops = build.ops
        self._packed: none.PackedWeight | None = None

    def finish(self) -> None:
        if none.can_pack(self.table.weight, self._ops):
            # A tied table stays for the embedding lookup, so this is a copy; else it replaces the plain one.
            self._packed = none.PackedWeight(self.table.weight)
            if not isinstance(self.table, Embedding):
                self.table.weight = self.table.weight.new_empty(0, self.table.weight.shape[1])

    def logits(self, hidden: torch.Tensor, *, deals: bool = False) -> torch.Tensor:
        """hidden [num_rows, hidden] -> [num_rows, vocab_size] in the model's dtype; rows may be strided.

        `deals`: this rank's rows alone (`ParallelContext.own_rows`).
        """
        if self._packed is not None:
            local = self._packed.multiply(hidden, None)
        else:
            local = self._ops.linear(hidden, self.table.weight, None)
        logits = self._parallel.deal_rows(local) if deals else self._parallel.all_gather(local)
        return logits if logits.shape[-1] == self.table.vocab_size else logits[:, : self.table.vocab_size]

    def num_bytes(self) -> int:
        """What the head holds beside its table."""
        if self._packed is None:
            return 0
        shared = self.table.num_bytes() if self._packed.holds(self.table.weight) else 0
        return self._packed.num_bytes() - shared
