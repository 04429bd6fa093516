"""Which experts a token goes to, and with what weight: every router of a mixture of experts in one kernel.

For router logits [num_tokens, E] (any float type; all arithmetic in float32):

    scores  = softmax(logits), or sigmoid(logits)
    ranking = scores + correction                            (correction: float32 [E], where a model has it)
    ranking = -inf outside of the `num_chosen_groups` best groups of E / num_groups neighbours; a group is as good as
              its best ranking, or as the sum of its best two
    experts = the `num_chosen` largest of ranking, best first, the lower number among equals
    weights = scores[experts], divided by (their sum + sum_eps) if `renormalize`, times `scale`

weights: float32 [num_tokens, num_chosen]; experts: int32 [num_tokens, num_chosen]. Logits that are not finite give
weights that are not, and experts that exist.

A kernel that multiplies for few tokens chooses for itself (`nth_expert`, `best_experts`) and spares the step a launch:
every warp has all of a token's logits, so that nothing crosses warps between one expert and the next (up to 128 experts
of float32 and 256 of 16 bits; of more, warps share them).

Source: Shazeer et al., "Outrageously Large Neural Networks", 2017; DeepSeek-AI, "DeepSeek-V3", 2024 (groups,
correction).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream

_LOWEST = tl.constexpr(-(2**31))


@dataclass(frozen=True)
class RouterLogits:
    """A router's product, of which nobody has chosen yet; experts are in one group."""

    logits: torch.Tensor  # [num_tokens, E]
    num_chosen: int
    sigmoid: bool = False
    renormalize: bool = False
    scale: float = 1.0
    sum_eps: float = 0.0
    correction: torch.Tensor | None = None  # float32 [E]

    def choose(self, *, pdl: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """`choose_experts`, by a launch of its own."""
        return choose_experts(
            self.logits,
            self.num_chosen,
            sigmoid=self.sigmoid,
            renormalize=self.renormalize,
            scale=self.scale,
            sum_eps=self.sum_eps,
            correction=self.correction,
            pdl=pdl,
        )


@triton.jit
def _ranked(
    logits_ptr, correction_ptr, NUM_EXPERTS: tl.constexpr, SIGMOID: tl.constexpr, HAS_CORRECTION: tl.constexpr,
    COPIES: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):  # fmt: skip
    """(logits, places in the order of ranking, numbers) of one token, [COPIES, BLOCK_EXPERTS], a copy for each warp.

    Places are integers that compare as the ranking does, what is not a number included, so that there is always a best.
    """
    numbers = tl.arange(0, BLOCK_EXPERTS)[None, :] + tl.zeros([COPIES, 1], dtype=tl.int32)
    exists = numbers < NUM_EXPERTS
    # From level 2: see `dependent_launch`.
    logits = tl.load(logits_ptr + numbers, mask=exists, other=float("-inf"), cache_modifier=".cg").to(tl.float32)
    # Softmax keeps the order.
    ranking = tl.sigmoid(logits) if SIGMOID else logits
    if HAS_CORRECTION:
        if not SIGMOID:
            # Rounded before the correction is added, whatever else a kernel does with it: two kernels that choose for
            # one token must have the same bits, or one takes another expert's values.
            powers = tl.exp(logits - tl.max(logits, axis=1)[:, None])
            ranking = tl.div_rn(powers, tl.sum(powers, axis=1)[:, None] + tl.zeros_like(powers))
        ranking += tl.load(correction_ptr + numbers, mask=exists, other=0.0)
    bits = (ranking + 0.0).to(tl.int32, bitcast=True)  # one zero
    places = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return logits, tl.where(exists, places, _LOWEST), numbers


@triton.jit
def _take_best(places, numbers, NUM_EXPERTS: tl.constexpr):
    """(number of the best, [COPIES]; places without it)."""
    best = tl.max(places, axis=1)[:, None]
    number = tl.min(tl.where(places == best, numbers, NUM_EXPERTS - 1), axis=1)
    return number, tl.where(numbers == number[:, None], _LOWEST, places)


@triton.jit
def nth_expert(
    logits_ptr, correction_ptr, n, NUM_EXPERTS: tl.constexpr, SIGMOID: tl.constexpr, HAS_CORRECTION: tl.constexpr,
    COPIES: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):  # fmt: skip
    """The n-th expert, from 0, that the token whose logits are at `logits_ptr` goes to. COPIES: the program's warps."""
    _, places, numbers = _ranked(
        logits_ptr, correction_ptr, NUM_EXPERTS, SIGMOID, HAS_CORRECTION, COPIES, BLOCK_EXPERTS
    )
    for _ in range(n):
        _, places = _take_best(places, numbers, NUM_EXPERTS)
    number, _ = _take_best(places, numbers, NUM_EXPERTS)
    return tl.max(number, axis=0)


@triton.jit
def best_experts(
    logits_ptr, correction_ptr, scale, sum_eps, NUM_EXPERTS: tl.constexpr, NUM_CHOSEN: tl.constexpr,
    SIGMOID: tl.constexpr, RENORMALIZE: tl.constexpr, HAS_CORRECTION: tl.constexpr, COPIES: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr, BLOCK_CHOSEN: tl.constexpr,
):  # fmt: skip
    """(experts, weights) [BLOCK_CHOSEN] of the token whose logits are at `logits_ptr`, zeros from NUM_CHOSEN on."""
    logits, places, numbers = _ranked(
        logits_ptr, correction_ptr, NUM_EXPERTS, SIGMOID, HAS_CORRECTION, COPIES, BLOCK_EXPERTS
    )
    if SIGMOID:
        scores = tl.sigmoid(logits)
    else:
        powers = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        scores = powers / tl.sum(powers, axis=1)[:, None]
    nth = tl.arange(0, BLOCK_CHOSEN)[None, :]
    experts = tl.zeros([COPIES, BLOCK_CHOSEN], dtype=tl.int32)
    weights = tl.zeros([COPIES, BLOCK_CHOSEN], dtype=tl.float32)
    for n in tl.static_range(NUM_CHOSEN):
        number, places = _take_best(places, numbers, NUM_EXPERTS)
        score = tl.sum(tl.where(numbers == number[:, None], scores, 0.0), axis=1)
        experts = tl.where(nth == n, number[:, None], experts)
        weights = tl.where(nth == n, score[:, None], weights)
    if RENORMALIZE:
        weights = weights / (tl.sum(weights, axis=1)[:, None] + sum_eps)
    # All copies are the same.
    return tl.max(experts, axis=0), tl.max(weights * scale, axis=0)


@triton.jit
def _choose_kernel(
    logits_ptr,
    correction_ptr,
    weights_ptr,
    experts_ptr,
    scale,
    sum_eps,
    logits_stride,
    NUM_EXPERTS: tl.constexpr,
    NUM_CHOSEN: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_CORRECTION: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    NUM_CHOSEN_GROUPS: tl.constexpr,
    TOP_TWO: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
    BLOCK_CHOSEN: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    MEMBERS: tl.constexpr = NUM_EXPERTS // NUM_GROUPS
    token = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, BLOCK_GROUPS)
    members = tl.arange(0, BLOCK_MEMBERS)
    exists = (groups < NUM_GROUPS)[:, None] & (members < MEMBERS)[None, :]
    # Lanes beyond a group's members have no number of their own.
    numbers = tl.where(exists, groups[:, None] * MEMBERS + members[None, :], NUM_EXPERTS)
    correction = tl.zeros([BLOCK_GROUPS, BLOCK_MEMBERS], dtype=tl.float32)
    if HAS_CORRECTION:
        correction = tl.load(correction_ptr + numbers, mask=exists, other=0.0)
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    logits = tl.load(logits_ptr + token * logits_stride + numbers, mask=exists, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        scores = tl.sigmoid(logits)
    else:
        powers = tl.exp(logits - tl.max(tl.max(logits, axis=1), axis=0))
        scores = powers / tl.sum(tl.sum(powers, axis=1), axis=0)
    ranking = tl.where(exists, scores + correction, float("-inf"))  # [BLOCK_GROUPS, BLOCK_MEMBERS]
    if NUM_GROUPS > 1:
        best = tl.max(ranking, axis=1)  # [BLOCK_GROUPS]
        if TOP_TWO:
            first = tl.min(tl.where(ranking == best[:, None], numbers, NUM_EXPERTS), axis=1)
            best += tl.max(tl.where(numbers == first[:, None], float("-inf"), ranking), axis=1)
        is_open = groups < 0
        for _ in tl.static_range(NUM_CHOSEN_GROUPS):
            group = tl.min(tl.where(best == tl.max(best, axis=0), groups, BLOCK_GROUPS), axis=0)
            is_open = is_open | (groups == group)
            best = tl.where(groups == group, float("-inf"), best)
        ranking = tl.where(is_open[:, None], ranking, float("-inf"))

    places = tl.arange(0, BLOCK_CHOSEN)
    chosen = tl.zeros([BLOCK_CHOSEN], dtype=tl.int32)
    weights = tl.zeros([BLOCK_CHOSEN], dtype=tl.float32)
    for place in tl.static_range(NUM_CHOSEN):
        top = tl.max(tl.max(ranking, axis=1), axis=0)
        number = tl.min(tl.min(tl.where(ranking == top, numbers, NUM_EXPERTS), axis=1), axis=0)
        # What is not a number equals nothing: some expert has to do.
        number = tl.minimum(number, NUM_EXPERTS - 1)
        score = tl.sum(tl.sum(tl.where(numbers == number, scores, 0.0), axis=1), axis=0)
        chosen = tl.where(places == place, number, chosen)
        weights = tl.where(places == place, score, weights)
        ranking = tl.where(numbers == number, float("-inf"), ranking)
    if RENORMALIZE:
        weights = weights / (tl.sum(weights, axis=0) + sum_eps)
    at = token * NUM_CHOSEN + places
    tl.store(weights_ptr + at, weights * scale, mask=places < NUM_CHOSEN)
    tl.store(experts_ptr + at, chosen, mask=places < NUM_CHOSEN)


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
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights float32 and experts int32, [num_tokens, num_chosen] each.

    Raises:
        ValueError: counts that do not fit together, or columns that are not contiguous.
    """
    num_tokens, num_experts = logits.shape
    if num_experts % num_groups or num_chosen > num_experts // num_groups * min(num_chosen_groups, num_groups):
        raise ValueError(
            f"choose_experts: {num_chosen} of {num_experts} experts cannot be chosen from {num_chosen_groups} of "
            f"{num_groups} groups"
        )
    if logits.stride(1) != 1 or (correction is not None and correction.shape != (num_experts,)):
        raise ValueError("choose_experts: logits need contiguous columns, and the correction a value for every expert")
    weights = torch.empty((num_tokens, num_chosen), dtype=torch.float32, device=logits.device)
    experts = torch.empty((num_tokens, num_chosen), dtype=torch.int32, device=logits.device)
    if num_tokens == 0:
        return weights, experts
    _choose_kernel[(num_tokens,)](
        logits,
        weights if correction is None else correction,
        weights,
        experts,
        scale,
        sum_eps,
        logits.stride(0),
        NUM_EXPERTS=num_experts,
        NUM_CHOSEN=num_chosen,
        SIGMOID=sigmoid,
        RENORMALIZE=renormalize,
        HAS_CORRECTION=correction is not None,
        NUM_GROUPS=num_groups,
        NUM_CHOSEN_GROUPS=num_chosen_groups,
        TOP_TWO=top_two,
        BLOCK_GROUPS=triton.next_power_of_2(num_groups),
        BLOCK_MEMBERS=triton.next_power_of_2(num_experts // num_groups),
        BLOCK_CHOSEN=triton.next_power_of_2(num_chosen),
        USE_PDL=pdl,
        num_warps=1,
        **launch_options(pdl),
    )
    return weights, experts
