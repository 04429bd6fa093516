"""The bare config.json files have the published hyper-parameters: they must add up to the published size."""

from __future__ import annotations

import json

import pytest

from load_tests.stack import SHAPES_DIRECTORY

# From the models' cards, in billions; Qwen3-30B-A3B also says how many of them a token uses.
PUBLISHED = {
    "llama-3.1-8b": 8.03,
    "llama-3.1-8b-awq": 8.03,
    "llama-3.2-1b": 1.236,
    "qwen3-0.6b": 0.596,
    "qwen3-30b-a3b": 30.53,
}


def num_parameters(config: dict[str, int]) -> int:
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    num_q, num_kv = config["num_attention_heads"], config["num_key_value_heads"]
    attention = hidden * head_dim * (2 * num_q + 2 * num_kv)
    if config["model_type"].startswith("qwen3"):  # type: ignore[attr-defined]
        attention += 2 * head_dim  # norms of queries and keys
    if "num_experts" in config:
        mlp = config["num_experts"] * (3 * hidden * config["moe_intermediate_size"] + hidden)
    else:
        mlp = 3 * hidden * config["intermediate_size"]
    embeddings = (1 if config["tie_word_embeddings"] else 2) * config["vocab_size"] * hidden
    return config["num_hidden_layers"] * (attention + mlp + 2 * hidden) + hidden + embeddings


@pytest.mark.parametrize("shape", sorted(PUBLISHED))
def test_parameters_add_up(shape: str) -> None:
    config = json.loads((SHAPES_DIRECTORY / shape / "config.json").read_text())
    assert num_parameters(config) / 1e9 == pytest.approx(PUBLISHED[shape], rel=0.002)


def test_every_shape_is_checked() -> None:
    assert {path.name for path in SHAPES_DIRECTORY.iterdir()} == set(PUBLISHED)
