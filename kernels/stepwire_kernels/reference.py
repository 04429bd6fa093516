"""Plain-torch twin of every kernel: the same function, written for reading.

Twins run on any device and in any floating dtype (give float64 inputs for a reference to test against), keep their
inputs' dtype in their outputs, and take the kernels' arguments without buffers and tuning. They are also what the CPU
worker runs on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from stepwire_kernels import step_input as steps
from stepwire_kernels.philox import LANE_TOKENS, TILE_TOKENS
from stepwire_kernels.sampler import Sampled


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
) -> torch.Tensor:
    """Write K and V into the cache; return the rotated queries [num_tokens, num_heads, D]."""
    num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    compute = compute_dtype(qkv.dtype)
    heads = qkv.to(compute).unflatten(1, (num_heads + 2 * num_kv_heads, head_dim))
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    if q_norm is not None and k_norm is not None:
        q = q * torch.rsqrt(q.square().mean(-1, keepdim=True) + norm_eps) * (q_norm.to(compute) + norm_offset)
        k = k * torch.rsqrt(k.square().mean(-1, keepdim=True) + norm_eps) * (k_norm.to(compute) + norm_offset)
    token_cos, token_sin = cos[positions.long()], sin[positions.long()]
    q = rotate(q, token_cos, token_sin, interleaved)
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
        if window > 0:
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


# --- gemm.py -------------------------------------------------------------------------------------------------------


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight^T + bias, accumulated in float32 (float64 for float64 inputs)."""
    compute = compute_dtype(x.dtype)
    out = x.to(compute) @ weight.to(compute).T
    return (out if bias is None else out + bias.to(compute)).to(x.dtype)


# --- work_list.py --------------------------------------------------------------------------------------------------


def decode_records(
    query_starts: list[int],
    kv_lens: list[int],
    run_rows: list[int],
    *,
    window: int,
    min_chunk: int,
    max_chunks: int,
    wanted_records: int = 0,
) -> list[tuple[int, ...]]:
    """The decode list's records, in `work_list.DECODE_FIELDS` order."""
    records: list[tuple[int, ...]] = []
    decodes = [kv_len for run, kv_len in enumerate(kv_lens) if query_starts[run + 1] - query_starts[run] == 1]
    total_visible = sum(min(kv_len, window or kv_len) for kv_len in decodes)
    even_chunk = min(max(total_visible // wanted_records, 64), 2048) if wanted_records else 0
    for run, (kv_len, row) in enumerate(zip(kv_lens, run_rows, strict=True)):
        first, last = query_starts[run], query_starts[run + 1]
        first_item = len(records)
        if kv_len == 0:
            records += [(run, row, token, 0, 0, 0, first_item, 1) for token in range(first, last)]
        elif last - first == 1:
            visible_from = max(0, kv_len - window) if window else 0
            chunk = min_chunk
            if wanted_records:
                num_parts = max(1, (kv_len - visible_from + even_chunk // 2) // even_chunk)
                chunk = -(-(kv_len - visible_from) // (num_parts * 64)) * 64
            while chunk * max_chunks < kv_len - visible_from:
                chunk *= 2
            starts = list(range(visible_from // chunk * chunk, kv_len, chunk))
            records += [
                (run, row, first, kv_len, start, min(start + chunk, kv_len), first_item, len(starts))
                for start in starts
            ]
    return records


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


# --- step_input.py -------------------------------------------------------------------------------------------------


def apply_delta(buffer: torch.Tensor, rows: steps.RowState) -> None:
    """Copy the buffer's segments into the rows."""
    words = buffer.cpu()
    num_segments, segments_at = int(words[0]), int(words[3])
    tables = (rows.tokens, rows.lengths, rows.block_tables, rows.parameters, rows.biases)
    for index in range(num_segments):
        at = segments_at + index * steps.SEGMENT_WORDS
        table, destination, length, source = words[at : at + steps.SEGMENT_WORDS].tolist()
        tables[table].view(-1)[destination : destination + length] = buffer[source : source + length]


def recount_tokens(buffer: torch.Tensor, rows: steps.RowState) -> None:
    """Rebuild the token counts of the rows that the buffer names."""
    words = buffer.cpu()
    num_counts, counts_at = int(words[5]), int(words[6])
    vocab_size = rows.token_counts.shape[1]
    for index in range(num_counts):
        at = counts_at + index * steps.COUNT_WORDS
        row, prompt_len, length, _ = words[at : at + steps.COUNT_WORDS].tolist()
        tokens = rows.tokens[row, :length].long()
        prompt, output = tokens[: min(prompt_len, length)], tokens[min(prompt_len, length) :]
        counts = torch.bincount(output[(output >= 0) & (output < vocab_size)], minlength=vocab_size).int()
        in_prompt = prompt[(prompt >= 0) & (prompt < vocab_size)]
        counts[in_prompt] |= steps.PROMPT_FLAG
        rows.token_counts[row] = counts


def build_step_input(
    buffer: torch.Tensor, rows: steps.RowState, step: steps.StepInput, block_size: int, *, one_token_runs: bool
) -> None:
    """Fill `step` from the buffer's runs and the rows."""
    words = buffer.cpu()
    num_runs, runs_at = int(words[1]), int(words[4])
    for tensor in (step.input_ids, step.positions, step.slots, step.kv_lens, step.run_rows, step.run_flags):
        tensor.zero_()
    step.sample_positions.zero_()
    step.faults.zero_()
    token = 0
    for run in range(num_runs):
        at = runs_at + run * steps.RUN_WORDS
        row, start_pos, length, flags = words[at : at + steps.RUN_WORDS].tolist()
        positions = torch.arange(start_pos, start_pos + length, device=step.positions.device)
        span = slice(token, token + length)
        step.query_starts[run] = token
        step.input_ids[span] = rows.tokens[row, positions]
        step.positions[span] = positions.int()
        step.slots[span] = rows.block_tables[row, positions // block_size] * block_size + (positions % block_size).int()
        step.kv_lens[run] = start_pos + length
        step.run_rows[run] = row
        step.run_flags[run] = flags
        step.sample_positions[run] = start_pos + length
        step.faults[run] = int(start_pos + length > int(rows.lengths[row])) * steps.FAULT_UNKNOWN_TOKENS
        token += length
    if one_token_runs:
        step.query_starts.copy_(torch.arange(step.max_runs + 1))
    elif num_runs < step.max_runs:
        step.query_starts[num_runs] = token
        step.query_starts[num_runs + 1 :] = step.max_tokens
    else:
        step.query_starts[num_runs] = token


def write_back_tokens(sampled: torch.Tensor, step: steps.StepInput, rows: steps.RowState) -> None:
    """Append each sampling run's token to its row."""
    for run in range(step.max_runs):
        flags, position, row = int(step.run_flags[run]), int(step.sample_positions[run]), int(step.run_rows[run])
        if not flags & steps.RUN_SAMPLES or position >= rows.tokens.shape[1]:
            continue
        rows.tokens[row, position] = sampled[run]
        rows.lengths[row] = position + 1
        if flags & steps.RUN_COUNTS and rows.token_counts.shape[0]:
            rows.token_counts[row, int(sampled[run])] += 1


# --- philox.py, sampler.py -----------------------------------------------------------------------------------------

_MASK32 = np.uint64(0xFFFFFFFF)


def philox_words(seed: int, counters: np.ndarray) -> np.ndarray:
    """Philox4x32-10: counters uint32 [n, 4] and a 64-bit key to words uint32 [n, 4]."""
    c0, c1, c2, c3 = (counters[:, i].astype(np.uint64) for i in range(4))
    key0, key1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        product0 = c0 * np.uint64(0xD2511F53)
        product1 = c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (product1 >> np.uint64(32)) ^ c1 ^ np.uint64(key0),
            product1 & _MASK32,
            (product0 >> np.uint64(32)) ^ c3 ^ np.uint64(key1),
            product0 & _MASK32,
        )
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def gumbel_noise(seed: int, sequence_index: int, position: int, vocab_size: int) -> np.ndarray:
    """Gumbel noise of every token id, float32 [vocab_size]; the stream of `philox.py`."""
    num_tiles = -(-vocab_size // TILE_TOKENS)
    counters = np.zeros((num_tiles * LANE_TOKENS, 4), dtype=np.uint32)
    counters[:, 0] = np.arange(num_tiles * LANE_TOKENS)
    counters[:, 1] = position & 0xFFFFFFFF
    counters[:, 2] = sequence_index & 0xFFFFFFFF
    words = philox_words(seed, counters)  # [num_tiles * LANE_TOKENS, 4]
    # Token t of a tile is lane t // LANE_TOKENS of counter t % LANE_TOKENS.
    ordered = words.reshape(num_tiles, LANE_TOKENS, 4).transpose(0, 2, 1).reshape(-1)[:vocab_size]
    # The kernel works in float32: the word is rounded to it first, the rest is exact enough in float64.
    u = (ordered.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    exponential = -np.log1p(-np.minimum(u.astype(np.float64), 1.0 - 1e-10))
    return (-np.log(exponential)).astype(np.float32)


@dataclass(frozen=True)
class RowParameters:
    """One row's sampling parameters as the device holds them."""

    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    top_k: int = 0
    seed: int = 0
    sequence_index: int = 0
    num_logprobs: int = 0
    biases: tuple[tuple[int, float], ...] = ()

    def words(self) -> np.ndarray:
        """The row of `RowState.parameters`, int32 [PARAMETER_WORDS]."""
        words = np.zeros(steps.PARAMETER_WORDS, dtype=np.int32)
        floats = (self.temperature, self.top_p, self.min_p, self.repetition, self.presence, self.frequency)
        words[:6] = np.array(floats, dtype=np.float32).view(np.int32)
        words[steps.PARAM_TOP_K] = self.top_k
        seed = np.array([self.seed & 0xFFFFFFFF, (self.seed >> 32) & 0xFFFFFFFF], dtype=np.uint32)
        words[[steps.PARAM_SEED_LOW, steps.PARAM_SEED_HIGH]] = seed.view(np.int32)
        words[steps.PARAM_SEQUENCE_INDEX] = self.sequence_index
        words[steps.PARAM_NUM_BIASES] = len(self.biases)
        words[steps.PARAM_NUM_LOGPROBS] = self.num_logprobs
        return words

    def bias_words(self, max_biases: int) -> np.ndarray:
        """The row of `RowState.biases`, int32 [2, max_biases]."""
        words = np.zeros((2, max_biases), dtype=np.int32)
        words[0, : len(self.biases)] = [token for token, _ in self.biases]
        words[1, : len(self.biases)] = np.array([value for _, value in self.biases], dtype=np.float32).view(np.int32)
        return words

    @staticmethod
    def from_rows(rows: steps.RowState, row: int) -> RowParameters:
        """Read a row's parameters back."""
        words = rows.parameters[row].cpu().numpy()
        floats = words[:6].view(np.float32).tolist()
        low, high = (int(words[i]) & 0xFFFFFFFF for i in (steps.PARAM_SEED_LOW, steps.PARAM_SEED_HIGH))
        biases = rows.biases[row].cpu().numpy()
        count = int(words[steps.PARAM_NUM_BIASES])
        pairs = zip(biases[0, :count].tolist(), biases[1, :count].view(np.float32).tolist(), strict=True)
        return RowParameters(
            *floats,
            top_k=int(words[steps.PARAM_TOP_K]),
            seed=high << 32 | low,
            sequence_index=int(words[steps.PARAM_SEQUENCE_INDEX]),
            num_logprobs=int(words[steps.PARAM_NUM_LOGPROBS]),
            biases=tuple(pairs),
        )


def adjust_logits(
    logits: torch.Tensor,
    parameters: RowParameters,
    counts: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Bias, grammar mask and penalties of one row's logits [vocab_size], before temperature."""
    z = logits.to(compute_dtype(logits.dtype)).clone()
    for token, value in parameters.biases:
        z[token] += value
    if mask is not None:
        tokens = torch.arange(z.numel(), device=z.device)
        allowed = (mask[tokens // 32] >> (tokens % 32)) & 1
        z = z.masked_fill(allowed == 0, float("-inf"))
    if counts is not None:
        output_count = counts & 0x7FFFFFFF
        penalised = torch.where(z > 0, z / parameters.repetition, z * parameters.repetition)
        z = torch.where(counts != 0, penalised, z)
        z = z - parameters.frequency * output_count - parameters.presence * (output_count > 0)
    return z


def keep_tokens(t: torch.Tensor, parameters: RowParameters) -> torch.Tensor:
    """Which tokens min-p, top-k and top-p keep, by sorting: bool [vocab_size]."""
    keep = t > float("-inf")
    if parameters.min_p > 0:
        keep &= t >= t.max() + float(np.log(np.float32(parameters.min_p)))
    if 0 < parameters.top_k < t.numel():
        kept = t[keep].sort(descending=True).values
        if parameters.top_k < kept.numel():
            keep &= t >= kept[parameters.top_k - 1]
    if parameters.top_p < 1.0:
        order = t.masked_fill(~keep, float("-inf")).sort(descending=True)
        masses = (order.values - order.values[0]).exp()
        before = masses.cumsum(0) - masses
        inside = (before < parameters.top_p * masses.sum()) & (order.values > float("-inf"))
        # The first token always stays; all ties of the last one kept stay with it.
        last = order.values[max(1, int(inside.sum())) - 1]
        keep &= t >= last
    return keep


@dataclass(frozen=True)
class SampledToken:
    """One run's sample."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    fault: int


def sample_row(
    logits: torch.Tensor,
    parameters: RowParameters,
    position: int,
    counts: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> SampledToken:
    """Draw one token from one row of logits [vocab_size]."""
    wide = logits.to(compute_dtype(logits.dtype))
    has_nan = bool(wide.isnan().any())
    wide = wide.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    logprobs = wide - wide.logsumexp(0)
    z = adjust_logits(wide, parameters, counts, mask)
    if parameters.temperature > 0:
        t = z / parameters.temperature
        noise = gumbel_noise(parameters.seed, parameters.sequence_index, position, z.numel())
        kept = keep_tokens(t, parameters)
        score = torch.where(kept, t + torch.from_numpy(noise).to(t), torch.full_like(t, float("-inf")))
    else:
        score = z
    best = score.max()
    drawable = not has_nan and bool(torch.isfinite(best))
    is_sound = not has_nan and bool(torch.isfinite(wide.max()))
    token = int((score == best).nonzero()[0]) if bool(best > float("-inf")) else 0
    count = min(parameters.num_logprobs, wide.numel())
    order = wide.sort(descending=True, stable=True).indices[:count].tolist()
    return SampledToken(
        token_id=token,
        logprob=float(logprobs[token]),
        top=tuple((index, float(logprobs[index])) for index in order),
        fault=0 if drawable else 4 if is_sound else 2,
    )


def sample(
    logits: torch.Tensor,
    run_rows: torch.Tensor,
    sample_positions: torch.Tensor,
    rows: steps.RowState,
    *,
    masks: torch.Tensor | None = None,
    mask_rows: torch.Tensor | None = None,
) -> list[SampledToken]:
    """Draw one token for every run (the twin of `sampler.sample`)."""
    results = []
    for run in range(logits.shape[0]):
        row = int(run_rows[run])
        mask_row = -1 if mask_rows is None else int(mask_rows[run])
        results.append(
            sample_row(
                logits[run],
                RowParameters.from_rows(rows, row),
                int(sample_positions[run]),
                counts=rows.token_counts[row] if rows.token_counts.shape[0] else None,
                mask=None if masks is None or mask_row < 0 else masks[mask_row],
            )
        )
    return results


# --- step_result.py ------------------------------------------------------------------------------------------------


def pack_result(sampled: Sampled, step: steps.StepInput, num_runs: int, slot: torch.Tensor, max_runs: int) -> None:
    """Write a step's results into `slot`, int32 [words] (the twin of `step_result.pack_result`)."""
    records = slot[: max_runs * 4].view(max_runs, 4)  # [max_runs, 4]
    for run in range(num_runs):
        records[run, 0] = sampled.token_ids[run]
        records[run, 1] = sampled.logprobs[run : run + 1].view(torch.int32)[0]
        records[run, 2] = sampled.faults[run]
        records[run, 3] = step.faults[run]
    max_top = sampled.top_ids.shape[1]
    size = max_runs * max_top
    top_ids = slot[max_runs * 4 : max_runs * 4 + size].view(max_runs, max_top)  # [max_runs, max_top]
    top_logprobs = slot[max_runs * 4 + size : max_runs * 4 + 2 * size].view(max_runs, max_top)
    top_ids[:num_runs] = sampled.top_ids[:num_runs]
    top_logprobs[:num_runs] = sampled.top_logprobs[:num_runs].view(torch.int32)
