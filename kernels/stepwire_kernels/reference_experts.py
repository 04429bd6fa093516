"""Plain-torch twins of the kernels of mixtures of experts; see `reference.py` for what a twin is."""

from __future__ import annotations

import torch

from stepwire_kernels.experts import ExpertWeights
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
