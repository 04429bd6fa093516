"""Plain-torch twins of the kernels of mixtures of experts; see `reference.py` for what a twin is."""

from __future__ import annotations

import torch

from stepwire_kernels.expert_scaled import ScaledExpertWeights, ScaledStack
from stepwire_kernels.experts import ExpertWeights
from stepwire_kernels.quantize_input import FLOAT8_LIMIT, INT8_LIMIT, MIN_SCALE
from stepwire_kernels.reference import compute_dtype, gated_activation

# --- expert_routing.py ---------------------------------------------------------------------------------------------


def choose_experts(
    logits: torch.Tensor,
    num_chosen: int,
    *,
    sigmoid: bool = False,
    renormalize: bool = False,
    scale: float = 1.0,
    sum_eps: float = 0.0,
    correction: torch.Tensor | None = None,
    num_groups: int = 1,
    num_chosen_groups: int = 1,
    top_two: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights in the logits' computing type and experts int32, [num_tokens, num_chosen] each."""
    wide = logits.to(compute_dtype(logits.dtype))
    scores = wide.sigmoid() if sigmoid else wide.softmax(-1)
    ranking = scores if correction is None else scores + correction.to(scores.dtype)
    if num_groups > 1:
        by_group = ranking.unflatten(-1, (num_groups, -1))  # [num_tokens, num_groups, E / num_groups]
        group_scores = by_group.topk(2, dim=-1).values.sum(-1) if top_two else by_group.amax(-1)
        order = group_scores.argsort(dim=-1, descending=True, stable=True)
        is_open = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(-1, order[:, :num_chosen_groups], True)
        ranking = by_group.masked_fill(~is_open.unsqueeze(-1), float("-inf")).flatten(-2)
    experts = ranking.argsort(dim=-1, descending=True, stable=True)[:, :num_chosen]
    weights = scores.gather(-1, experts)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + sum_eps)
    return weights * scale, experts.int()


# --- expert_tiles.py -----------------------------------------------------------------------------------------------


def expert_tiles(
    experts: torch.Tensor, num_held: int, tile_rows: int, *, first_expert: int = 0
) -> tuple[list[int], list[tuple[int, int, int]]]:
    """The pairs of held experts by expert, and the tiles that hold any: (expert, first place, number of pairs)."""
    numbers = (experts.flatten() - first_expert).tolist()
    order: list[int] = []
    tiles: list[tuple[int, int, int]] = []
    for expert in range(num_held):
        pairs = [pair for pair, number in enumerate(numbers) if number == expert]
        for start in range(0, len(pairs), tile_rows):
            tiles.append((expert, len(order) + start, min(tile_rows, len(pairs) - start)))
        order += pairs
    return order, tiles


# --- experts.py, expert_gemm.py, expert_gemv.py --------------------------------------------------------------------


def mix_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    held: ExpertWeights,
    kind: str,
    *,
    first_expert: int = 0,
) -> torch.Tensor:
    """Each token's weighted sum over its held experts, [num_tokens, H]."""
    compute = compute_dtype(x.dtype)
    mixed = torch.zeros_like(x, dtype=compute)
    for token, row in enumerate(experts.tolist()):
        for place, number in enumerate(row):
            expert = number - first_expert
            if not 0 <= expert < held.down.shape[0]:
                continue
            packed = held.gate_up[expert].to(compute) @ x[token].to(compute)
            if held.gate_up_bias is not None:
                packed = packed + held.gate_up_bias[expert].to(compute)
            out = held.down[expert].to(compute) @ gated_activation(packed, kind)
            if held.down_bias is not None:
                out = out + held.down_bias[expert].to(compute)
            mixed[token] += weights[token, place].to(compute) * out
    return mixed.to(x.dtype)


# --- expert_scaled.py ----------------------------------------------------------------------------------------------


def _as_quantized(x: torch.Tensor, dtype: torch.dtype, group: int, static: torch.Tensor | None) -> torch.Tensor:
    """x [num_rows, K] after quantization and back in float64; scales and quotients are float32, by definition."""
    limit = INT8_LIMIT if dtype == torch.int8 else FLOAT8_LIMIT
    k = x.shape[1]
    wide = torch.nn.functional.pad(x.float(), (0, -k % group)).unflatten(1, (-1, group))
    scales = (wide.abs().amax(-1, keepdim=True) / limit).clamp(min=MIN_SCALE) if static is None else static
    scaled = wide / scales
    values = scaled.round().clamp(-128, 127) if dtype == torch.int8 else scaled.clamp(-limit, limit).to(dtype)
    return (values.double() * scales.double()).flatten(1)[:, :k]


def dense_scaled(stack: ScaledStack) -> torch.Tensor:
    """float64 [experts, N, K]."""
    _, n, k = stack.values.shape
    rows = stack.scales.double().repeat_interleave(stack.block_n, 1)[:, :n]
    return stack.values.double() * rows.repeat_interleave(min(stack.block_k, k), 2)[:, :, :k]


def mix_scaled_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    held: ScaledExpertWeights,
    kind: str,
    *,
    first_expert: int = 0,
) -> torch.Tensor:
    """`mix_experts` in float64 of inputs that are quantized as `held` says; inner values are rounded to x's type."""
    gate_up, down = dense_scaled(held.gate_up), dense_scaled(held.down)
    mixed = torch.zeros_like(x, dtype=torch.float64)

    def quantized(row: torch.Tensor, stack: ScaledStack, static: torch.Tensor | None, expert: int) -> torch.Tensor:
        if not held.quantizes:
            return row.double()
        groups = [group for group in (held.input_group, stack.weight_group) if group is not None]
        group = min(groups) if held.input_group is not None else row.shape[1]
        return _as_quantized(row, stack.values.dtype, group, None if static is None else static[expert])

    for token, chosen in enumerate(experts.tolist()):
        for place, number in enumerate(chosen):
            expert = number - first_expert
            if not 0 <= expert < held.num_experts:
                continue
            packed = quantized(x[token : token + 1], held.gate_up, held.gate_up_static, expert) @ gate_up[expert].T
            if held.gate_up.bias is not None:
                packed = packed + held.gate_up.bias[expert].double()
            inner = gated_activation(packed, kind).to(x.dtype)
            out = quantized(inner, held.down, held.down_static, expert) @ down[expert].T
            if held.down.bias is not None:
                out = out + held.down.bias[expert].double()
            mixed[token] += weights[token, place].double() * out[0]
    return mixed
