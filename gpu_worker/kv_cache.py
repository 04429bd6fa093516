"""The paged KV cache: its size computed from a memory budget, its tensors, and the table that says where memory goes.

Layout of a layer: [2, num_blocks, num_kv_heads, block_size, head_dim], keys then values, so that one (block, head) tile
is contiguous; heads may differ from layer to layer. Layers that attend to another's keys and values have none. Latent
attention has one plane, whose vectors are keys and, but for their rotated end, values. Block 0 belongs to the worker:
tables are padded with it and nothing of a sequence is ever stored there. Layers that choose what they attend to keep a
second, smaller key a token in the same blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from gpu_worker.attention.api import KVHeads
from gpu_worker.errors import LoadError
from gpu_worker.kv_places import caching_layers, differing_heads
from gpu_worker.layers.delta_rule import CHUNK_TOKENS
from gpu_worker.model_spec import GatedDeltaSpec, ModelSpec
from gpu_worker.parallel.shares import ParallelContext

FIRST_BLOCK_ID = 1
GIB = 1 << 30


class MemoryBudgetError(LoadError, RuntimeError):
    """The memory does not suffice. The message names the setting to change and the value that would do."""


@dataclass(frozen=True, slots=True)
class KVCacheShape:
    """The KV cache of one rank."""

    num_layers: int
    """Those that cache keys and values."""
    num_kv_heads: int
    block_size: int
    head_dim: int
    dtype: torch.dtype
    num_planes: int = 2
    """Keys and values; 1: the same vectors serve as both."""
    index_layers: tuple[int, ...] = ()
    """Those of its layers that have an indexer, whose keys have `index_dim` numbers."""
    index_dim: int = 0
    elsewhere_dim: int = 0
    """Numbers of a token that a block stands for, and that lie in caches of the rows."""
    other_heads: tuple[KVHeads, ...] = ()
    """One a layer where layers differ; none at all: they are `num_kv_heads` of `head_dim` everywhere."""

    @classmethod
    def of(cls, spec: ModelSpec, parallel: ParallelContext, block_size: int, dtype: torch.dtype) -> KVCacheShape:
        heads = parallel.heads(spec.num_heads, spec.num_kv_heads)
        num_planes = 2 if spec.latent is None else 1
        caching = caching_layers(spec, parallel)
        index_layers = tuple(number for number, layer in enumerate(caching) if spec.layers[layer].has_indexer)
        index_dim = 0 if spec.indexer is None else spec.indexer.key_dim
        sizes = (len(caching), heads.kv.size, block_size, spec.head_dim)
        other_heads = differing_heads(spec, parallel)
        return cls(*sizes, dtype, num_planes, index_layers, index_dim, spec.row_cache_dim, other_heads)

    @property
    def layer_heads(self) -> tuple[KVHeads, ...]:
        """One for each of its layers."""
        return self.other_heads or (KVHeads(self.num_kv_heads, self.head_dim),) * self.num_layers

    @property
    def block_bytes(self) -> int:
        """Keys and values of one block in all layers, indexers' keys, and what lies elsewhere."""
        attended = self.num_planes * sum(heads.num_heads * heads.head_dim for heads in self.layer_heads)
        of_token = attended + len(self.index_layers) * self.index_dim + self.elsewhere_dim
        return of_token * self.block_size * self.dtype.itemsize

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How a device's memory is divided, in bytes, and the number of blocks that follows."""

    device: str
    total_bytes: int | None
    weight_bytes: int
    activation_bytes: int
    kv_bytes: int
    num_blocks: int
    block_size: int
    state_bytes: int = 0
    """What layers keep of every row beside the KV cache."""

    @property
    def num_kv_tokens(self) -> int:
        """Tokens that sequences can hold together."""
        return (self.num_blocks - FIRST_BLOCK_ID) * self.block_size

    def lines(self) -> list[str]:
        """The table that start-up prints."""
        rows = [("weights", self.weight_bytes), ("activations", self.activation_bytes), ("KV cache", self.kv_bytes)]
        if self.state_bytes:
            rows.append(("states of rows", self.state_bytes))
        if self.total_bytes is not None:
            used = sum(size for _, size in rows)
            rows.append(("left free", self.total_bytes - used))
            rows.append((f"memory of {self.device}", self.total_bytes))
        lines = [f"{name:<24}{size / GIB:>9.2f} GiB" for name, size in rows]
        lines.append(
            f"KV cache: {self.num_blocks - FIRST_BLOCK_ID} blocks of {self.block_size} = {self.num_kv_tokens} tokens"
        )
        return lines


def activation_bytes(
    spec: ModelSpec, parallel: ParallelContext, max_num_batched_tokens: int, max_num_seqs: int, dtype: torch.dtype
) -> int:
    """Most that a forward pass and its sampling hold beside weights and KV cache.

    A layer's live tensors at their widest point, the MLP: residual, norm's output, gate-up, activation; attention's
    qkv, rotated copy, output and the gathered keys and values are counted too, since the allocator keeps both sets.
    With experts, a token has inner values and an output for every expert that it goes to.
    Logits are held in the model's dtype and, for sampling, twice in float32.
    """
    qkv = 0
    # A gate comes with its query, and is taken apart from it.
    query_parts = 3 if spec.attention_gate else 1
    for layer in range(spec.num_layers):
        heads = parallel.heads(spec.num_heads, spec.num_kv_heads_of(layer))
        qkv = max(qkv, (query_parts * heads.query.size + 2 * heads.kv.size) * spec.head_dim_of(layer))
    if spec.gated_delta is not None:
        qkv = max(qkv, _delta_numbers(spec.gated_delta, parallel))
    widest = max(layer.intermediate_size or spec.intermediate_size for layer in spec.layers)
    mlp = 3 * widest // parallel.size
    # What all layers get, while it is computed.
    layer_inputs = 0 if spec.layer_inputs is None else 3 * spec.num_layers * spec.layer_inputs.size
    if spec.moe is not None:
        inner = parallel.experts(spec.moe.num_experts, spec.moe.intermediate_size).intermediate.size
        mlp = max(mlp, spec.moe.num_chosen * (inner + spec.hidden_size) + 3 * spec.moe.shared_intermediate_size)
    per_token = (3 * spec.hidden_size + 3 * qkv + mlp + layer_inputs) * dtype.itemsize
    per_row = spec.vocab_size * (dtype.itemsize + 2 * torch.float32.itemsize)
    if spec.gated_delta is not None:
        # A run's last chunk takes as much room as a full one.
        per_row += spec.gated_delta.num_value_heads // parallel.size * CHUNK_TOKENS**2 * torch.float32.itemsize
    return max_num_batched_tokens * per_token + max_num_seqs * per_row


def _delta_numbers(delta: GatedDeltaSpec, parallel: ParallelContext) -> int:
    """A third of the numbers that a token has at once in a layer of the gated delta rule: its projections twice, its
    heads' outputs in float32, and its part of each chunk's triangular system."""
    value_heads = delta.num_value_heads // parallel.size
    projected = 2 * delta.num_inputs // parallel.size
    return -(-(projected + 2 * value_heads * (delta.value_dim + CHUNK_TOKENS)) // 3)


def plan_cpu_memory(
    shape: KVCacheShape,
    *,
    kv_cache_gib: float,
    weight_bytes: int,
    activation_bytes: int,
    max_model_len: int,
    max_num_seqs: int,
    available_bytes: int | None,
    state_row_bytes: int = 0,
    num_state_rows: int = 0,
) -> MemoryPlan:
    """A pool of `kv_cache_gib`, or less where `max_num_seqs` sequences of `max_model_len` cannot fill it.

    `available_bytes` is what the machine can still give, the weights being in memory already (None: not known).
    `state_row_bytes`: what layers keep of each of `num_state_rows` rows.

    Raises:
        MemoryBudgetError: not one sequence of max_model_len fits, or the machine has not got the memory.
    """
    num_blocks = int(kv_cache_gib * GIB) // shape.block_bytes
    num_blocks = min(num_blocks, FIRST_BLOCK_ID + max_num_seqs * shape.blocks_for(max_model_len))
    _check_longest(shape, num_blocks, max_model_len, kv_cache_gib, "cpu_kv_cache_gib")
    kv_bytes, state_bytes = num_blocks * shape.block_bytes, state_row_bytes * num_state_rows
    if available_bytes is not None and kv_bytes + activation_bytes + state_bytes > available_bytes:
        left = available_bytes - activation_bytes
        spare = num_state_rows - max_num_seqs
        where = f"of the {available_bytes / GIB:.2f} GiB that are free"
        _check_states(state_row_bytes, left - kv_bytes, max_num_seqs, spare, where)
        fitting = max(left - state_bytes, 0)
        advice = f"set --cpu-kv-cache-gib {_floor2(fitting / GIB)} or less"
        if state_bytes and fitting < (FIRST_BLOCK_ID + shape.blocks_for(max_model_len)) * shape.block_bytes:
            advice = "set a smaller --max-num-seqs and a smaller --cpu-kv-cache-gib"
        states = f" and {state_bytes / GIB:.2f} GiB of states of rows" if state_bytes else ""
        raise MemoryBudgetError(
            f"cpu_kv_cache_gib {kv_cache_gib:g} and {activation_bytes / GIB:.2f} GiB of activations{states} do not fit "
            f"into the {available_bytes / GIB:.2f} GiB that this machine has free: {advice}"
        )
    return MemoryPlan("cpu", None, weight_bytes, activation_bytes, kv_bytes, num_blocks, shape.block_size, state_bytes)


def plan_cuda_memory(
    shape: KVCacheShape,
    *,
    total_bytes: int,
    utilization: float,
    weight_bytes: int,
    activation_bytes: int,
    max_model_len: int,
    max_num_seqs: int,
    device: str,
    state_row_bytes: int = 0,
    num_state_rows: int = 0,
) -> MemoryPlan:
    """What `utilization` of the device leaves beside weights, activations and states of rows, all of it computed.

    `state_row_bytes`: what layers keep of each of `num_state_rows` rows.

    Raises:
        MemoryBudgetError: weights and activations alone exceed the budget, or not one sequence of max_model_len fits.
    """
    budget = int(total_bytes * utilization)
    left = budget - weight_bytes - activation_bytes
    if left <= 0:
        needed = (weight_bytes + activation_bytes) / total_bytes
        advice = (
            f"set --gpu-memory-utilization above {needed:.2f}"
            if needed < 1
            else "use a larger device, more ranks (--tensor-parallel-size) or a smaller --max-num-batched-tokens"
        )
        raise MemoryBudgetError(
            f"weights {weight_bytes / GIB:.2f} GiB and activations {activation_bytes / GIB:.2f} GiB exceed "
            f"gpu_memory_utilization {utilization:g} of {total_bytes / GIB:.2f} GiB: {advice}"
        )
    for_longest = (FIRST_BLOCK_ID + shape.blocks_for(max_model_len)) * shape.block_bytes
    _check_states(
        state_row_bytes,
        left - for_longest,
        max_num_seqs,
        num_state_rows - max_num_seqs,
        f"beside weights, activations and the KV cache of one sequence in gpu_memory_utilization {utilization:g} of "
        f"{total_bytes / GIB:.2f} GiB",
    )
    state_bytes = state_row_bytes * num_state_rows
    left -= state_bytes
    num_blocks = min(left // shape.block_bytes, FIRST_BLOCK_ID + max_num_seqs * shape.blocks_for(max_model_len))
    _check_longest(shape, num_blocks, max_model_len, utilization, "gpu_memory_utilization", total_bytes)
    kv_bytes = num_blocks * shape.block_bytes
    return MemoryPlan(
        device, total_bytes, weight_bytes, activation_bytes, kv_bytes, num_blocks, shape.block_size, state_bytes
    )


def _check_states(row_bytes: int, left: int, max_num_seqs: int, num_spare: int, of_what: str) -> None:
    """Raises `MemoryBudgetError` where fewer rows would do. `num_spare`: rows that no sequence has."""
    needed = row_bytes * (max_num_seqs + num_spare)
    if needed <= left or not row_bytes:
        return
    fitting = left // row_bytes - num_spare
    if fitting > 0:
        raise MemoryBudgetError(
            f"states of {max_num_seqs} rows take {needed / GIB:.2f} GiB, and {left / GIB:.2f} GiB are left "
            f"{of_what}: set --max-num-seqs {fitting} or less"
        )


def longest_sequence(shape: KVCacheShape, budget_bytes: int) -> int:
    """Tokens of the longest sequence that a pool of this size can hold alone; 0 or less: none."""
    return (budget_bytes // shape.block_bytes - FIRST_BLOCK_ID) * shape.block_size


def _check_longest(
    shape: KVCacheShape, num_blocks: int, max_model_len: int, value: float, setting: str, total_bytes: int = GIB
) -> None:
    """A pool must hold one longest sequence, or a request for it could never be served.

    `setting` counts in units of `total_bytes`.
    """
    needed = FIRST_BLOCK_ID + shape.blocks_for(max_model_len)
    if num_blocks >= needed:
        return
    fitting = max(num_blocks - FIRST_BLOCK_ID, 0) * shape.block_size
    enough = math.ceil((value + (needed - num_blocks) * shape.block_bytes / total_bytes) * 100) / 100
    raise MemoryBudgetError(
        f"{setting} {value:g} leaves room for {fitting} tokens of KV cache, and max_model_len is {max_model_len}: "
        f"set --{setting.replace('_', '-')} {enough:g} or more"
        + (f", or --max-model-len {fitting} or less" if fitting else "")
    )


def _floor2(value: float) -> str:
    return f"{math.floor(value * 100) / 100:g}"


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on the host in pages that exist only once they are touched (`torch.zeros` writes them all)."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    num_bytes = math.prod(size) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(size)


class KVCache:
    """The pool's tensors."""

    def __init__(self, shape: KVCacheShape, num_blocks: int, device: torch.device) -> None:
        self.shape = shape
        self.num_blocks = num_blocks
        # Zeros, not empty: a masked key or value still meets the arithmetic, and 0 * NaN would not be 0.
        self.layers = [
            _zeros(
                (shape.num_planes, num_blocks, heads.num_heads, shape.block_size, heads.head_dim), shape.dtype, device
            )
            for heads in shape.layer_heads
        ]
        index_size = (num_blocks, shape.block_size, shape.index_dim)
        self.index_keys = {layer: _zeros(index_size, shape.dtype, device) for layer in shape.index_layers}

    def scrub(self, block_ids: list[int]) -> None:
        """Replace what is not finite in these blocks by 0: the next sequences to get them must not be poisoned."""
        if not block_ids:
            return
        blocks = torch.tensor(block_ids, device=self.layers[0].device)
        planes = [plane for layer in self.layers for plane in layer]
        for plane in (*planes, *self.index_keys.values()):
            plane[blocks] = torch.nan_to_num(plane[blocks], nan=0.0, posinf=0.0, neginf=0.0)
