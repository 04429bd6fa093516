"""Frequencies against transformers' own, and the rotation against complex multiplication."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama import LlamaConfig

from gpu_worker.layers.rope import RotaryTables, attention_factor, inverse_frequencies
from gpu_worker.model_spec import RopeSpec
from gpu_worker.models.hf_config import HfConfig


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
        {
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 1024,
            "beta_fast": 24.0,
            "beta_slow": 2.0,
            "truncate": False,
            "attention_factor": 1.25,
        },
    ],
    ids=lambda p: f"{p['rope_type']}-{p['factor']}",
)
@pytest.mark.parametrize("share", [1.0, 0.75])
def test_frequencies_equal_transformers(parameters: dict[str, Any], share: float) -> None:
    parameters = {"rope_theta": 250000.0, "partial_rotary_factor": share} | parameters
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=parameters)
    expected, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"))
    rope = HfConfig({"rope_parameters": parameters}).rope(128, rotates_partly=True)
    assert rope.rotary_dim == int(128 * share)
    torch.testing.assert_close(inverse_frequencies(rope), expected, rtol=1e-6, atol=0)
    assert attention_factor(rope) == pytest.approx(factor)


def test_the_default_theta_of_both_dialects() -> None:
    assert HfConfig({"rope_theta": 100000}).rope(64).theta == 100000
    assert (
        HfConfig({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rope_theta": 1}).rope(64).theta
        == 500
    )
    assert HfConfig({}).rope(64).theta == 10000


@pytest.mark.parametrize("rotary_dim", [16, 12])
def test_rotation_is_multiplication_by_a_phase(rotary_dim: int) -> None:
    rope = RopeSpec(theta=100.0, rotary_dim=rotary_dim)
    positions = torch.tensor([0, 3, 17, 99])
    x = torch.randn(4, 5, 16)
    half = rotary_dim // 2
    phase = torch.polar(torch.ones(4, half), positions[:, None] * inverse_frequencies(rope))
    turned = torch.complex(x[..., :half], x[..., half:rotary_dim]) * phase[:, None]
    expected = torch.cat((turned.real, turned.imag, x[..., rotary_dim:]), -1)
    rotation = RotaryTables.build(rope, 100, torch.device("cpu")).gather(positions, torch.float32)
    torch.testing.assert_close(rotation.apply(x.clone()), expected, atol=1e-5, rtol=1e-5)
