"""The torch twin of what `packed_wgmma.py` makes of a packed weight before it multiplies."""

from __future__ import annotations

import dataclasses

import torch

from stepwire_kernels.packed_weight import OUTER_GROUP, PackedWeight, unpack


def rounded(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """W [N, K] in float64 holding numbers of `dtype`, but for row scales, which are applied to sums.

    Of scales and minima, numbers of `dtype` are used; their product with a code less its zero is rounded once.
    """
    inputs = torch.arange(weight.num_inputs, device=weight.words.device)
    groups, outer = inputs // weight.group_size, inputs // OUTER_GROUP

    def as_dtype(values: torch.Tensor) -> torch.Tensor:
        return values.to(dtype).double()

    codes = unpack(
        dataclasses.replace(
            weight,
            scales=torch.ones_like(weight.scales, dtype=torch.float32),
            exponents=False,
            minima=None,
            outer_scales=None,
            outer_minima=None,
            row_scales=None,
        )
    )  # code - offset - zero, or the e2m1 numbers
    scales = torch.exp2(weight.scales.double() - 127) if weight.exponents else weight.scales.double()
    scales = scales[groups]
    if weight.outer_scales is not None:
        scales = scales * weight.outer_scales.double()[outer]
    values = codes * as_dtype(scales.float()).T
    if weight.minima is not None:
        minima = weight.minima.double()[groups]
        if weight.outer_minima is not None:
            minima = minima * weight.outer_minima.double()[outer]
        values = values - as_dtype(minima.float()).T
    dense = as_dtype(values)
    return dense if weight.row_scales is None else dense * weight.row_scales.double()[:, None]
