"""Paged attention in plain torch: what runs on a CPU, and the reference for the kernels.

A row's keys and values are gathered from its blocks into one dense tensor, then go through torch's fused
scaled-dot-product attention. Rows that run one token (decodes) are batched: one gather and one attention call for all
rows of similar length. Query heads that share a KV head are treated as its query *positions*, so that keys and values
are never repeated. With a soft-cap or sinks, which the fused kernel lacks, scores are two matrix products in
float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from gpu_worker.attention.api import AttentionSpec, StepMetadata

IntArray = npt.NDArray[np.int64]

# A decode group is split where its longest row has this many times the blocks of its shortest: padding then wastes less
# than half of the gather, and each group costs a few more calls a layer.
MAX_LENGTH_RATIO = 2.0
# ... unless the group's padding is below this many tokens, which is cheaper than the calls.
MAX_PADDING_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class _Reach:
    """How far back the queries of some layers see."""

    window: int | None
    chunk: int | None

    def first_keys(self, positions: IntArray) -> IntArray:
        """The first position that a query at each of these sees."""
        first = np.zeros_like(positions)
        if self.window is not None:
            first = np.maximum(positions - self.window + 1, first)
        if self.chunk is not None:
            first = np.maximum(positions // self.chunk * self.chunk, first)
        return first

    def is_whole(self, num_keys: int) -> bool:
        """Whether everything is seen in a sequence of so many tokens."""
        return all(reach is None or num_keys <= reach for reach in (self.window, self.chunk))


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Rows attended together."""

    rows: torch.Tensor | None  # [num_rows] indices among the step's decodes; None: all of them, in order
    num_rows: int
    gather: torch.Tensor  # [2 * num_rows * num_kv_heads * max_blocks] rows of the cache's (block, head) view
    mask: torch.Tensor | None  # [num_rows, 1, 1, max_blocks * block_size] additive; None: nothing to hide


@dataclass(frozen=True, slots=True)
class _Prefill:
    """One row with several query tokens."""

    first_token: int
    last_token: int
    num_keys: int
    """Those that are attended to, as many as the mask has where there is one."""
    gather: torch.Tensor | None  # [2 * num_kv_heads * num_blocks]; None: all its context is in this step
    cached: torch.Tensor | None  # as `gather`, for layers that are not given this step's keys; None: there are none
    mask: torch.Tensor | None  # [num_queries, num_keys] additive; None: plainly causal


@dataclass(frozen=True, slots=True)
class _ReachPlan:
    decodes: tuple[_DecodeGroup, ...]
    prefills: tuple[_Prefill, ...]


class TorchAttention:
    """Attention over `kv_caches`, one a layer: [2, num_blocks, num_kv_heads, block_size, head_dim], keys and values.

    Latent attention's caches have one plane: a value is the first `value_dim` numbers of its key.
    """

    def __init__(self, spec: AttentionSpec, kv_caches: list[torch.Tensor], dtype: torch.dtype) -> None:
        self.spec = spec
        self._dtype = dtype
        self._num_planes, self._num_blocks, self._num_kv_heads, self._block_size, self._head_dim = kv_caches[0].shape
        self._group_size = spec.num_heads // spec.num_kv_heads
        self._value_dim = spec.value_dim or self._head_dim
        self._device = kv_caches[0].device
        self._cache_dtype = kv_caches[0].dtype
        # Two views of a layer's cache: a row for every token and head (written), a row for every block and head (read).
        self._by_token = [cache.view(-1, self._head_dim) for cache in kv_caches]
        self._by_block = [cache.view(-1, self._block_size * self._head_dim) for cache in kv_caches]
        self._head_ids = np.arange(self._num_kv_heads)
        self._slots = torch.empty(0, dtype=torch.int64)
        chunks = spec.chunks or (None,) * len(spec.windows)
        self._reaches = [_Reach(window, chunk) for window, chunk in zip(spec.windows, chunks, strict=True)]
        self._plans: dict[_Reach, _ReachPlan] = {}

    def supports(self, spec: AttentionSpec) -> str | None:
        if spec.num_heads % spec.num_kv_heads:
            return f"{spec.num_heads} query heads do not divide by {spec.num_kv_heads} KV heads"
        return None

    def plan(self, step: StepMetadata) -> None:
        self._num_decodes = step.num_decodes
        self._slots = self._to_device(self._write_slots(step))
        self._plans = {reach: self._plan_reach(step, reach) for reach in set(self._reaches)}

    def _to_device(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)

    def _write_slots(self, step: StepMetadata) -> IntArray:
        """Rows of the by-token view that the step's keys, then its values go to: [2 * num_tokens * num_kv_heads]."""
        row_of_token = np.repeat(np.arange(len(step.query_lengths)), step.query_lengths)  # [num_tokens]
        blocks = step.block_tables[row_of_token, step.positions // self._block_size]  # [num_tokens]
        rows = (blocks * self._num_kv_heads)[:, None] + self._head_ids  # [num_tokens, num_kv_heads]
        slots = rows * self._block_size + (step.positions % self._block_size)[:, None]
        plane = self._num_blocks * self._num_kv_heads * self._block_size
        return np.concatenate([slots + number * plane for number in range(self._num_planes)]).ravel()

    def _gather_rows(self, blocks: IntArray) -> IntArray:
        """Rows of the by-block view: blocks [..., num_blocks] -> flat [num_planes, ..., num_kv_heads, num_blocks]."""
        rows = blocks[..., None, :] * self._num_kv_heads + self._head_ids[:, None]
        plane = self._num_blocks * self._num_kv_heads
        return np.stack([rows + number * plane for number in range(self._num_planes)]).ravel()

    def _plan_reach(self, step: StepMetadata, reach: _Reach) -> _ReachPlan:
        decodes: list[_DecodeGroup] = []
        if step.num_decodes:
            lengths = step.context_lengths[: step.num_decodes]
            first_blocks = reach.first_keys(lengths - 1) // self._block_size
            num_blocks = -(-lengths // self._block_size) - first_blocks
            groups = group_by_length(num_blocks, self._block_size)
            decodes = [
                self._plan_decodes(step, None if len(groups) == 1 else rows, rows, first_blocks, num_blocks, reach)
                for rows in groups
            ]
        prefills: list[_Prefill] = []
        first_token = step.num_decodes
        for row in range(step.num_decodes, len(step.query_lengths)):
            prefills.append(self._plan_prefill(step, row, first_token, reach))
            first_token += int(step.query_lengths[row])
        return _ReachPlan(tuple(decodes), tuple(prefills))

    def _plan_decodes(
        self,
        step: StepMetadata,
        selected: IntArray | None,
        rows: IntArray,
        first_blocks: IntArray,
        num_blocks: IntArray,
        reach: _Reach,
    ) -> _DecodeGroup:
        max_blocks = int(num_blocks[rows].max())
        first = first_blocks[rows]
        columns = first[:, None] + np.arange(max_blocks)  # [num_rows, max_blocks]
        tables = step.block_tables[rows]
        inside = columns < tables.shape[1]
        blocks = np.take_along_axis(tables, np.where(inside, columns, 0), axis=1)
        lengths = step.context_lengths[rows]
        # Keys beyond a row's own blocks are read from the scratch block, whatever follows in the table.
        blocks[columns >= -(-lengths // self._block_size)[:, None]] = 0
        positions = first[:, None] * self._block_size + np.arange(max_blocks * self._block_size)
        hidden = (positions >= lengths[:, None]) | (positions < reach.first_keys(lengths - 1)[:, None])
        mask = self._additive(hidden)[:, None, None, :] if hidden.any() else None
        return _DecodeGroup(
            rows=None if selected is None else self._to_device(selected),
            num_rows=len(rows),
            gather=self._to_device(self._gather_rows(blocks)),
            mask=mask,
        )

    def _additive(self, hidden: npt.NDArray[np.bool_]) -> torch.Tensor:
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
        return mask.masked_fill_(self._to_device(hidden), float("-inf"))

    def _plan_prefill(self, step: StepMetadata, row: int, first_token: int, reach: _Reach) -> _Prefill:
        num_queries, num_keys = int(step.query_lengths[row]), int(step.context_lengths[row])
        start = num_keys - num_queries
        last_token = first_token + num_queries
        cached = None
        if start == 0 and self.spec.shares_kv:
            own_blocks = step.block_tables[row, : -(-num_keys // self._block_size)]
            cached = self._to_device(self._gather_rows(own_blocks))
        if start == 0 and reach.is_whole(num_keys):
            return _Prefill(first_token, last_token, num_keys, None, cached, None)
        first_block = int(reach.first_keys(np.array([start]))[0]) // self._block_size if start else 0
        first_key = first_block * self._block_size
        blocks = step.block_tables[row, first_block : -(-num_keys // self._block_size)]
        # With a context in this step alone the keys come from the step itself, and there are exactly num_keys of them.
        num_gathered = len(blocks) * self._block_size if start else num_keys
        queries = np.arange(start, num_keys)[:, None]
        keys = first_key + np.arange(num_gathered)
        hidden = (keys > queries) | (keys < reach.first_keys(queries))
        gather = self._to_device(self._gather_rows(blocks)) if start else None
        return _Prefill(
            first_token, last_token, num_gathered, gather, gather if start else cached, self._additive(hidden)
        )

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: int,
        *,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if k is None and not self.spec.shares_kv:
            raise ValueError("the torch attention backend writes the cache itself: it needs k and v")
        if k is not None:
            v = self._write(k, v, layer)
        plan = self._plans[self._reaches[layer]]
        if sinks is not None:
            sinks = sinks.view(self._num_kv_heads, self._group_size, 1)
        if not plan.prefills and len(plan.decodes) == 1:
            return self._decode(q, plan.decodes[0], layer, sinks)
        out = torch.empty(q.shape[0], q.shape[1] * self._value_dim, dtype=q.dtype, device=q.device)
        for group in plan.decodes:
            if group.rows is None:
                out[: group.num_rows] = self._decode(q[: group.num_rows], group, layer, sinks)
            else:
                out.index_copy_(0, group.rows, self._decode(q.index_select(0, group.rows), group, layer, sinks))
        for prefill in plan.prefills:
            self._prefill(q, k, v, prefill, layer, sinks, out)
        return out

    def _write(self, k: torch.Tensor, v: torch.Tensor | None, layer: int) -> torch.Tensor:
        """This step's keys and values into the cache; the values."""
        if (v is None) != (self._num_planes == 1):
            raise ValueError("values are cached beside keys, or are their leading numbers")
        # [num_planes * num_tokens, num_kv_heads, head_dim]
        written = (k if v is None else torch.cat((k, v))).to(self._cache_dtype)
        self._by_token[layer].index_copy_(0, self._slots, written.reshape(-1, self._head_dim))
        return k[..., : self._value_dim] if v is None else v

    def _planes(self, gathered: torch.Tensor, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, `shape` each but for a value's size."""
        planes = gathered.view(self._num_planes, *shape, self._head_dim)
        return planes[0], planes[-1][..., : self._value_dim]

    def _decode(self, q: torch.Tensor, group: _DecodeGroup, layer: int, sinks: torch.Tensor | None) -> torch.Tensor:
        """q [num_rows, num_heads, head_dim] -> [num_rows, num_heads * value_dim]; sinks [kv_heads, group_size, 1]."""
        gathered = self._by_block[layer].index_select(0, group.gather).to(q.dtype)
        keys, values = self._planes(gathered, (group.num_rows, self._num_kv_heads, -1))
        # [num_rows, num_kv_heads, group_size, head_dim]: the heads of a group are positions of one query
        grouped = q.reshape(group.num_rows, self._num_kv_heads, self._group_size, self._head_dim)
        attended = self._attend(grouped, keys, values, group.mask, sinks, is_causal=False)
        return attended.reshape(group.num_rows, -1)

    def _prefill(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        prefill: _Prefill,
        layer: int,
        sinks: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        tokens = slice(prefill.first_token, prefill.last_token)
        num_queries = prefill.last_token - prefill.first_token
        gather = prefill.cached if k is None else prefill.gather
        if gather is not None:
            gathered = self._by_block[layer].index_select(0, gather).to(q.dtype)
            keys, values = self._planes(gathered, (self._num_kv_heads, -1))
            keys, values = keys[:, : prefill.num_keys], values[:, : prefill.num_keys]
        elif k is not None and v is not None:
            keys = k[tokens].transpose(0, 1)  # [num_kv_heads, num_queries, head_dim]
            values = v[tokens].transpose(0, 1)
        # KV heads are the batch, a group's query heads its heads: [num_kv_heads, group_size, num_queries, head_dim].
        by_token = q[tokens].reshape(num_queries, self._num_kv_heads, self._group_size, self._head_dim)
        shape = (self._num_kv_heads, self._group_size, keys.shape[1])
        attended = self._attend(
            by_token.permute(1, 2, 0, 3),
            keys.unsqueeze(1).expand(*shape, self._head_dim),
            values.unsqueeze(1).expand(*shape, self._value_dim),
            prefill.mask,
            None if sinks is None else sinks.unsqueeze(-1),
            is_causal=prefill.mask is None,
        )
        out[tokens] = attended.permute(2, 0, 1, 3).reshape(num_queries, -1)

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        sinks: torch.Tensor | None,
        *,
        is_causal: bool,
    ) -> torch.Tensor:
        """Scores [..., num_queries, num_keys]; sinks broadcast against [..., num_queries, 1]."""
        if self.spec.softcap is None and sinks is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=self.spec.scale)
        scores = torch.matmul(q.float() * self.spec.scale, k.float().transpose(-1, -2))
        if self.spec.softcap is not None:
            scores = torch.tanh(scores / self.spec.softcap) * self.spec.softcap
        if is_causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
            scores.masked_fill_(hidden, float("-inf"))
        elif mask is not None:
            scores += mask
        if sinks is not None:
            scores = torch.cat((scores, sinks.expand(*scores.shape[:-1], 1)), dim=-1)
        weights = scores.softmax(-1)[..., : k.shape[-2]]
        return torch.matmul(weights, v.float()).to(q.dtype)


def group_by_length(num_blocks: IntArray, block_size: int) -> list[IntArray]:
    """Splits rows so that padding each group to its longest member wastes little: index arrays, longest rows last."""
    longest = num_blocks.max()
    if (longest * len(num_blocks) - num_blocks.sum()) * block_size <= MAX_PADDING_TOKENS:
        return [np.arange(len(num_blocks))]
    order = np.argsort(num_blocks, kind="stable")
    ordered = num_blocks[order]
    groups: list[IntArray] = []
    end = len(order)
    while end:
        start = int(np.searchsorted(ordered, ordered[end - 1] / MAX_LENGTH_RATIO))
        padding = ordered[end - 1] * end - ordered[:end].sum()
        if padding * block_size <= MAX_PADDING_TOKENS:
            start = 0
        groups.append(order[start:end])
        end = start
    return groups[::-1]
