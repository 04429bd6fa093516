"""Checkpoints as a tool exported them, held against the weights that the tool itself unpacks from them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

TOKENS = list(range(3, 43))


def reference_logits(exported: Path, unpacked: dict[str, torch.Tensor], directory: Path) -> torch.Tensor:
    """Of transformers, for TOKENS, with `unpacked` in place of the packed weights; `directory` is written to."""
    stored = load_file(exported / "model.safetensors")
    plain = {
        name: tensor.float() for name, tensor in stored.items() if name.endswith(".weight") and name not in unpacked
    }
    unpacked = {name: tensor.float() for name, tensor in unpacked.items()}
    save_file(plain | unpacked, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((exported / "config.json").read_text())
    del config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config))
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits: torch.Tensor = reference(torch.tensor([TOKENS])).logits[0]
    return logits


def assert_same_tokens(ours: torch.Tensor, expected: torch.Tensor, *, least_cosine: float) -> None:
    """Where only our inputs are rounded to 8 bits: near ties may fall either way."""
    best = expected.topk(2).values
    clear = best[:, 0] - best[:, 1] > 0.1 * expected.abs().max()
    assert clear.sum() >= 5
    assert torch.equal(ours.argmax(-1)[clear], expected.argmax(-1)[clear])
    assert torch.nn.functional.cosine_similarity(ours, expected, dim=-1).min() > least_cosine
