"""Every architecture through the CUDA kernels: transformers' numbers in float32, and as near as its own in bfloat16.

Checkpoints are those of the CPU's suite (`tests/unit/gpu_worker/models/tiny_checkpoints.py`) with heads and experts of
sizes that the kernels take.
"""

from __future__ import annotations

from collections import defaultdict
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpu_worker.config import WorkerSettings
from gpu_worker.cuda.loading import load_cuda_runner
from gpu_worker.runner import TorchRunner
from load_tests.cpu_worker.step_driver import StepDriver, greedy
from tests.gpu.test_cuda_runner import load
from tests.unit.gpu_worker.models.tiny_checkpoints import TINY, save_tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# What differs in config.json's field names alone, the CPU's suite holds.
FAMILIES = [name for name in TINY if not name.endswith("-v4-config")]
NUM_LOGPROBS = 20
VOCAB_SIZE = 301
Distributions = dict[int, list[tuple[np.ndarray, np.ndarray]]]


def sizes(name: str) -> dict[str, Any]:
    """What is larger than in the CPU's suite."""
    fields = TINY[name].fields
    if "kv_lora_rank" in fields:
        return {
            "hidden_size": 384,
            "initializer_range": 0.06,
            "kv_lora_rank": 128,
            "q_lora_rank": fields["q_lora_rank"] and 64,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
            "moe_intermediate_size": 64,
            # The kernels attend to everything, which is what an indexer leaves of no more than so many tokens.
            **({"index_topk": 256, "index_head_dim": 64} if "index_topk" in fields else {}),
        }
    heads = fields.get("num_attention_heads", 6)
    changes: dict[str, Any] = {"hidden_size": 64 * heads, "intermediate_size": 192}
    # Sums over so many more inputs are as large as there.
    changes["initializer_range"] = fields.get("initializer_range", 0.15) / 2.5
    if "head_dim" in fields:
        changes["head_dim"] = 64
    if "global_head_dim" in fields:
        # Heads of all layers alike where the CPU's suite has them so, and else the largest that the kernels take.
        changes["global_head_dim"] = 64 if fields["global_head_dim"] == fields["head_dim"] else 512
    for field in ("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"):
        if field in fields:
            changes[field] = 64
    parameters = fields.get("rope_parameters", {})
    if "short_factor" in parameters:
        num_factors = int(32 * parameters.get("partial_rotary_factor", 1.0))
        factors = {
            f"{kind}_factor": [1.0 + 0.05 * index * weight for index in range(num_factors)]
            for kind, weight in (("short", 1), ("long", 2))
        }
        changes["rope_parameters"] = parameters | factors
    return changes


def saved(name: str, directory: Path) -> Any:
    """transformers' model on the GPU."""
    reference = save_tiny(name, directory, **sizes(name)).to("cuda")
    rope = getattr(reference.config, "rope_parameters", None) or {}
    if "rotary_dim" in TINY[name].fields and "partial_rotary_factor" not in rope:
        pytest.skip("this version of transformers takes no notice of rotary_dim")
    return reference


def run_rows(runner: Any) -> tuple[Distributions, StepDriver]:
    """Prompts at once, in pieces and beside decodes, then decodes; what each row's tokens were drawn from."""
    driver, seen = StepDriver(runner), defaultdict(list)

    def step(runs: dict[int, int] | None = None) -> None:
        result = driver.step(runs)
        assert not result.faults
        assert result.top_token_ids is not None and result.top_logprobs is not None
        for index, row in enumerate(result.rows.tolist()):
            seen[row].append((result.top_token_ids[index].astype(np.int64), result.top_logprobs[index]))

    def prompt(seed: int, length: int) -> list[int]:
        return [int(token) for token in np.random.default_rng(seed).integers(3, VOCAB_SIZE, length)]

    driver.add(0, prompt(1, 40), greedy(num_logprobs=NUM_LOGPROBS))
    step()
    driver.add(3, prompt(2, 100), greedy(num_logprobs=NUM_LOGPROBS))
    for length in (13, 1, 50, 36):
        step({0: 1, 3: length})
    driver.add(1, prompt(3, 1), greedy(num_logprobs=NUM_LOGPROBS))
    for _ in range(16):
        step()
    return seen, driver


def errors(reference: Any, seen: Distributions, driver: StepDriver) -> tuple[float, float]:
    """Largest and mean difference of log-probabilities, over all rows, positions and their likeliest tokens."""
    differences = []
    for row, drawn in seen.items():
        tokens = driver.rows[row].tokens
        expected = log_probabilities(reference, tokens)[len(tokens) - len(drawn) - 1 : -1]
        for (ids, ours), theirs in zip(drawn, expected, strict=True):
            differences.append(np.abs(ours - theirs[ids].numpy()))
    return float(np.max(differences)), float(np.mean(differences))


@torch.inference_mode()
def log_probabilities(model: Any, tokens: list[int]) -> torch.Tensor:
    """[num_tokens, vocabulary], computed where the model lies."""
    logits = model(torch.tensor([tokens], device=model.device)).logits[0].float()
    return torch.log_softmax(logits, -1).cpu()


@pytest.mark.parametrize("name", FAMILIES)
def test_float32_log_probabilities_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    reference = saved(name, tmp_path)
    largest, _ = errors(reference, *run_rows(load(tmp_path, max_model_len=256)))
    assert largest <= 2e-3


@pytest.mark.parametrize("name", ["deepseek-v3.2", "glm5-shared-choices"])
def test_what_an_indexer_chooses_is_attended_to_in_plain_torch(name: str, tmp_path: Path) -> None:
    reference = save_tiny(name, tmp_path, pad_token_id=None).to("cuda")
    settings = WorkerSettings(
        model=tmp_path,
        device="cuda",
        dtype="float32",
        max_num_seqs=12,
        max_model_len=256,
        max_num_batched_tokens=512,
        gpu_memory_utilization=0.05,
    )
    runner = load_cuda_runner(settings, torch.device("cuda", 0))
    assert isinstance(runner, TorchRunner)
    largest, _ = errors(reference, *run_rows(runner))
    assert largest <= 2e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_is_as_near_to_float32_as_transformers_is(name: str, tmp_path: Path) -> None:
    reference = saved(name, tmp_path)
    seen, driver = run_rows(load(tmp_path, max_model_len=256, dtype="bfloat16"))
    _, ours = errors(reference, seen, driver)
    rounded = deepcopy(reference).to(torch.bfloat16)
    theirs = np.mean(
        [
            (log_probabilities(rounded, row.tokens) - log_probabilities(reference, row.tokens)).abs().mean().item()
            for row in driver.rows.values()
        ]
    )
    assert ours <= 2 * theirs + 0.01, f"ours {ours:.4f}, transformers in bfloat16 {theirs:.4f}"
