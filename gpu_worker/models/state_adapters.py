"""Layers of transformers' models that keep their state within themselves: here they find it in the cache of a row.

RecurrentGemma's recurrent blocks (Griffin, https://arxiv.org/abs/2402.19427). The weights and the recurrence are the
modules' own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def adapt_states(model: Any) -> None:
    """Make such layers of `model` take a cache, those that are known here."""
    for number, layer in enumerate(getattr(model.get_decoder(), "layers", ())):
        block = getattr(layer, "temporal_block", None)
        if type(block).__name__ == "RecurrentGemmaRecurrentBlock":
            _adapt_griffin(block, number)


def _adapt_griffin(block: Any, layer: int) -> None:
    """transformers' own block pads several tokens with zeros whatever came before; this one goes on from it."""
    width = block.conv1d_width - 1

    def forward(hidden_states: torch.Tensor, past_key_values: Any = None, **kwargs: Any) -> tuple[torch.Tensor, None]:
        gate = block.act_fn(block.linear_y(hidden_states))
        mixed = block.linear_x(hidden_states).transpose(1, 2)  # [1, lru_width, num_tokens]
        before = None if past_key_values is None else past_key_values.get_conv_state(layer)
        mixed = F.pad(mixed, (width, 0)) if before is None else torch.cat((before, mixed), dim=-1)
        block.rg_lru.recurrent_states = None if before is None else past_key_values.get_recurrent_state(layer)
        if past_key_values is not None:
            past_key_values.update_conv_state(mixed[..., -width:], layer)
        mixed = F.conv1d(mixed, block.conv_1d.weight, block.conv_1d.bias, groups=block.conv_1d.groups)
        # The recurrence asks of positions whether they are 0, where it begins.
        positions = torch.ones(1, hidden_states.shape[1], dtype=torch.int64, device=mixed.device)
        if before is None:
            positions[:, 0] = 0
        mixed = block.rg_lru(mixed.transpose(1, 2), positions)
        if past_key_values is not None:
            past_key_values.update_recurrent_state(block.rg_lru.recurrent_states, layer)
        block.rg_lru.recurrent_states = None
        return block.linear_out(mixed * gate), None

    block.forward = forward
