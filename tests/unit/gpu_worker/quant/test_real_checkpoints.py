"""Checkpoints that GPTQModel, AutoAWQ and llm-compressor wrote, against logits of their hand-dequantized weights.

`reference.json` beside each checkpoint: prompts, greedy tokens and log-probabilities of an independent decoder in
float32.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests.unit.gpu_worker.quant.paged_model import QuantizedModel, fixture

WEIGHT_ONLY = ("awq-g64", "gptq-g64-desc", "gptq-g32-asym-v2", "ct-w4a16-asym")
# With quantized activations a value at the edge of two steps may fall either way by the order of a sum, and then the
# token's logits move by a quantization step of that value.
WITH_ACTIVATIONS = {"ct-fp8-dynamic": 0.03, "fp8-block": 0.04, "ct-w8a8-int8-sq": 0.09}
# Log-probabilities are stored with five decimals, and two float32 programs sum in different orders.
EXACT = 2e-5
TOLERANCES = dict.fromkeys(WEIGHT_ONLY, EXACT) | WITH_ACTIVATIONS


def prompts(name: str) -> list[dict[str, Any]]:
    stored: list[dict[str, Any]] = json.loads((fixture(name) / "reference.json").read_text())["prompts"]
    return stored


@pytest.mark.parametrize("name", TOLERANCES)
def test_logprobs_and_greedy_tokens_are_those_of_the_dequantized_weights(name: str) -> None:
    tolerance = TOLERANCES[name]
    for case in prompts(name):
        prompt, generated = case["prompt_ids"], case["generated_ids"]
        logits = QuantizedModel(fixture(name)).logits([*prompt, *generated[:-1]])[len(prompt) - 1 :]
        logprobs = logits.log_softmax(-1)
        compared = 0
        for step, top in enumerate(case["top5_logprobs"]):
            ids = [token for token, _ in top]
            expected = torch.tensor([logprob for _, logprob in top])
            weight = expected.exp().clamp(min=0.05)  # what is all but impossible may be off by more
            error = ((logprobs[step, ids] - expected).abs() * weight).max().item()
            assert error <= tolerance, f"step {step}: a log-probability is off by {error}"
            if case["margin"][step] > 4 * tolerance:
                assert logprobs[step].argmax().item() == generated[step], f"step {step}"
                compared += 1
        assert compared >= 12, "too few clear decisions to prove anything"


@pytest.mark.parametrize("name", TOLERANCES)
def test_free_running_greedy_decoding_gives_the_reference_tokens(name: str) -> None:
    for case in prompts(name):
        model, tokens = QuantizedModel(fixture(name)), list(case["prompt_ids"])
        logits = model.logits(tokens)[-1]
        for expected in case["generated_ids"]:
            assert logits.argmax().item() == expected
            tokens.append(expected)
            logits = model.logits([expected], len(tokens) - 1)[-1]


@pytest.mark.parametrize("name", TOLERANCES)
def test_in_bfloat16_the_first_tokens_are_the_same(name: str) -> None:
    for case in prompts(name):
        logits = QuantizedModel(fixture(name), torch.bfloat16).logits(case["prompt_ids"])[-1].float()
        assert logits.argmax().item() == case["generated_ids"][0]
        expected = dict(case["top5_logprobs"][0])
        token = case["generated_ids"][0]
        assert logits.log_softmax(-1)[token].item() == pytest.approx(expected[token], abs=0.3)
