"""Paged attention by the Triton kernels: everything a step needs to know of its runs is built on the device.

One token a run goes to the split-KV decode kernel, several to the prefill kernel; a mixed step launches both on the
same tensors. Which run belongs to which is found by the work lists' kernels, so that a captured graph serves any
content.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from stepwire_kernels.attention_decode import (
    SUPPORTED_HEAD_DIMS,
    WIDE_HEAD_DIM,
    allocate_decode_workspace,
    decode_attention,
    decode_policy,
    default_decode_tuning,
)
from stepwire_kernels.attention_from_qkv import HeadNorms, attention_from_qkv, from_qkv_policy, takes_from_qkv
from stepwire_kernels.attention_latent import unsupported_latent
from stepwire_kernels.attention_prefill import default_prefill_tuning, prefill_attention, prefill_tile_tokens
from stepwire_kernels.decode_list import build_decode_list
from stepwire_kernels.rope_kv import rope_and_write_kv
from stepwire_kernels.step_input import StepInput
from stepwire_kernels.work_list import (
    RECORD_WORDS,
    SharePolicy,
    WorkList,
    allocate_prefill_list,
    build_prefill_list,
)

from gpu_worker.attention.api import AttentionSpec
from gpu_worker.layers.ops import AttentionHeads, StepPositions
from gpu_worker.loading.kv_scales import KVScales

MAX_GROUP_SIZE = 64
# The sums of a larger group of such heads would not fit into registers, nor its queries into a prefill's tile.
MAX_WIDE_GROUP_SIZE = 16


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """A step whose lengths only the device knows; the host knows which kernels it needs."""

    inputs: StepInput
    block_tables: torch.Tensor  # int32 [max_num_seqs, max_blocks_per_row]
    has_decodes: bool
    """Whether runs of one token are possible."""
    has_prefills: bool


@dataclass(frozen=True, slots=True)
class AttentionLimits:
    """The largest step."""

    max_runs: int
    max_tokens: int
    max_padding_tokens: int


def unsupported_attention(spec: AttentionSpec, block_size: int) -> str | None:
    """Why the kernels cannot serve these heads; None: they can."""
    reasons = (_unsupported_kind(kind, block_size) for kind, _ in spec.by_heads())
    return next((reason for reason in reasons if reason is not None), None)


def _unsupported_kind(spec: AttentionSpec, block_size: int) -> str | None:
    if any(window and chunk for window, chunk in zip(spec.windows, spec.chunks, strict=False)):
        return "layers with both a sliding window and chunks"
    if spec.num_chosen is not None:
        return (
            f"an indexer chooses tokens in contexts above {spec.num_chosen}: with --max-model-len {spec.num_chosen} "
            "everything is attended to, and the kernels run"
        )
    if spec.value_dim is not None:
        if spec.softcap is not None or spec.has_sinks or any(spec.windows) or spec.has_chunks:
            return "latent attention with windows, sinks or a soft cap"
        return unsupported_latent(spec.value_dim, spec.head_dim - spec.value_dim, block_size)
    if spec.head_dim not in SUPPORTED_HEAD_DIMS:
        return f"head size {spec.head_dim} is not one of {', '.join(map(str, SUPPORTED_HEAD_DIMS))}"
    most = MAX_WIDE_GROUP_SIZE if spec.head_dim > WIDE_HEAD_DIM else MAX_GROUP_SIZE
    if spec.num_heads % spec.num_kv_heads or spec.num_heads // spec.num_kv_heads > most:
        return f"{spec.num_heads} query heads over {spec.num_kv_heads} KV heads"
    if block_size < 16 or block_size & (block_size - 1):
        return f"block_size {block_size} is not a power of two of at least 16"
    return None


class _Window(NamedTuple):
    """What the kernels are told of a layer; aligned windows are a model's chunks."""

    tokens: int
    aligned: bool


ALL_TOKENS = _Window(0, False)


def _windows(spec: AttentionSpec) -> tuple[_Window, ...]:
    chunks = spec.chunks or (None,) * len(spec.windows)
    return tuple(
        _Window(window or 0, False) if chunk is None else _Window(chunk, True)
        for window, chunk in zip(spec.windows, chunks, strict=True)
    )


class PlannedAttention(ABC):
    """What the kernels of every kind of attention share: the step's work lists, built on the device, and scratch.

    A subclass computes with them; `tile_tokens` is what its prefill kernel takes at once, `value_dim` the size of one
    head's result.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        kv_caches: list[torch.Tensor],
        limits: AttentionLimits,
        *,
        tile_tokens: int,
        value_dim: int,
        pdl: bool,
        kv_scales: Sequence[KVScales] | None,
        deterministic: bool = False,
    ) -> None:
        """`kv_scales`: one entry a layer, of a float8 cache; None: values are cached as they are.

        `deterministic`: the prefill kernel serves runs of one token too. Its sums for a query follow the query's
        position alone, and the decode kernel's are others.
        """
        self._deterministic = deterministic
        self.spec = spec
        # A cache of 16 bits holds every value unscaled.
        is_scaled = kv_scales is not None and kv_caches[0].dtype == torch.float8_e4m3fn
        self._kv_scales = list(kv_scales) if is_scaled and kv_scales else [KVScales()] * len(kv_caches)
        self._pdl = pdl
        self._block_size = kv_caches[0].shape[3]
        self._kv_caches = kv_caches
        self._limits = limits
        device = kv_caches[0].device
        self._windows = _windows(spec)
        self._tile_tokens = tile_tokens
        self._num_kv_heads = spec.num_kv_heads
        # Small steps split finer, so that the most records need not be those of the most runs.
        steps = [(num_runs, only) for num_runs in range(1, limits.max_runs + 1) for only in (False, True)]
        most = max(self._num_decode_records(*step) for step in steps)
        most_shares = max(self._policy(*step).num_shares for step in steps)
        self._decode_lists = {
            window: WorkList(
                records=torch.zeros((most, RECORD_WORDS), dtype=torch.int32, device=device),
                num_records=torch.zeros(2, dtype=torch.int32, device=device),
                runs=torch.zeros((limits.max_runs, 4), dtype=torch.int32, device=device),
                shares=torch.zeros(most_shares + 1, dtype=torch.int32, device=device),
            )
            for window in sorted(set(self._windows))
        }
        self._prefill_list = allocate_prefill_list(limits.max_runs, limits.max_tokens, self._tile_tokens, device)
        largest = next(iter(self._decode_lists.values()))
        self._workspace = allocate_decode_workspace(
            largest, spec.num_heads, value_dim, num_padding=limits.max_padding_tokens
        )
        self._step: DeviceStep | None = None
        self._decode_work: dict[_Window, WorkList] = {}
        self._prefill_work: WorkList | None = None

    def kv_caches(self) -> list[torch.Tensor]:
        """Every plane of every layer: [num_blocks, num_kv_heads, block_size, head_dim]."""
        return [plane for cache in self._kv_caches for plane in cache]

    def num_bytes(self) -> int:
        """Memory of the lists and of the scratch, KV cache aside."""
        lists = [*self._decode_lists.values(), self._prefill_list]
        tensors = [tensor for work in lists for tensor in (work.records, work.num_records, work.runs, work.shares)]
        tensors += (self._workspace.partial_out, self._workspace.partial_sums, self._workspace.counters)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def supports(self, spec: AttentionSpec) -> str | None:
        return unsupported_attention(spec, self._block_size)

    def plan(self, step: DeviceStep) -> None:
        """Build the work lists that all layers share. Launches kernels; captured with the rest of a graph."""
        inputs = step.inputs
        self._step = step
        self._decode_work, self._prefill_work = {}, None
        if step.has_decodes and not self._deterministic:
            only_decodes = not step.has_prefills
            policy = self._policy(inputs.max_runs, only_decodes)
            num_records = self._num_decode_records(inputs.max_runs, only_decodes)
            for window, whole in self._decode_lists.items():
                runs = whole.runs[: inputs.max_runs]
                work = WorkList(whole.records[:num_records], whole.num_records, runs, whole.shares, policy)
                build_decode_list(
                    inputs.query_starts,
                    inputs.kv_lens,
                    inputs.run_rows,
                    work,
                    window=window.tokens,
                    aligned=window.aligned,
                    pdl=self._pdl,
                )
                self._decode_work[window] = work
        if step.has_prefills or self._deterministic:
            num_tiles = -(-inputs.max_tokens // self._tile_tokens) + inputs.max_runs
            whole = self._prefill_list
            runs = whole.runs[: inputs.max_runs]
            work = WorkList(whole.records[:num_tiles], whole.num_records, runs, whole.shares)
            build_prefill_list(
                inputs.query_starts,
                inputs.kv_lens,
                inputs.run_rows,
                work,
                tile_tokens=self._tile_tokens,
                min_queries=1 if self._deterministic else 2,
                pdl=self._pdl,
            )
            self._prefill_work = work

    @abstractmethod
    def _policy(self, num_runs: int, only_decodes: bool) -> SharePolicy:
        """How the context of a step's decodes is dealt out to programs."""

    def _num_decode_records(self, num_runs: int, only_decodes: bool) -> int:
        """Room for any content of a step of `num_runs` runs."""
        return self._policy(num_runs, only_decodes).most_records(num_runs) + self._limits.max_padding_tokens

    def _planned(self) -> DeviceStep:
        if self._step is None:
            raise RuntimeError("plan() comes before the layers")
        return self._step


class TritonAttention(PlannedAttention):
    """Attention over `kv_caches`, one a layer: [2, num_blocks, num_kv_heads, block_size, head_dim], keys and values."""

    def __init__(
        self,
        spec: AttentionSpec,
        kv_caches: list[torch.Tensor],
        limits: AttentionLimits,
        *,
        pdl: bool,
        kv_scales: Sequence[KVScales] | None = None,
        deterministic: bool = False,
    ) -> None:
        self._keys = [cache[0] for cache in kv_caches]
        self._values = [cache[1] for cache in kv_caches]
        self._prefill_tuning = default_prefill_tuning(spec.head_dim, kv_caches[0].dtype, kv_caches[0].device)
        super().__init__(
            spec,
            kv_caches,
            limits,
            tile_tokens=prefill_tile_tokens(spec.num_heads, spec.num_kv_heads, self._prefill_tuning),
            value_dim=spec.head_dim,
            pdl=pdl,
            kv_scales=kv_scales,
            deterministic=deterministic,
        )

    def attend(self, qkv: torch.Tensor, heads: AttentionHeads, positions: StepPositions) -> torch.Tensor:
        """`LayerOps.attend`, by one kernel or two."""
        if self._takes_from_qkv(self._planned().inputs.max_runs, self._prefill_work is None):
            return self._from_qkv(qkv, heads, positions)
        q = self.rotate_and_write(qkv, heads, positions)
        return self.run(q, None, None, heads.layer, sinks=heads.sinks)

    def _policy(self, num_runs: int, only_decodes: bool) -> SharePolicy:
        if self._takes_from_qkv(num_runs, only_decodes):
            return from_qkv_policy(num_runs, self.spec.num_heads, self._num_kv_heads, self.spec.head_dim)
        return decode_policy(self._num_kv_heads, default_decode_tuning(self.spec.head_dim, self._keys[0].dtype))

    def _takes_from_qkv(self, num_runs: int, only_decodes: bool) -> bool:
        """Whether one kernel computes such a step. With prefills, rotation is theirs as well, and apart."""
        spec = self.spec
        if spec.shares_kv or spec.remakes_values:
            return False
        return only_decodes and takes_from_qkv(num_runs, spec.num_heads, self._num_kv_heads, spec.head_dim)

    def _from_qkv(self, qkv: torch.Tensor, heads: AttentionHeads, positions: StepPositions) -> torch.Tensor:
        step, layer = self._planned(), heads.layer
        window, scales = self._windows[layer], self._kv_scales[layer]
        query_norm, key_norm, norms = heads.query_norm, heads.key_norm, None
        if query_norm is not None and key_norm is not None:
            norms = HeadNorms(query_norm.weight, key_norm.weight, query_norm.eps, query_norm.weight_offset)
        return attention_from_qkv(
            qkv,
            self._keys[layer],
            self._values[layer],
            step.block_tables,
            positions.positions,
            step.inputs.slots,
            positions.tables.cos,
            positions.tables.sin,
            self._decode_work[window],
            self._workspace,
            self.spec.scale,
            heads.num_heads,
            norms=norms,
            interleaved=positions.tables.interleaved,
            window=window.tokens,
            aligned=window.aligned,
            soft_cap=self.spec.softcap or 0.0,
            sinks=heads.sinks,
            k_scale=scales.key,
            v_scale=scales.value,
            pdl=self._pdl,
        ).flatten(1)

    def rotate_and_write(self, qkv: torch.Tensor, heads: AttentionHeads, positions: StepPositions) -> torch.Tensor:
        """Norms of heads, rotation, and this step's keys and values into the cache.

        qkv [num_tokens, heads.num_projected * head_dim] -> the queries, a view of it,
        [num_tokens, num_heads, head_dim].
        """
        query_norm, key_norm = heads.query_norm, heads.key_norm
        return rope_and_write_kv(
            qkv,
            self._keys[heads.layer],
            self._values[heads.layer],
            positions.positions,
            self._planned().inputs.slots,
            positions.tables.cos,
            positions.tables.sin,
            heads.num_heads,
            q_norm=None if query_norm is None else query_norm.weight,
            k_norm=None if key_norm is None else key_norm.weight,
            norm_eps=1e-6 if query_norm is None else query_norm.eps,
            k_scale=self._kv_scales[heads.layer].key,
            v_scale=self._kv_scales[heads.layer].value,
            norm_offset=0.0 if query_norm is None else query_norm.weight_offset,
            interleaved=positions.tables.interleaved,
            norms_values=heads.value_norm is not None,
            keys_are_values=heads.keys_are_values,
            only_queries=heads.reads_cached,
            pdl=self._pdl,
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
        if k is not None or v is not None:
            raise ValueError("the triton attention backend reads keys and values from the cache: call rotate_and_write")
        step, window, scales = self._planned(), self._windows[layer], self._kv_scales[layer]
        # Padding tokens are written by the decode kernel; without it nobody does.
        allocate = torch.zeros if self._deterministic else torch.empty
        out = allocate(q.shape, dtype=q.dtype, device=q.device)  # [num_tokens, num_heads, head_dim]
        arguments = (q, self._keys[layer], self._values[layer], step.block_tables)
        soft_cap = self.spec.softcap or 0.0
        if self._prefill_work is not None:
            prefill_attention(
                *arguments,
                self._prefill_work,
                self.spec.scale,
                out,
                window=window.tokens,
                aligned=window.aligned,
                soft_cap=soft_cap,
                k_scale=scales.key,
                v_scale=scales.value,
                sinks=sinks,
                tuning=self._prefill_tuning,
                pdl=self._pdl,
            )
        if self._decode_work:
            decode_attention(
                *arguments,
                self._decode_work[window],
                self._workspace,
                self.spec.scale,
                out,
                window=window.tokens,
                aligned=window.aligned,
                soft_cap=soft_cap,
                k_scale=scales.key,
                v_scale=scales.value,
                sinks=sinks,
                pdl=self._pdl,
            )
        return out.flatten(1)
