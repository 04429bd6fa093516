"""Mixtures of experts and latent attention on the CUDA runner against the CPU runner.

Every router, both roads of the experts, and compressed keys and values in steps of prefills and decodes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v32 import DeepseekV32Config
from transformers.models.gpt_oss import GptOssConfig
from transformers.models.granitemoeshared import GraniteMoeSharedConfig
from transformers.models.mixtral import MixtralConfig
from transformers.models.qwen2_moe import Qwen2MoeConfig
from transformers.models.qwen3_moe import Qwen3MoeConfig

from load_tests.cpu_worker.step_driver import StepDriver, greedy
from tests.unit.gpu_worker.cuda.inline_runner import load_inline
from tests.unit.gpu_worker.cuda.test_runner import VOCAB_SIZE, assert_same, on_cpu, prompt

BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "experts_implementation": "eager",
}
EIGHT = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
LATENT = {
    "num_key_value_heads": 2,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
}
KINDS: dict[str, Any] = {
    "mixtral": lambda: MixtralConfig(**BASE, num_local_experts=4, num_experts_per_tok=2),
    "qwen2-moe": lambda: Qwen2MoeConfig(**BASE | {"hidden_size": 128}, **EIGHT, shared_expert_intermediate_size=24),
    "qwen3-moe": lambda: Qwen3MoeConfig(**BASE, **EIGHT, norm_topk_prob=True),
    "gpt-oss": lambda: GptOssConfig(**BASE, num_local_experts=4, num_experts_per_tok=2, sliding_window=11),
    # All of a layer's experts in one tensor, and a multiplier at every joint.
    "granite-moe": lambda: GraniteMoeSharedConfig(
        **BASE,
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=24,
        embedding_multiplier=2.0,
        residual_multiplier=0.5,
        attention_multiplier=0.2,
        logits_scaling=0.7,
    ),
    "deepseek-v2": lambda: DeepseekV2Config(
        **BASE | LATENT, topk_method="group_limited_greedy", q_lora_rank=None, n_shared_experts=2
    ),
    "deepseek-v3": lambda: DeepseekV3Config(**BASE | LATENT, q_lora_rank=32),
    # No sequence is so long that something would be left out.
    "deepseek-v3.2": lambda: DeepseekV32Config(**BASE | LATENT, q_lora_rank=32, index_topk=96, index_head_dim=24),
}


def save_mixture(directory: Path, kind: str) -> None:
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(KINDS[kind](), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or parameter.std() == 0:  # biases, norms and sinks start at constants
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.2)
    model.save_pretrained(directory)


@pytest.mark.parametrize(
    "kind",
    [kind if kind == "deepseek-v3" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS],
)
def test_prefills_and_decodes_give_the_same_tokens(tmp_path: Path, kind: str) -> None:
    save_mixture(tmp_path, kind)
    ours, theirs = StepDriver(load_inline(tmp_path)), on_cpu(tmp_path)
    for driver in (ours, theirs):
        driver.add(0, prompt(1, 17), greedy(num_logprobs=0))
        driver.add(2, prompt(2, 1), greedy(num_logprobs=0))
    steps: list[dict[int, int] | None] = [{0: 14}, {0: 3, 2: 1}, None, {2: 1}]
    for runs in steps:
        results = [driver.step(runs) for driver in (ours, theirs)]
        assert_same(*results)
        logprobs = [result.logprobs for result in results]
        if logprobs[0] is not None and logprobs[1] is not None:
            assert abs(logprobs[0] - logprobs[1]).max() < 1e-3
    assert [row.tokens for row in ours.rows.values()] == [row.tokens for row in theirs.rows.values()]
