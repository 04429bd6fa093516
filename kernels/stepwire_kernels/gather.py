"""The last hidden state of every run, for the language-model head.

    out[r, :] = hidden[query_starts[r + 1] - 1, :]

hidden: [num_tokens, H]; query_starts: int32 [num_runs + 1], non-decreasing; out: [num_runs, H]. An empty run (padding)
gets zeros, so that what follows sees finite numbers.
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
