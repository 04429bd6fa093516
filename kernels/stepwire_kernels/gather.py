"""Rows of a matrix, picked: the last hidden state of every run, and tokens' rows of a part of the embedding.

    out[r, :] = hidden[query_starts[r + 1] - 1, :]

hidden: [num_tokens, H]; query_starts: int32 [num_runs + 1], non-decreasing; out: [num_runs, H]. An empty run (padding)
gets zeros, so that what follows sees finite numbers.

    out[t, :] = table[token_ids[t] - first, :]    where first <= token_ids[t] < first + num_held, else zeros

table: [num_held, H], rows `first` and on of a vocabulary that ranks have split; the sum over ranks is the embedding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream


@triton.jit
def _gather_last_kernel(
    hidden_ptr,
    query_starts_ptr,
    out_ptr,
    num_cols,
    hidden_stride,
    BLOCK_COLS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    run = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask = cols < num_cols
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    start = tl.load(query_starts_ptr + run)
    end = tl.load(query_starts_ptr + run + 1)
    token = tl.maximum(end - 1, 0).to(tl.int64)
    values = tl.load(hidden_ptr + token * hidden_stride + cols, mask=mask & (end > start), other=0.0)
    tl.store(out_ptr + run * num_cols + cols, values, mask=mask)


def gather_last_hidden(
    hidden: torch.Tensor,
    query_starts: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Return [num_runs, H]: row r is the hidden state of run r's last token.

    Raises:
        ValueError: `query_starts` is not int32, or a last dimension is not contiguous.
    """
    if query_starts.dtype != torch.int32 or hidden.stride(1) != 1:
        raise ValueError("gather_last_hidden: query_starts must be int32 and hidden's columns contiguous")
    num_runs = query_starts.numel() - 1
    num_cols = hidden.shape[1]
    if out is None:
        out = torch.empty((num_runs, num_cols), dtype=hidden.dtype, device=hidden.device)  # [num_runs, H]
    if num_runs == 0:
        return out
    block = min(1024, triton.next_power_of_2(num_cols))
    _gather_last_kernel[(triton.cdiv(num_cols, block), num_runs)](
        hidden,
        query_starts,
        out,
        num_cols,
        hidden.stride(0),
        BLOCK_COLS=block,
        USE_PDL=pdl,
        num_warps=max(1, min(4, block // 256)),
        **launch_options(pdl),
    )
    return out


@triton.jit
def _look_up_kernel(
    token_ids_ptr,
    table_ptr,
    out_ptr,
    first,
    num_held,
    num_cols,
    table_stride,
    BLOCK_COLS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask = cols < num_cols
    row = tl.load(token_ids_ptr + token).to(tl.int64) - first
    is_held = (row >= 0) & (row < num_held)
    values = tl.load(table_ptr + row * table_stride + cols, mask=mask & is_held, other=0.0)
    tl.store(out_ptr + token * num_cols + cols, values, mask=mask)


def look_up_part(token_ids: torch.Tensor, table: torch.Tensor, first: int) -> torch.Tensor:
    """token_ids: integers [num_tokens] -> [num_tokens, H]. Never launched before the kernel ahead of it has ended.

    Raises:
        ValueError: rows of the table, or the token ids, are not contiguous.
    """
    if token_ids.ndim != 1 or not token_ids.is_contiguous() or table.stride(1) != 1:
        raise ValueError("look_up_part: token_ids must be one contiguous row and the table's rows contiguous")
    num_tokens, num_cols = len(token_ids), table.shape[1]
    out = torch.empty((num_tokens, num_cols), dtype=table.dtype, device=table.device)  # [num_tokens, H]
    if num_tokens == 0:
        return out
    block = min(1024, triton.next_power_of_2(num_cols))
    _look_up_kernel[(num_tokens, triton.cdiv(num_cols, block))](
        token_ids,
        table,
        out,
        first,
        len(table),
        num_cols,
        table.stride(0),
        BLOCK_COLS=block,
        num_warps=max(1, min(4, block // 256)),
    )
    return out
