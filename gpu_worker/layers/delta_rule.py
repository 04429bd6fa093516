"""The gated delta rule in plain torch (Yang, Kautz and Hatamizadeh, "Gated Delta Networks", 2024), and the short
convolution before it.

Of a value head, with S a matrix [key_dim, value_dim], a decay alpha and a strength beta for every token:

    S_t = alpha_t S_{t-1} + k_t d_t^T,    d_t = beta_t (v_t - alpha_t S_{t-1}^T k_t),    o_t = S_t^T q_t

A token at a time it reads and writes the whole state. Of a chunk of tokens, with g_t the product of the decays up to t
and S the state before it, putting one line into the next gives

    d_i = beta_i (v_i - g_i S^T k_i - sum over j < i of (g_i / g_j) (k_i . k_j) d_j)

which is one unit lower triangular system for all d of the chunk; outputs and the next state are sums over them.
Everything is float32, and quotients of decays are exponentials of differences, at most 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from gpu_worker.attention.api import StepMetadata
from gpu_worker.state_pool import LayerStates

CHUNK_TOKENS = 64
# Added to the sum of squares that queries and keys are divided by the root of.
NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class DeltaLayout:
    """Where the projections' columns are, of this rank's heads: for a key head `h`, queries begin at
    `query + h * key_stride`, and so on; a key head's `group_size` value heads are neighbours in values and gates."""

    num_key_heads: int
    group_size: int
    key_dim: int
    value_dim: int
    key: int
    value: int
    gate: int
    key_stride: int
    value_stride: int
    decay: int
    """Columns of the second projection, which has two numbers a value head: beta's from 0 on, the decay's from here."""
    strength_stride: int

    @classmethod
    def of(cls, num_key_heads: int, group_size: int, key_dim: int, value_dim: int, *, is_grouped: bool) -> DeltaLayout:
        keys, values = key_dim, group_size * value_dim
        sizes = (num_key_heads, group_size, key_dim, value_dim)
        if is_grouped:
            width = 2 * (keys + values)
            return cls(*sizes, keys, 2 * keys, 2 * keys + values, width, width, group_size, 2 * group_size)
        all_keys, all_values = num_key_heads * keys, num_key_heads * values
        places = (all_keys, 2 * all_keys, 2 * all_keys + all_values)
        return cls(*sizes, *places, keys, values, num_key_heads * group_size, group_size)

    @property
    def num_value_heads(self) -> int:
        return self.num_key_heads * self.group_size

    @property
    def num_channels(self) -> int:
        """Queries, keys and values."""
        return 2 * self.num_key_heads * self.key_dim + self.num_value_heads * self.value_dim

    def channels(self, mixed: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values of mixed [num_tokens, columns], side by side: [num_tokens, channels]."""
        values = self.group_size * self.value_dim
        if self.key_stride == self.key_dim:
            return mixed[:, : self.num_channels]
        grouped = mixed.unflatten(-1, (self.num_key_heads, self.key_stride))  # [num_tokens, key_heads, width]
        parts = ((0, self.key_dim), (self.key, self.key_dim), (self.value, values))
        return torch.cat([grouped[..., start : start + size].flatten(1) for start, size in parts], dim=-1)

    def gates(self, mixed: torch.Tensor) -> torch.Tensor:
        """[num_tokens, value_heads, value_dim] of the gates."""
        size = (len(mixed), self.num_key_heads, self.group_size * self.value_dim)
        gates = mixed.as_strided(size, (mixed.stride(0), self.value_stride, 1), mixed.storage_offset() + self.gate)
        return gates.unflatten(-1, (self.group_size, self.value_dim)).flatten(1, 2)

    def strengths(self, pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What beta and the decay are made of: [num_tokens, value_heads] each."""
        size, stride = (len(pairs), self.num_key_heads, self.group_size), (pairs.stride(0), self.strength_stride, 1)
        offsets = (0, self.decay)
        beta, decay = (pairs.as_strided(size, stride, pairs.storage_offset() + at).flatten(1) for at in offsets)
        return beta, decay


def _runs(step: StepMetadata) -> Iterator[tuple[slice, int]]:
    """Tokens and row of every run of several tokens."""
    first = step.num_decodes
    for length, row in zip(step.query_lengths[first:].tolist(), _rows(step)[first:], strict=True):
        stop = first + length
        yield slice(first, stop), row
        first = stop


def _rows(step: StepMetadata) -> list[int]:
    if step.rows is None:
        raise RuntimeError("layers that keep states are not told which rows run")
    rows: list[int] = step.rows.tolist()
    return rows


def convolve(x: torch.Tensor, weight: torch.Tensor, states: LayerStates) -> torch.Tensor:
    """SiLU of each channel's sum of weighted inputs, the present token's and those before it; rows' last inputs are
    kept. x [num_tokens, channels], weight [channels, conv_width] -> float32 [num_tokens, channels]."""
    step: StepMetadata = states.step
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)  # [num_tokens, channels]
    taps = weight.float().t().unsqueeze(1)  # [conv_width, 1, channels]

    def run(inputs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """inputs [num_rows, length, channels], the same length for all."""
        seen = torch.cat((states.conv.index_select(0, rows), inputs), dim=1)  # [num_rows, conv_width - 1 + length, C]
        states.conv.index_copy_(0, rows, seen[:, inputs.shape[1] :])
        parts = seen.float().unfold(1, inputs.shape[1], 1)  # [num_rows, conv_width, channels, length]
        return F.silu(torch.einsum("rwcl,woc->rlc", parts, taps))

    rows = torch.tensor(_rows(step), device=x.device)
    count = step.num_decodes
    if count:
        out[:count] = run(x[:count].unsqueeze(1), rows[:count])[:, 0]
    for index, (tokens, _) in enumerate(_runs(step), count):
        out[tokens] = run(x[tokens].unsqueeze(0), rows[index : index + 1])[0]
    return out


def gated_delta_rule(
    qkv: torch.Tensor, beta: torch.Tensor, log_decay: torch.Tensor, layout: DeltaLayout, states: LayerStates
) -> torch.Tensor:
    """The outputs of a step's tokens; rows' matrices move on.

    qkv [num_tokens, channels] after the convolution; beta, log_decay float32 [num_tokens, value_heads]. Returns float32
    [num_tokens, value_heads, value_dim].
    """
    step: StepMetadata = states.step
    sizes = [layout.num_key_heads * layout.key_dim] * 2 + [layout.num_value_heads * layout.value_dim]
    query, key, value = qkv.float().split(sizes, dim=-1)
    query, key = (_unit_heads(x, layout) for x in (query, key))
    query = query * layout.key_dim**-0.5
    value = value.unflatten(-1, (-1, layout.value_dim))  # [num_tokens, value_heads, value_dim]
    out = torch.empty_like(value, memory_format=torch.contiguous_format)
    count = step.num_decodes
    if count:
        rows = torch.tensor(_rows(step)[:count], device=qkv.device)
        out[:count], moved = one_token(
            query[:count], key[:count], value[:count], beta[:count], log_decay[:count], states.matrices[rows]
        )
        states.matrices.index_copy_(0, rows, moved)
    for tokens, row in _runs(step):
        q, k, v, strength, decay = (x[tokens].transpose(0, 1) for x in (query, key, value, beta, log_decay))
        heads, moved = many_tokens(q, k, v, strength, decay, states.matrices[row])
        out[tokens] = heads.transpose(0, 1)
        states.matrices[row] = moved
    return out


def _unit_heads(x: torch.Tensor, layout: DeltaLayout) -> torch.Tensor:
    """x [num_tokens, key_heads * key_dim] -> [num_tokens, value_heads, key_dim], each of length 1."""
    heads = x.unflatten(-1, (-1, layout.key_dim))
    heads = heads * torch.rsqrt(heads.square().sum(-1, keepdim=True) + NORM_EPS)
    return heads.repeat_interleave(layout.group_size, dim=1)


def one_token(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    beta: torch.Tensor,
    log_decay: torch.Tensor,
    matrices: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token of each row: query, key [rows, heads, key_dim], value [rows, heads, value_dim], beta, log_decay
    [rows, heads], matrices [rows, heads, key_dim, value_dim] -> outputs as `value`, and the next matrices."""
    decayed = matrices * log_decay.exp()[..., None, None]
    known = torch.einsum("...kv,...k->...v", decayed, key)
    change = beta.unsqueeze(-1) * (value - known)
    moved = decayed.add_(key.unsqueeze(-1) * change.unsqueeze(-2))
    return torch.einsum("...kv,...k->...v", moved, query), moved


def many_tokens(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    beta: torch.Tensor,
    log_decay: torch.Tensor,
    matrix: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A row's tokens, chunk by chunk: query, key [heads, tokens, key_dim], value [heads, tokens, value_dim], beta,
    log_decay [heads, tokens], matrix [heads, key_dim, value_dim] -> outputs as `value`, and the next matrix."""
    outputs = []
    for start in range(0, query.shape[1], CHUNK_TOKENS):
        chunk = slice(start, start + CHUNK_TOKENS)
        q, k, v, strength = query[:, chunk], key[:, chunk], value[:, chunk], beta[:, chunk].unsqueeze(-1)
        total = log_decay[:, chunk].cumsum(-1)  # [heads, chunk]: log g
        # The quotients' logarithms, above 0 only where nobody asks for them.
        between = (total.unsqueeze(-1) - total.unsqueeze(-2)).clamp_(max=0).exp_().tril_()  # [heads, chunk, chunk]
        grown = total.exp().unsqueeze(-1)  # [heads, chunk, 1]
        system = (strength * between * (k @ k.mT)).tril_(-1)
        change = torch.linalg.solve_triangular(
            system, strength * (v - grown * (k @ matrix)), upper=False, unitriangular=True
        )  # [heads, chunk, value_dim]
        outputs.append(grown * (q @ matrix) + (between * (q @ k.mT)) @ change)
        left = (total[:, -1:] - total).exp().unsqueeze(-1)  # [heads, chunk, 1]
        matrix = grown[:, -1:] * matrix + (k * left).mT @ change
    return torch.cat(outputs, dim=1), matrix
