"""Plain-torch twin of every kernel: the same function, written for reading.

Those of experts are in `reference_experts.py`, those of a step's input, sampling and result in `reference_steps.py`.

Twins run on any device and in any floating dtype (give float64 inputs for a reference to test against), keep their
inputs' dtype in their outputs, and take the kernels' arguments without buffers and tuning. They are also what the CPU
worker runs on.
"""

from __future__ import annotations

from collections import Counter

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a twin computes in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- norm.py -------------------------------------------------------------------------------------------------------


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    *,
    weight_offset: float = 0.0,
) -> torch.Tensor:
    """Normalised hidden states [num_tokens, hidden]; `residual` is updated in place."""
    compute = compute_dtype(x.dtype)
    if residual is not None:
        residual.copy_(x.to(compute) + residual.to(compute))
        x = residual
    wide = x.to(compute)
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale * (weight.to(compute) + weight_offset)).to(x.dtype)


# --- rope_kv.py ----------------------------------------------------------------------------------------------------


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotary embedding of x [num_tokens, num_heads, D] with cos, sin [num_tokens, rotary_dim / 2]."""
    half = cos.shape[-1]
    cos, sin = cos[:, None, :].to(x.dtype), sin[:, None, :].to(x.dtype)
    rotated = x.clone()
    if interleaved:
        x1, x2 = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
        rotated[..., 0 : 2 * half : 2] = x1 * cos - x2 * sin
        rotated[..., 1 : 2 * half : 2] = x2 * cos + x1 * sin
    else:
        x1, x2 = x[..., :half], x[..., half : 2 * half]
        rotated[..., :half] = x1 * cos - x2 * sin
        rotated[..., half : 2 * half] = x2 * cos + x1 * sin
    return rotated


def write_cache(cache: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, scale: float = 1.0) -> None:
    """Put values [num_tokens, num_kv_heads, D] at their slots; negative slots are skipped."""
    block_size = cache.shape[2]
    keep = slots >= 0
    slots, values = slots[keep].long(), values[keep] / scale
    if cache.dtype == torch.float8_e4m3fn:
        values = values.clamp(-448.0, 448.0).to(torch.float32).to(cache.dtype)
        # Advanced indexing is not implemented for float8; its bytes will do.
        cache.view(torch.uint8)[slots // block_size, :, slots % block_size] = values.view(torch.uint8)
    else:
        cache[slots // block_size, :, slots % block_size] = values.to(cache.dtype)


def rope_and_write_kv(
    qkv: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    num_heads: int,
    *,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
    interleaved: bool = False,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    norms_values: bool = False,
    keys_are_values: bool = False,
    only_queries: bool = False,
) -> torch.Tensor:
    """Write K and V into the cache; return the rotated queries [num_tokens, num_heads, D]."""
    num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    compute = compute_dtype(qkv.dtype)
    heads = qkv.to(compute).unflatten(1, (-1, head_dim))
    token_cos, token_sin = cos[positions.long()], sin[positions.long()]

    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm_eps)

    q = heads[:, :num_heads]
    if q_norm is not None:
        q = scaled(q) * (q_norm.to(compute) + norm_offset)
    q = rotate(q, token_cos, token_sin, interleaved)
    if only_queries:
        return q.to(qkv.dtype)
    k, v = heads[:, num_heads : num_heads + num_kv_heads], heads[:, -num_kv_heads:]
    if keys_are_values:
        v = k
    if norms_values:
        v = scaled(v)
    if k_norm is not None:
        k = scaled(k) * (k_norm.to(compute) + norm_offset)
    k = rotate(k, token_cos, token_sin, interleaved)
    write_cache(k_cache, k, slots, k_scale)
    write_cache(v_cache, v, slots, v_scale)
    return q.to(qkv.dtype)


# --- attention_decode.py, attention_prefill.py ---------------------------------------------------------------------


def gather_cache(cache: torch.Tensor, block_table: torch.Tensor, length: int, dtype: torch.dtype) -> torch.Tensor:
    """The first `length` tokens of a row: [length, num_kv_heads, D]."""
    block_size = cache.shape[2]
    blocks = block_table[: -(-length // block_size)].long()
    if cache.dtype == torch.float8_e4m3fn:
        picked = cache.view(torch.uint8)[blocks].view(torch.float8_e4m3fn)
    else:
        picked = cache[blocks]
    return picked.transpose(1, 2).flatten(0, 1)[:length].to(dtype)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    kv_lens: torch.Tensor,
    run_rows: torch.Tensor,
    softmax_scale: float,
    *,
    window: int = 0,
    aligned: bool = False,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """Attention of every run, decode and prefill alike: [num_tokens, num_heads, D]. Padding tokens get zeros."""
    compute = compute_dtype(q.dtype)
    num_heads, num_kv_heads = q.shape[1], k_cache.shape[1]
    out = torch.zeros_like(q)
    starts, lens, row_ids = query_starts.tolist(), kv_lens.tolist(), run_rows.tolist()
    for run, (kv_len, row) in enumerate(zip(lens, row_ids, strict=True)):
        first, last = starts[run], starts[run + 1]
        if kv_len == 0 or last == first:
            continue
        k = gather_cache(k_cache, block_tables[row], kv_len, compute) * k_scale  # [kv_len, num_kv_heads, D]
        v = gather_cache(v_cache, block_tables[row], kv_len, compute) * v_scale
        k = k.repeat_interleave(num_heads // num_kv_heads, dim=1)
        v = v.repeat_interleave(num_heads // num_kv_heads, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[first:last].to(compute), k) * softmax_scale
        if soft_cap > 0:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        positions = torch.arange(kv_len - (last - first), kv_len, device=q.device)[:, None]
        others = torch.arange(kv_len, device=q.device)[None, :]
        hidden = others > positions
        if aligned:
            hidden = hidden | (others // window < positions // window)
        elif window > 0:
            hidden = hidden | (others <= positions - window)
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            column = sinks.to(compute)[:, None, None].expand(-1, last - first, 1)
            weights = torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]
        else:
            weights = scores.softmax(dim=-1)
        out[first:last] = torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)
    return out


# --- latent_kv.py, attention_latent.py -----------------------------------------------------------------------------


def rotate_and_write_latent(
    query: torch.Tensor,
    cached: torch.Tensor,
    cache: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    scale: float = 1.0,
) -> None:
    """Rotate the queries' ends in place; write the cached vectors, their ends rotated too."""
    start = query.shape[2] - 2 * cos.shape[1]
    token_cos, token_sin = cos[positions.long()], sin[positions.long()]
    vectors = cached.unsqueeze(1).to(compute_dtype(cached.dtype)).clone()  # [num_tokens, 1, D]
    for x in (query, vectors):
        x[..., start:] = rotate(x[..., start:].to(vectors.dtype), token_cos, token_sin, interleaved).to(x.dtype)
    write_cache(cache, vectors, slots, scale)


def latent_attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    kv_lens: torch.Tensor,
    run_rows: torch.Tensor,
    softmax_scale: float,
    kv_rank: int,
    *,
    cache_scale: float = 1.0,
) -> torch.Tensor:
    """Attention of every run, decode and prefill alike: [num_tokens, num_heads, kv_rank]. Padding gets zeros."""
    whole = paged_attention(
        q, cache, cache, block_tables, query_starts, kv_lens, run_rows, softmax_scale, k_scale=cache_scale,
        v_scale=cache_scale,
    )  # fmt: skip
    return whole[..., :kv_rank].contiguous()


# --- activation.py, gather.py --------------------------------------------------------------------------------------


def gated_activation(packed: torch.Tensor, kind: str) -> torch.Tensor:
    """act(gate) * up, [num_tokens, I]."""
    gate, up = packed.to(compute_dtype(packed.dtype)).chunk(2, dim=-1)
    if kind == "silu":
        activated = torch.nn.functional.silu(gate)
    elif kind == "swiglu_oai":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0) + 1
        activated = gate * torch.sigmoid(1.702 * gate)
    else:
        activated = torch.nn.functional.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none")
    return (activated * up).to(packed.dtype)


def gather_last_hidden(hidden: torch.Tensor, query_starts: torch.Tensor) -> torch.Tensor:
    """Row r: the hidden state of run r's last token, zeros for an empty run."""
    starts, ends = query_starts[:-1].long(), query_starts[1:].long()
    picked = hidden[(ends - 1).clamp(min=0)]
    return torch.where((ends > starts)[:, None], picked, torch.zeros_like(picked))


def look_up_part(token_ids: torch.Tensor, table: torch.Tensor, first: int) -> torch.Tensor:
    """Rows of a table that begins with row `first` of a larger one; zeros for those that it lacks."""
    local = token_ids.long() - first
    outside = (local < 0) | (local >= len(table))
    return torch.nn.functional.embedding(local.masked_fill(outside, 0), table).masked_fill(outside[:, None], 0)


# --- gemm.py -------------------------------------------------------------------------------------------------------


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight^T + bias, accumulated in float32 (float64 for float64 inputs)."""
    compute = compute_dtype(x.dtype)
    out = x.to(compute) @ weight.to(compute).T
    return (out if bias is None else out + bias.to(compute)).to(x.dtype)


# --- work_list.py --------------------------------------------------------------------------------------------------


def _first_seen(kv_len: int, window: int, aligned: bool) -> int:
    if not window or not kv_len:
        return 0
    return (kv_len - 1) // window * window if aligned else max(0, kv_len - window)


def _padding_record(run: int, row: int, token: int, first_item: int) -> tuple[int, ...]:
    return (run, row, token, 0, 0, 0, first_item, 1)


def share_records(
    query_starts: list[int],
    kv_lens: list[int],
    run_rows: list[int],
    *,
    window: int,
    num_shares: int,
    cut: int,
    min_share: int,
    short_share: int,
    most_pieces: int,
    aligned: bool = False,
) -> tuple[list[tuple[int, ...]], list[int]]:
    """By `SharePolicy`: the decode list's records, and the first of every share with the end of the last."""
    # The line of all cuts of all runs: (run, position where the cut begins).
    line = [
        (run, start)
        for run, kv_len in enumerate(kv_lens)
        if kv_len and query_starts[run + 1] - query_starts[run] == 1
        for start in range(_first_seen(kv_len, window, aligned) // cut * cut, kv_len, cut)
    ]
    pieces: list[tuple[int, int, int]] = []
    first_of_share = []
    decodes = list(dict.fromkeys(run for run, _ in line))
    if len(line) <= short_share // cut * num_shares and 4 * len(decodes) <= num_shares:
        for decode in decodes:
            starts = [start for run, start in line if run == decode]
            shares = -(-len(starts) * (num_shares - len(decodes)) // len(line))
            wanted = min(shares, len(starts) // (min_share // cut), most_pieces)
            size = -(-len(starts) // max(wanted, 1))
            for first in range(0, len(starts), size):
                first_of_share.append(len(pieces))
                last = starts[first : first + size][-1]
                pieces.append((decode, starts[first], min(last + cut, kv_lens[decode])))
        first_of_share += [len(pieces)] * (num_shares + 1 - len(pieces))
    else:
        longest = max(Counter(run for run, _ in line).values(), default=1)
        num_used = max(1, min(num_shares, len(line) // (min_share // cut), most_pieces * len(line) // longest))
        for share in range(num_shares):
            first_of_share.append(len(pieces))
            bounds = (share * len(line) // num_used, (share + 1) * len(line) // num_used)
            cuts = line[slice(*bounds)] if share < num_used else []
            for run in dict.fromkeys(run for run, _ in cuts):
                starts = [start for owner, start in cuts if owner == run]
                pieces.append((run, starts[0], min(starts[-1] + cut, kv_lens[run])))
        first_of_share.append(len(pieces))
    runs = [run for run, _, _ in pieces]
    records: list[tuple[int, ...]] = [
        (run, run_rows[run], query_starts[run], kv_lens[run], start, end, runs.index(run), runs.count(run))
        for run, start, end in pieces
    ]
    for run, kv_len in enumerate(kv_lens):
        if kv_len == 0:
            first_item = len(records)
            tokens = range(query_starts[run], query_starts[run + 1])
            records += [_padding_record(run, run_rows[run], token, first_item) for token in tokens]
    return records, first_of_share


def prefill_records(
    query_starts: list[int], kv_lens: list[int], run_rows: list[int], *, tile_tokens: int, min_queries: int
) -> list[tuple[int, ...]]:
    """The prefill list's records, in `work_list.PREFILL_FIELDS` order."""
    records: list[tuple[int, ...]] = []
    for run, (kv_len, row) in enumerate(zip(kv_lens, run_rows, strict=True)):
        first, last = query_starts[run], query_starts[run + 1]
        if kv_len == 0 or last - first < min_queries:
            continue
        for offset in reversed(range(0, last - first, tile_tokens)):
            queries = min(tile_tokens, last - first - offset)
            records.append((run, row, first + offset, queries, kv_len - (last - first) + offset, kv_len, 0, 0))
    return records
