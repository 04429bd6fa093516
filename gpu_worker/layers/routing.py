"""Which experts a token goes to, and with what weight: the plain form of every router that `MoeSpec` describes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gpu_worker.model_spec import MoeSpec

# Added to the sum that weights are divided by, as the models that normalise sigmoid scores were trained with.
SIGMOID_SUM_EPS = 1e-20


@dataclass(frozen=True)
class Routing:
    """The experts of every token."""

    weights: torch.Tensor  # float32 [num_tokens, num_chosen]
    experts: torch.Tensor  # [num_tokens, num_chosen], numbers of the whole model's experts

    def mix(self, x: torch.Tensor, held: range, apply: Callable[[int, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The weighted sum over the `held` experts, one after another; the host learns which of them have work.

        `apply(i, rows)` is the i-th held expert of rows [num_rows, hidden]. Returns [num_tokens, hidden].
        """
        mixed = torch.zeros_like(x)
        for expert in torch.unique(self.experts).tolist():
            if expert not in held:
                continue
            tokens, places = torch.nonzero(self.experts == expert, as_tuple=True)
            out = apply(expert - held.start, x[tokens])  # [num_rows, hidden]
            mixed.index_add_(0, tokens, (out * self.weights[tokens, places, None]).to(x.dtype))
        return mixed


def choose_experts(logits: torch.Tensor, spec: MoeSpec, correction: torch.Tensor | None) -> Routing:
    """Router logits [num_tokens, num_experts] to experts and weights, in float32."""
    logits = logits.float()
    scores = logits.softmax(-1) if spec.scoring == "softmax" else logits.sigmoid()
    for_choice = scores if correction is None else scores + correction
    if spec.num_groups > 1:
        for_choice = _within_best_groups(for_choice, spec)
    experts = for_choice.topk(spec.num_chosen, dim=-1).indices
    weights = scores.gather(-1, experts)
    if spec.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + (SIGMOID_SUM_EPS if spec.scoring == "sigmoid" else 0))
    return Routing(weights * spec.scale, experts)


def _within_best_groups(scores: torch.Tensor, spec: MoeSpec) -> torch.Tensor:
    grouped = scores.unflatten(-1, (spec.num_groups, -1))  # [num_tokens, num_groups, experts of a group]
    group_scores = grouped.amax(-1) if spec.group_score == "max" else grouped.topk(2, dim=-1).values.sum(-1)
    best = group_scores.topk(spec.num_chosen_groups, dim=-1).indices
    hidden = torch.ones_like(group_scores, dtype=torch.bool).scatter_(-1, best, False)
    return grouped.masked_fill(hidden.unsqueeze(-1), float("-inf")).flatten(-2)
