"""A mixture's experts from chosen experts to the tokens' sums: which kernels, and their launch shapes.

    mixed[t] = sum over j of weights[t, j] * down[e] @ act(gate_up[e] @ x[t])     with e = experts[t, j]

Formulas with biases: `expert_gemm.py`. Two roads: products of pairs (`expert_gemv.py`) as long as two tokens seldom
meet at one expert, grouped products (`expert_tiles.py`, `expert_gemm.py`) from there on. Experts whose weights are
packed in a few bits: `expert_packed.py`, by tiles at any number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import triton

from stepwire_kernels.activation import ACTIVATIONS, Activation
from stepwire_kernels.expert_gemm import TileTuning, expert_down, expert_gate_up, sum_experts
from stepwire_kernels.expert_gemv import (
    Chosen,
    PairDownTuning,
    PairGateUpTuning,
    default_pair_tunings,
    pair_down,
    pair_gate_up,
)
from stepwire_kernels.expert_packed import PackedExpertTuning, PackedExpertWeights, packed_expert_product
from stepwire_kernels.expert_routing import RouterLogits
from stepwire_kernels.expert_tiles import build_expert_tiles
from stepwire_kernels.packed_choice import measured_experts


@dataclass(frozen=True)
class ExpertWeights:
    """Experts, one behind another; all contiguous."""

    gate_up: torch.Tensor  # [experts, 2 * I, H]: gate's rows, then up's
    down: torch.Tensor  # [experts, H, I]
    gate_up_bias: torch.Tensor | None = None  # [experts, 2 * I]
    down_bias: torch.Tensor | None = None  # [experts, H]


@dataclass(frozen=True)
class ExpertTuning:
    """Launch shapes of one mixture. `tile_rows` 0: the road of pairs, and only `pair_*` count (None: the default)."""

    tile_rows: int
    gate_up: TileTuning = field(default_factory=TileTuning)
    down: TileTuning = field(default_factory=TileTuning)
    pair_gate_up: PairGateUpTuning | None = None
    pair_down: PairDownTuning | None = None


PAIRS = ExpertTuning(tile_rows=0)
# Measured on an H100 with Qwen3-30B-A3B's shapes, by the rows of a tile: `python -m load_tests.kernels.sweep experts`.
# 64 was not in the sweep.
TILES = {
    16: ExpertTuning(16, TileTuning(64, 128, 4, 4), TileTuning(64, 128, 4, 4)),
    32: ExpertTuning(32, TileTuning(64, 128, 4, 4), TileTuning(64, 128, 4, 4)),
    64: ExpertTuning(64, TileTuning(64, 64, 4, 4), TileTuning(128, 64, 4, 4)),
    128: ExpertTuning(128, TileTuning(128, 64, 8, 4), TileTuning(128, 64, 8, 3)),
}
# Pairs for each expert up to which they are computed by themselves: every eighth meets another at its expert.
MAX_LONE_PAIRS = 0.25
# A tile holds twice the mean number of an expert's pairs: one that reads an expert's weights again costs as much as the
# first.
ROWS_OF_MEAN = 2


def default_expert_tuning(num_tokens: int, num_chosen: int, num_experts: int, dtype: torch.dtype) -> ExpertTuning:
    """The launch shapes for so many tokens, as if they chose evenly."""
    num_pairs = num_tokens * num_chosen
    if num_tokens == 1 or num_pairs <= MAX_LONE_PAIRS * num_experts:
        return PAIRS
    rows = triton.next_power_of_2(triton.cdiv(num_pairs * ROWS_OF_MEAN, num_experts))
    rows = min(128, max(16, rows))
    if dtype == torch.float32:
        # Without matrix units, and with words twice as wide, large tiles spill.
        small = TileTuning(32, 32, 4, 2)
        return ExpertTuning(min(32, rows), small, small)
    return TILES[rows]


def mix_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    held: ExpertWeights,
    kind: Activation,
    *,
    num_experts: int | None = None,
    first_expert: int = 0,
    tuning: ExpertTuning | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """This rank's summand of the mixture, [num_tokens, H].

    Args:
        weights: float32 [num_tokens, num_chosen]; experts: int32 of the same shape, numbers of the whole model.
        num_experts: of the whole model; None: all are held.
        first_expert: the number of `held`'s first expert.

    Raises:
        ValueError: shapes, types or strides that do not fit together.
    """
    _check(x, weights, experts, held, kind)
    num_held = held.down.shape[0]
    num_tokens, num_chosen = experts.shape
    if num_tokens == 0:
        return torch.empty_like(x)
    tuning = tuning or default_expert_tuning(num_tokens, num_chosen, num_experts or num_held, x.dtype)
    if tuning.tile_rows == 0:
        return _mix_pairs(x, (weights, experts), held, kind, first_expert, tuning, pdl)
    tiles = build_expert_tiles(experts, num_held, tuning.tile_rows, first_expert=first_expert, pdl=pdl)
    inner = expert_gate_up(x, held.gate_up, held.gate_up_bias, tiles, num_chosen, kind, tuning=tuning.gate_up, pdl=pdl)
    pair_out = expert_down(inner, held.down, held.down_bias, tiles, tuning=tuning.down, pdl=pdl)
    return sum_experts(pair_out, weights, experts, num_held, first_expert=first_expert, pdl=pdl)


def mix_routed_experts(
    x: torch.Tensor,
    routed: RouterLogits,
    held: ExpertWeights,
    kind: Activation,
    *,
    num_experts: int | None = None,
    first_expert: int = 0,
    tuning: ExpertTuning | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """`mix_experts` of what a router leaves: products of pairs choose their experts themselves.

    Raises:
        ValueError: shapes, types or strides that do not fit together.
    """
    num_tokens, num_chosen = x.shape[0], routed.num_chosen
    if routed.logits.shape[0] != num_tokens or routed.logits.stride(1) != 1:
        raise ValueError(
            f"mix_routed_experts: takes logits [{num_tokens}, E] with contiguous columns, got "
            f"{tuple(routed.logits.shape)}"
        )
    tuning = tuning or default_expert_tuning(num_tokens, num_chosen, num_experts or held.down.shape[0], x.dtype)
    if tuning.tile_rows or num_tokens == 0:
        weights, experts = routed.choose(pdl=pdl)
        return mix_experts(
            x, weights, experts, held, kind, num_experts=num_experts, first_expert=first_expert, tuning=tuning, pdl=pdl
        )
    _check_held(x, held, kind)
    return _mix_pairs(x, routed, held, kind, first_expert, tuning, pdl)


def _mix_pairs(
    x: torch.Tensor,
    routed: RouterLogits | Chosen,
    held: ExpertWeights,
    kind: Activation,
    first_expert: int,
    tuning: ExpertTuning,
    pdl: bool,
) -> torch.Tensor:
    num_chosen = routed.num_chosen if isinstance(routed, RouterLogits) else routed[1].shape[1]
    gate_up, down = default_pair_tunings(x.shape[0], num_chosen, held.down.shape[1], held.down.shape[2], x.dtype)
    inner = pair_gate_up(
        x,
        routed,
        held.gate_up,
        held.gate_up_bias,
        kind,
        first_expert=first_expert,
        tuning=tuning.pair_gate_up or gate_up,
        pdl=pdl,
    )
    return pair_down(
        inner,
        routed,
        held.down,
        held.down_bias,
        first_expert=first_expert,
        tuning=tuning.pair_down or down,
        pdl=pdl,
    )


def _check_held(x: torch.Tensor, held: ExpertWeights, kind: str) -> None:
    if kind not in ACTIVATIONS:
        raise ValueError(f"mix_experts: unknown activation {kind!r}; choose one of {', '.join(ACTIVATIONS)}")
    count, hidden, inner = held.down.shape
    if x.ndim != 2 or x.shape[1] != hidden or held.gate_up.shape != (count, 2 * inner, hidden) or x.stride(1) != 1:
        raise ValueError(
            f"mix_experts: takes x [num_tokens, H] with contiguous columns, gate_up [experts, 2 * I, H] and down "
            f"[experts, H, I], got {tuple(x.shape)}, {tuple(held.gate_up.shape)} and {tuple(held.down.shape)}"
        )
    if not all(tensor.is_contiguous() for tensor in vars(held).values() if tensor is not None):
        raise ValueError("mix_experts: all of `held` must be contiguous")


def _check(x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, held: ExpertWeights, kind: str) -> None:
    _check_held(x, held, kind)
    if weights.shape != experts.shape or experts.shape[0] != x.shape[0] or experts.dtype != torch.int32:
        raise ValueError(
            f"mix_experts: takes weights and int32 experts [{x.shape[0]}, num_chosen], got {tuple(weights.shape)} and "
            f"{tuple(experts.shape)} {experts.dtype}"
        )
    if not (weights.is_contiguous() and experts.is_contiguous()) or weights.dtype != torch.float32:
        raise ValueError("mix_experts: weights must be float32, and they and experts contiguous")


def default_packed_tuning(num_tokens: int, num_chosen: int, num_experts: int, dtype: torch.dtype) -> PackedExpertTuning:
    """The launch shapes for so many tokens, as if they chose evenly."""
    rows = triton.next_power_of_2(triton.cdiv(num_tokens * num_chosen * ROWS_OF_MEAN, num_experts))
    if num_tokens <= 8 or rows <= 8:
        return PackedExpertTuning(8)
    if num_tokens <= 16 or rows <= 16:
        return PackedExpertTuning(16)
    if dtype == torch.float32:
        return PackedExpertTuning(32, block_n=32, num_stages=2)
    return PackedExpertTuning(min(128, rows), block_n=64)


def mix_packed_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    held: PackedExpertWeights,
    kind: Activation,
    *,
    num_experts: int | None = None,
    first_expert: int = 0,
    tuning: PackedExpertTuning | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """`mix_experts` with packed weights.

    Raises:
        ValueError: shapes, types or strides that do not fit together.
    """
    num_tokens, num_chosen = experts.shape
    hidden = held.down.num_outputs
    if x.shape != (num_tokens, held.gate_up.num_inputs) or x.shape[1] != hidden or x.stride(1) != 1:
        raise ValueError(
            f"mix_packed_experts: takes x [{num_tokens}, {hidden}] with contiguous columns, got {tuple(x.shape)} and "
            f"experts of {held.gate_up.num_inputs} inputs"
        )
    if weights.shape != experts.shape or experts.dtype != torch.int32 or weights.dtype != torch.float32:
        raise ValueError("mix_packed_experts: takes weights in float32 and experts in int32, [num_tokens, num_chosen]")
    if num_tokens == 0:
        return torch.empty_like(x)
    num_experts = num_experts or held.num_experts
    if tuning is None and x.is_cuda and x.dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(x.device)
        tuning = measured_experts(name, held, num_tokens, num_chosen, num_experts)
    tuning = tuning or default_packed_tuning(num_tokens, num_chosen, num_experts, x.dtype)
    tiles = build_expert_tiles(experts, held.num_experts, tuning.tile_rows, first_expert=first_expert, pdl=pdl)
    inner = packed_expert_product(
        x,
        held.gate_up,
        held.gate_up_bias,
        tiles,
        held.inner_size,
        kind=kind,
        num_chosen=num_chosen,
        tuning=tuning,
        pdl=pdl,
    )
    pair_out = packed_expert_product(
        inner, held.down, held.down_bias, tiles, hidden, kind=None, num_chosen=num_chosen, tuning=tuning, pdl=pdl
    )
    return sum_experts(pair_out, weights, experts, held.num_experts, first_expert=first_expert, pdl=pdl)
