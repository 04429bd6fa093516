"""The one place that says which part of a model a rank holds, and how tensor-parallel parts are put together.

Layers ask for their share and call the gather and reduce seams; with one rank all of them do nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Collectives(Protocol):
    """What the ranks of one stage do together. Every rank calls the same in the same order."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's `x`, bit for bit the same on all; `x` is overwritten."""
        ...

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's `x` ([..., n]) side by side in rank order: [..., size * n]."""
        ...

    def deal_rows(self, x: torch.Tensor, rows_each: int) -> torch.Tensor:
        """Of `x` ([num_rows, n]) every rank's part of this rank's rows, those from its number * rows_each on, side by
        side in rank order: [rows_each or fewer, size * n]. The last ranks may have fewer rows than others, or none."""
        ...

    def all_reduce_add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float
    ) -> torch.Tensor | None:
        """residual += the sum of every rank's `x`; its RMSNorm in x's memory. None: nothing is done, do it apart."""
        ...


class EarlySums(Protocol):
    """Sums of many rows that are under way while other things are computed. Every rank begins and ends the same sums in
    the same order."""

    def pieces(self, num_rows: int, row_bytes: int) -> tuple[slice, ...]:
        """Pieces of rows in which such a sum is begun, the first rows first; none: it is not begun early."""
        ...

    def begin(self, x: torch.Tensor, rows: slice) -> None:
        """These rows of this rank's summand `x` [num_rows, n] are computed, on the current stream. Pieces are begun in
        order, and left alone until they are ended."""
        ...

    def under_way(self, x: torch.Tensor) -> tuple[slice, ...]:
        """The pieces of `x` that have been begun and not ended; none: `x` is nothing that is under way."""
        ...

    def end(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's `x`, in place: all of what is under way, or its next piece."""
        ...

    def end_add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float
    ) -> torch.Tensor | None:
        """`end`, then as `Collectives.all_reduce_add_norm`."""
        ...


class ParallelError(ValueError):
    """A model that cannot be split over the asked number of ranks. The message names both numbers."""


@dataclass(frozen=True, slots=True)
class Share:
    """A rank's contiguous part of a dimension: `start <= index < start + size` of `total`."""

    start: int
    size: int
    total: int

    @property
    def stop(self) -> int:
        return self.start + self.size

    def as_slice(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True, slots=True)
class HeadShare:
    """The attention heads of a rank. With more ranks than KV heads, a KV head is held by several ranks."""

    query: Share
    kv: Share


@dataclass(frozen=True, slots=True)
class ExpertShare:
    """What a rank holds of a layer's experts: a part of each, or some of them whole."""

    experts: Share
    intermediate: Share
    adds_bias: bool
    """Whether this rank adds the biases of the down projections that it holds."""


@dataclass(frozen=True, slots=True)
class ParallelContext:
    """This rank's place: its number in its tensor-parallel group, and its group's stage of the pipeline."""

    rank: int = 0
    size: int = 1
    collectives: Collectives | None = None
    splits_experts_whole: bool = False
    """Expert parallel: ranks hold different experts, not parts of all."""
    stage: int = 0
    stage_layers: tuple[int, ...] = ()
    """Layers of each pipeline stage; empty: there is one stage."""
    early: EarlySums | None = None

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage >= len(self.stage_layers) - 1

    def layers(self, num_layers: int) -> range:
        """The numbers of this stage's layers."""
        if not self.stage_layers:
            return range(num_layers)
        start = sum(self.stage_layers[: self.stage])
        return range(start, start + self.stage_layers[self.stage])

    def share(self, total: int, what: str) -> Share:
        """This rank's equal part of `total`.

        Raises:
            ParallelError: `total` does not divide by the number of ranks.
        """
        if total % self.size:
            raise ParallelError(
                f"{what} {total} does not divide by tensor_parallel_size {self.size}: set --tensor-parallel-size to a "
                f"divisor of {total}"
            )
        size = total // self.size
        return Share(start=self.rank * size, size=size, total=total)

    def padded_share(self, total: int) -> Share:
        """This rank's part of `total` rounded up to a multiple of the ranks; the last parts may reach past `total`."""
        size = -(-total // self.size)
        return Share(start=self.rank * size, size=size, total=total)

    def heads(self, num_heads: int, num_kv_heads: int) -> HeadShare:
        """This rank's query heads and the KV heads that they read.

        Raises:
            ParallelError: the heads do not divide, or the KV heads neither divide nor are divided by the ranks.
        """
        query = self.share(num_heads, "num_attention_heads")
        if num_kv_heads % self.size == 0:
            return HeadShare(query, self.share(num_kv_heads, "num_key_value_heads"))
        if self.size % num_kv_heads:
            raise ParallelError(
                f"num_key_value_heads {num_kv_heads} neither divides by nor divides tensor_parallel_size {self.size}: "
                "set another --tensor-parallel-size"
            )
        return HeadShare(query, Share(start=self.rank * num_kv_heads // self.size, size=1, total=num_kv_heads))

    def experts(self, num_experts: int, intermediate_size: int) -> ExpertShare:
        """This rank's part of a layer's experts.

        Raises:
            ParallelError: the experts (expert parallel) or their intermediate size do not divide by the ranks.
        """
        if self.splits_experts_whole:
            whole = Share(0, intermediate_size, intermediate_size)
            return ExpertShare(self.share(num_experts, "num_experts"), whole, adds_bias=True)
        inner = self.share(intermediate_size, "moe_intermediate_size")
        return ExpertShare(Share(0, num_experts, num_experts), inner, adds_bias=self.rank == 0)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's `x`, in place."""
        if self.early is not None and self.early.under_way(x):
            return self.early.end(x)
        return x if self.size == 1 else self._together().all_reduce(x)

    def pieces(self, num_rows: int, row_bytes: int) -> tuple[slice, ...]:
        """As `EarlySums` says, and so `begin_sum` and `under_way`; `all_reduce` and `all_reduce_add_norm` end sums."""
        return () if self.early is None else self.early.pieces(num_rows, row_bytes)

    def begin_sum(self, x: torch.Tensor, rows: slice) -> None:
        if self.early is not None:
            self.early.begin(x, rows)

    def under_way(self, x: torch.Tensor) -> tuple[slice, ...]:
        return () if self.early is None else self.early.under_way(x)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's `x` ([..., n]) side by side in rank order: [..., size * n]."""
        return x if self.size == 1 else self._together().all_gather(x)

    def rows_each(self, num_rows: int) -> int:
        """How many of `num_rows` a rank has where rows are dealt out; row r is of rank r // rows_each."""
        return -(-num_rows // self.size)

    def own_rows(self, num_rows: int) -> slice:
        """This rank's rows where `num_rows` are dealt out; maybe none."""
        first = min(num_rows, self.rank * self.rows_each(num_rows))
        return slice(first, min(num_rows, first + self.rows_each(num_rows)))

    def deal_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's part of `own_rows` of `x` ([num_rows, n]) side by side: [num_own, size * n]."""
        return x if self.size == 1 else self._together().deal_rows(x, self.rows_each(len(x)))

    def all_reduce_add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float
    ) -> torch.Tensor | None:
        """As `Collectives` says, for [num_tokens, hidden] each; None: nothing is done, do it apart."""
        if self.size == 1:
            return None
        if self.early is not None and self.early.under_way(x):
            return self.early.end_add_norm(x, residual, weight, eps, weight_offset)
        return self._together().all_reduce_add_norm(x, residual, weight, eps, weight_offset)

    def _together(self) -> Collectives:
        if self.collectives is None:
            raise RuntimeError(f"rank {self.rank} of {self.size} was built without its peers: it can only be looked at")
        return self.collectives
