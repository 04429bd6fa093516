"""Rope whose frequencies transformers chooses by the longest sequence of a step, chosen once a server instead.

A row must not depend on its neighbours, and cached keys are rotated already. `dynamic` stretches nothing within
`max_position_embeddings`, which no sequence exceeds here. Of longrope's two lists of factors the one for the longest
sequence that is served is taken for all, as in `layers/rope.py`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

STEP_DEPENDENT = ("dynamic", "longrope")


def settle_rope(model: torch.nn.Module, max_position: int) -> None:
    """Have every rotary embedding in `model` rotate by the same frequencies in every step.

    Args:
        max_position: tokens of the longest sequence.
    """
    modules: list[Any] = list(model.modules())
    for module in modules:
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str) and kinds in STEP_DEPENDENT:
            _settle(module, kinds, None, max_position)
            module.rope_type = "default"
        elif isinstance(kinds, dict):
            for layer_type, kind in kinds.items():
                if kind in STEP_DEPENDENT:
                    _settle(module, kind, layer_type, max_position)
            module.rope_type = {
                layer_type: "default" if kind in STEP_DEPENDENT else kind for layer_type, kind in kinds.items()
            }


def _settle(module: Any, kind: str, layer_type: str | None, max_position: int) -> None:
    if kind == "dynamic":
        return
    parameters = module.config.rope_parameters if layer_type is None else module.config.rope_parameters[layer_type]
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
    device = getattr(module, name).device
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](
        module.config, device, seq_len=max_position, **({} if layer_type is None else {"layer_type": layer_type})
    )
    module.register_buffer(name, frequencies, persistent=False)
    if "short_mscale" in parameters:
        _settle_phimoe(module, parameters, frequencies, max_position)
    else:
        setattr(module, "attention_scaling" if layer_type is None else f"{layer_type}_attention_scaling", factor)


def _settle_phimoe(module: Any, parameters: Any, frequencies: torch.Tensor, max_position: int) -> None:
    """Phi-3.5-MoE makes its frequencies in every step, in transformers 5.23 of the short factors alone; the model was
    trained with the long ones beyond its original context."""
    is_long = max_position > parameters["original_max_position_embeddings"]
    factor = parameters["long_mscale" if is_long else "short_mscale"]
    module.config = copy.copy(module.config)  # the model's own still says longrope
    module.config.rope_parameters = dict(parameters) | {"rope_type": "default"}
    module.rope_init_fn = lambda config: (module.inv_freq, factor)
