"""The attention backend of the compiled kernels: plans what a step's layers share, and attends where the cache lies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from gpu_worker.attention.api import AttentionSpec, StepMetadata
from gpu_worker.attention.torch_backend import TorchAttention
from gpu_worker.cpu.layout import LAYER, PANEL_COLUMNS, PANEL_ROWS, PREFILL_KEYS, PREFILL_QUERIES, SPAN_KEYS, STEP
from gpu_worker.cpu.team import Team
from gpu_worker.layers.ops import AttentionHeads
from gpu_worker.layers.rope import RotaryTables

IntArray = npt.NDArray[np.int64]

# What stands for no window: more than any sequence has.
_ALL_TOKENS = 1 << 40


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer's fixed numbers, as in `layout.LAYER`."""

    heads: AttentionHeads
    memory: IntArray
    address: int


@dataclass(frozen=True, slots=True)
class _WindowStep:
    """What the layers of one window share in a step."""

    address: int
    num_parts: int
    num_prefill_tokens: int
    held: tuple[IntArray, ...]


class CpuAttention(TorchAttention):
    """`TorchAttention` for those who call `run`; `attend` does the same in the team's kernels.

    Raises from `attend` nothing of its own: `covers` says beforehand for which models it may be called.
    """

    def __init__(self, spec: AttentionSpec, kv_caches: list[torch.Tensor], dtype: torch.dtype, team: Team) -> None:
        super().__init__(spec, kv_caches, dtype)
        self._team = team
        self._caches = kv_caches
        # By the identity of a layer's heads: layers may share a cache.
        self._layers: dict[int, _Layer] = {}
        self._step: StepMetadata | None = None
        self._is_planned_for_run = False
        self._steps: dict[int | None, _WindowStep] = {}
        self._partial = torch.empty(0, dtype=torch.float32)
        self._queries = torch.empty(0, dtype=torch.float32)
        self._span_keys = -(-SPAN_KEYS // self._block_size) * self._block_size
        group, size = self._group_size, self._head_dim
        decode = 2 * group * size + self._block_size * size + group * self._span_keys
        rows = -(-PREFILL_QUERIES * group // PANEL_ROWS) * PANEL_ROWS
        padded = -(-size // PANEL_COLUMNS) * PANEL_COLUMNS
        prefill = rows * (size + PREFILL_KEYS + padded + 2) + PREFILL_KEYS * (size + padded)
        team.reserve(4 * max(decode, prefill))

    def plan(self, step: StepMetadata) -> None:
        self._step, self._is_planned_for_run = step, False
        self._steps = {}

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: int,
        *,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not self._is_planned_for_run and self._step is not None:
            super().plan(self._step)
            self._is_planned_for_run = True
        return super().run(q, k, v, layer, sinks=sinks)

    def attend(self, qkv: torch.Tensor, heads: AttentionHeads, tables: RotaryTables) -> torch.Tensor:
        """As `LayerOps.attend`: qkv bfloat16 [num_tokens, heads.num_projected * head_dim]."""
        window = self.spec.windows[heads.layer]
        step = self._steps.get(window)
        if step is None:
            step = self._steps[window] = self._plan_step(window)
        layer = self._layers.get(id(heads)) or self._describe(heads, tables)
        out = torch.empty(qkv.shape[0], heads.num_heads * heads.head_dim, dtype=qkv.dtype)
        self._team.kernels.entry_points.attend(
            self._team.address,
            qkv.data_ptr(),
            qkv.stride(0),
            out.data_ptr(),
            layer.address,
            step.address,
            self._partial.data_ptr(),
            self._queries.data_ptr(),
        )
        return out

    def _describe(self, heads: AttentionHeads, tables: RotaryTables) -> _Layer:
        memory = np.zeros(LAYER.SIZE, dtype=np.int64)
        numbers = memory.view(np.float64)
        window = self.spec.windows[heads.layer]
        memory[LAYER.NUM_HEADS], memory[LAYER.NUM_KV_HEADS] = heads.num_heads, heads.num_kv_heads
        memory[LAYER.HEAD_DIM] = heads.head_dim
        norms = ((heads.query_norm, LAYER.QUERY_NORM, LAYER.QUERY_EPS), (heads.key_norm, LAYER.KEY_NORM, LAYER.KEY_EPS))
        for norm, weight, eps in (*norms, (heads.value_norm, LAYER.VALUE_NORM, LAYER.VALUE_EPS)):
            if norm is not None:
                memory[weight], numbers[eps] = norm.weight.data_ptr(), norm.eps
        if heads.query_norm is not None:
            numbers[LAYER.NORM_OFFSET] = heads.query_norm.weight_offset
        if not heads.reads_cached:
            memory[LAYER.FIRST_VALUE] = heads.num_projected - heads.num_kv_heads
        memory[LAYER.NUM_PAIRS], memory[LAYER.INTERLEAVED] = tables.cos.shape[1], tables.interleaved
        memory[LAYER.COS], memory[LAYER.SIN] = tables.cos.data_ptr(), tables.sin.data_ptr()
        numbers[LAYER.SCALE], numbers[LAYER.SOFTCAP] = self.spec.scale, self.spec.softcap or 0.0
        memory[LAYER.WINDOW] = _ALL_TOKENS if window is None else window
        memory[LAYER.SINKS] = 0 if heads.sinks is None else heads.sinks.data_ptr()
        memory[LAYER.NUM_BLOCKS], memory[LAYER.BLOCK_SIZE] = self._num_blocks, self._block_size
        memory[LAYER.CACHE] = self._caches[heads.layer].data_ptr()
        self._layers[id(heads)] = _Layer(heads, memory, memory.ctypes.data)
        return self._layers[id(heads)]

    def _plan_step(self, window: int | None) -> _WindowStep:
        step = self._step
        if step is None:
            raise RuntimeError("attend is called before plan")
        spans, merges, num_parts = _cut_decodes(step, window, self._span_keys)
        tiles = _cut_prefills(step)
        tables = np.ascontiguousarray(step.block_tables)
        positions = np.ascontiguousarray(step.positions)
        slots = self._slots_of(step) if len(tiles) else np.zeros(0, dtype=np.int64)
        memory = np.zeros(STEP.SIZE, dtype=np.int64)
        memory[STEP.TABLES], memory[STEP.TABLE_STRIDE] = tables.ctypes.data, tables.shape[1]
        memory[STEP.POSITIONS], memory[STEP.SLOTS] = positions.ctypes.data, slots.ctypes.data
        memory[STEP.NUM_SPANS], memory[STEP.SPANS] = len(spans), spans.ctypes.data
        memory[STEP.SPAN_KEYS], memory[STEP.MERGES] = self._span_keys, merges.ctypes.data
        memory[STEP.NUM_TILES], memory[STEP.TILES] = len(tiles), tiles.ctypes.data
        num_prefill = len(positions) - step.num_decodes
        memory[STEP.FIRST_PREFILL], memory[STEP.NUM_PREFILL] = step.num_decodes, num_prefill
        self._reserve(num_parts, num_prefill)
        held = (memory, tables, positions, slots, spans, merges, tiles)
        return _WindowStep(memory.ctypes.data, num_parts, num_prefill, held)

    def _reserve(self, num_parts: int, num_prefill: int) -> None:
        num_heads = self.spec.num_heads
        if num_parts * num_heads * (self._head_dim + 2) > self._partial.numel():
            self._partial = torch.empty(num_parts * num_heads * (self._head_dim + 2), dtype=torch.float32)
        if num_prefill * num_heads * self._head_dim > self._queries.numel():
            self._queries = torch.empty(num_prefill * num_heads * self._head_dim, dtype=torch.float32)

    def _slots_of(self, step: StepMetadata) -> IntArray:
        rows = np.repeat(np.arange(len(step.query_lengths)), step.query_lengths)  # [num_tokens]
        blocks = step.block_tables[rows, step.positions // self._block_size]
        return np.ascontiguousarray(blocks * self._block_size + step.positions % self._block_size)


def _cut_decodes(step: StepMetadata, window: int | None, span_keys: int) -> tuple[IntArray, IntArray, int]:
    """Spans [n, 4], merges [1 + 3 * m] as in `layout.STEP`, and how many parts there are."""
    spans: list[tuple[int, int, int, int]] = []
    merges: list[int] = []
    num_parts = 0
    for row, stop in enumerate(step.context_lengths[: step.num_decodes].tolist()):
        start = 0 if window is None else max(0, stop - window)
        if stop - start <= span_keys:
            spans.append((row, start, stop, -1))
            continue
        first_part = num_parts
        for first in range(start, stop, span_keys):
            spans.append((row, first, min(first + span_keys, stop), num_parts))
            num_parts += 1
        merges += [row, first_part, num_parts - first_part]
    return (
        np.array(spans, dtype=np.int64).reshape(-1, 4),
        np.array([len(merges) // 3, *merges], dtype=np.int64),
        num_parts,
    )


def _cut_prefills(step: StepMetadata) -> IntArray:
    """Tiles [n, 4] as in `layout.STEP`."""
    tiles: list[tuple[int, int, int, int]] = []
    first_token = step.num_decodes
    for row in range(step.num_decodes, len(step.query_lengths)):
        num_queries = int(step.query_lengths[row])
        position = int(step.context_lengths[row]) - num_queries
        for first in range(0, num_queries, PREFILL_QUERIES):
            tiles.append((row, first_token + first, min(PREFILL_QUERIES, num_queries - first), position + first))
        first_token += num_queries
    return np.array(tiles, dtype=np.int64).reshape(-1, 4)
