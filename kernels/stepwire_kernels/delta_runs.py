"""What the kernels of the gated delta rule share: which tokens are whose, and where a projection has what of a head.

A run is one row's part of a step, as in `work_list.py`: `query_starts` int32 [num_runs + 1], `kv_lens` int32 [num_runs]
(0: padding), `run_rows` int32 [num_runs]. Runs are cut into chunks of C tokens. Chunk c of run r has the place

    query_starts[r] // C + r + c

which no other has: a run that begins at token s and has n tokens takes ceil(n / C) places, and the next one's first is
(s + n) // C + r + 1, not below s // C + r + ceil(n / C). So there are num_tokens // C + num_runs places at most, and
every program finds its run by itself: a grid of places depends on a step's padded shape alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import triton
import triton.language as tl

HEAD_SIZES = (16, 32, 64, 128)
# Tokens that a program of the convolution computes. Of a run's programs the first alone may read what was kept, since
# it overwrites that: more taps than this would reach from the second one's tokens into it.
CONV_TOKENS = 16


class DeltaColumns(Protocol):
    """Columns of the first projection: of key head h, queries from h * key_stride on, keys from key + h * key_stride,
    values of its `group_size` value heads from value + h * value_stride, their gates from gate + h * value_stride. Of
    the second one: beta's numbers from h * strength_stride on, the decays' from decay + h * strength_stride."""

    @property
    def num_key_heads(self) -> int: ...
    @property
    def group_size(self) -> int: ...
    @property
    def key_dim(self) -> int: ...
    @property
    def value_dim(self) -> int: ...
    @property
    def key(self) -> int: ...
    @property
    def value(self) -> int: ...
    @property
    def gate(self) -> int: ...
    @property
    def key_stride(self) -> int: ...
    @property
    def value_stride(self) -> int: ...
    @property
    def decay(self) -> int: ...
    @property
    def strength_stride(self) -> int: ...
    @property
    def num_value_heads(self) -> int: ...
    @property
    def num_channels(self) -> int: ...


@dataclass(frozen=True)
class DeltaRuns:
    """A step's runs on the device, and which kinds of them there may be."""

    query_starts: torch.Tensor  # int32 [num_runs + 1]
    kv_lens: torch.Tensor  # int32 [num_runs]
    run_rows: torch.Tensor  # int32 [num_runs]
    has_single: bool
    """Runs of one token are possible."""
    has_longer: bool
    """So are longer ones; without them run r is token r."""

    @property
    def num_runs(self) -> int:
        return self.kv_lens.numel()

    def num_places(self, num_tokens: int, chunk_tokens: int) -> int:
        """Of chunks, at most."""
        return num_tokens // chunk_tokens + self.num_runs


def unsupported_heads(key_dim: int, value_dim: int) -> str | None:
    """Why the kernels cannot compute heads of these sizes; None: they can."""
    for name, size in (("key", key_dim), ("value", value_dim)):
        if size not in HEAD_SIZES:
            sizes = ", ".join(map(str, HEAD_SIZES))
            return f"a gated delta rule with {name}s of {size} numbers, which is not one of {sizes}"
    return None


def unsupported_width(conv_width: int) -> str | None:
    """Why the kernels cannot compute a convolution of so many taps; None: they can."""
    if 2 <= conv_width <= CONV_TOKENS + 1:
        return None
    return f"a convolution over {conv_width} tokens, which are not 2 to {CONV_TOKENS + 1}"


@triton.jit
def run_of_place(query_starts_ptr, place, num_runs, CHUNK: tl.constexpr, BLOCK_RUNS: tl.constexpr):
    """The run that a place belongs to, and the number of its chunk there, which it need not have."""
    runs = tl.arange(0, BLOCK_RUNS)
    starts = tl.load(query_starts_ptr + runs, mask=runs < num_runs, other=0)
    begun = (runs < num_runs) & (starts // CHUNK + runs <= place)
    run = tl.sum(begun.to(tl.int32), axis=0) - 1
    return run, place - tl.load(query_starts_ptr + run) // CHUNK - run


@triton.jit
def load_unit(ptr, mask, KEY_DIM: tl.constexpr):
    """Rows of queries or keys, float32 [tokens, KEY_DIM], each of length 1; zeros where the mask (of tokens) ends."""
    rows = tl.load(ptr, mask=mask[:, None], other=0.0).to(tl.float32)
    return rows * tl.rsqrt(tl.sum(rows * rows, axis=1) + 1e-6)[:, None]


@triton.jit
def log_decay_of(x, log_rate):
    """-exp(log_rate) * softplus(x), float32."""
    softplus = tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))
    return -tl.exp(log_rate) * softplus
