"""Twins of the kernels of the gated delta rule in plain torch: a run after the other, a token at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from stepwire_kernels.delta_runs import DeltaColumns, DeltaRuns


def _runs(runs: DeltaRuns) -> Iterator[tuple[range, int, bool]]:
    """Tokens, row and whether the row had tokens before; padding is left out."""
    starts, lens, rows = (x.tolist() for x in (runs.query_starts, runs.kv_lens, runs.run_rows))
    for run, kv_len in enumerate(lens):
        tokens = range(starts[run], starts[run + 1])
        if kv_len:
            yield tokens, rows[run], kv_len > len(tokens)


def channels_of(x: torch.Tensor, columns: DeltaColumns) -> torch.Tensor:
    """Queries, keys and values of a projection side by side, [num_tokens, channels]."""
    values = columns.group_size * columns.value_dim
    places = [
        head * columns.key_stride + place for head in range(columns.num_key_heads) for place in range(columns.key_dim)
    ]
    of_values = [
        head * columns.value_stride + place for head in range(columns.num_key_heads) for place in range(values)
    ]
    order = [*places, *(columns.key + place for place in places), *(columns.value + place for place in of_values)]
    return x[:, order]


def causal_conv(
    x: torch.Tensor, weight: torch.Tensor, state: torch.Tensor, columns: DeltaColumns, runs: DeltaRuns
) -> torch.Tensor:
    """`state` [num_rows, W - 1, channels] is updated in place."""
    channels = channels_of(x, columns)
    out = torch.zeros_like(channels)
    width = weight.shape[1]
    for tokens, row, goes_on in _runs(runs):
        before = state[row] if goes_on else torch.zeros_like(state[row])
        seen = torch.cat((before, channels[tokens.start : tokens.stop]))
        for number, token in enumerate(tokens):
            total = (seen[number : number + width] * weight.T).sum(0)
            out[token] = total * total.sigmoid()
        state[row] = seen[len(tokens) :]
    return out


def gated_delta(
    qkv: torch.Tensor,
    pairs: torch.Tensor,
    log_rate: torch.Tensor,
    bias: torch.Tensor,
    matrices: torch.Tensor,
    columns: DeltaColumns,
    runs: DeltaRuns,
) -> torch.Tensor:
    """`matrices` [num_rows, value_heads, key_dim, value_dim] are updated in place."""
    keys = columns.num_key_heads * columns.key_dim
    query, key = (
        part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        for part in qkv[:, : 2 * keys].unflatten(-1, (2, columns.num_key_heads, columns.key_dim)).unbind(1)
    )
    value = qkv[:, 2 * keys :].unflatten(-1, (columns.num_value_heads, columns.value_dim))
    out = torch.zeros_like(value)
    for tokens, row, goes_on in _runs(runs):
        for head in range(columns.num_value_heads):
            group, member = divmod(head, columns.group_size)
            at = group * columns.strength_stride + member
            matrix = matrices[row, head] if goes_on else torch.zeros_like(matrices[row, head])
            for token in tokens:
                beta, decay = pairs[token, at].sigmoid(), pairs[token, columns.decay + at] + bias[head]
                matrix = matrix * torch.exp(-log_rate[head].exp() * torch.nn.functional.softplus(decay))
                change = beta * (value[token, head] - key[token, group] @ matrix)
                matrix = matrix + torch.outer(key[token, group], change)
                out[token, head] = query[token, group] @ matrix * columns.key_dim**-0.5
            matrices[row, head] = matrix
    return out


def gated_norm(
    x: torch.Tensor, mixed: torch.Tensor, weight: torch.Tensor, eps: float, columns: DeltaColumns
) -> torch.Tensor:
    """x [num_tokens, value_heads, value_dim] -> [num_tokens, value_heads * value_dim]."""
    values = columns.group_size * columns.value_dim
    gates = torch.cat(
        [mixed[:, columns.gate + head * columns.value_stride :][:, :values] for head in range(columns.num_key_heads)],
        dim=1,
    )
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    return normed.flatten(1) * gates * gates.sigmoid()
