"""config.json from GGUF metadata, read back by transformers' config classes and its rope code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpu_worker.loading.gguf_config import build_config
from gpu_worker.loading.gguf_reader import GgufReader
from gpu_worker.loading.tensor_source import CheckpointError
from tests.unit.gpu_worker.loading.synthetic_gguf import ARCHITECTURES, HEAD_DIM, write_gguf


def _config(tmp_path: Path, architecture: str = "llama", **options: Any) -> dict[str, Any]:
    write_gguf(tmp_path / "m.gguf", architecture, **options)
    with GgufReader(tmp_path / "m.gguf") as reader:
        return build_config(reader, "bfloat16")


def _read_by_transformers(tmp_path: Path, config: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    (tmp_path / "config.json").write_text(json.dumps(config))
    return AutoConfig.from_pretrained(tmp_path)


def test_smollm2(smollm2_gguf: Path) -> None:
    with GgufReader(smollm2_gguf) as reader:
        config = build_config(reader, "bfloat16")
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pad_token_id": 2,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 49152,
    }
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_the_class_it_names_has_the_tensors_of_the_file(tmp_path: Path, architecture: str) -> None:
    from transformers import AutoModelForCausalLM

    config = _config(tmp_path, architecture, tied=architecture.startswith("gemma"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_read_by_transformers(tmp_path, config))
    assert type(model).__name__ == config["architectures"][0]
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del shapes["lm_head.weight"]
    with GgufReader(tmp_path / "m.gguf") as reader:
        assert {info.name: info.shape for info in reader.names()} == shapes


def _inverse_frequencies(config: Any) -> torch.Tensor:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(config).inv_freq


def test_llama3_rope_parameters_are_found_from_the_factors_of_the_file(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain = LlamaConfig(head_dim=64, rope_theta=500000.0)
    scaled = LlamaConfig(head_dim=64, rope_theta=500000.0, rope_scaling=dict(scaling), max_position_embeddings=131072)
    factors = (_inverse_frequencies(plain) / _inverse_frequencies(scaled)).numpy().astype(np.float32)
    options = {
        "keys": {"rope.freq_base": 500000.0, "attention.key_length": 64, "rope.dimension_count": 64},
        "extra_tensors": {"rope_freqs.weight": factors},
    }
    config = _config(tmp_path, **options)
    assert config["rope_scaling"] == scaling
    assert torch.equal(
        _inverse_frequencies(_read_by_transformers(tmp_path, config | {"max_position_embeddings": 131072})),
        _inverse_frequencies(scaled),
    )
    options["extra_tensors"] = {"rope_freqs.weight": factors * np.linspace(1, 1.1, 32, dtype=np.float32)}
    with pytest.raises(CheckpointError, match=r"rope_freqs.weight.*does not hold the factors of Llama 3"):
        _config(tmp_path, **options)


def test_gemma3_pattern_and_its_two_rope_bases(tmp_path: Path) -> None:
    config = _config(tmp_path, "gemma3", layers=13, keys={"rope.freq_base": 1000000.0}, tied=True)
    read = _read_by_transformers(tmp_path, config)
    assert [layer for layer, kind in enumerate(read.layer_types) if kind == "full_attention"] == [5, 11]
    assert read.rope_parameters["full_attention"]["rope_theta"] == 1_000_000
    assert read.rope_parameters["sliding_attention"]["rope_theta"] == 10_000
    assert read.sliding_window == 32
    assert read.query_pre_attn_scalar == HEAD_DIM
    assert read.hidden_activation == "gelu_pytorch_tanh"


def test_gemma2_caps_windows_and_scale(tmp_path: Path) -> None:
    read = _read_by_transformers(tmp_path, _config(tmp_path, "gemma2", tied=True))
    assert (read.attn_logit_softcapping, read.final_logit_softcapping) == (50.0, 30.0)
    assert read.layer_types == ["sliding_attention", "full_attention"]
    assert read.query_pre_attn_scalar == HEAD_DIM


def test_phi3_long_rope_factors_come_from_tensors(tmp_path: Path) -> None:
    short = np.linspace(1, 1.5, HEAD_DIM // 2, dtype=np.float32)
    long = np.linspace(1, 40, HEAD_DIM // 2, dtype=np.float32)
    config = _config(
        tmp_path,
        "phi3",
        keys={"rope.scaling.original_context_length": 32, "attention.sliding_window": 100},
        extra_tensors={"rope_factors_short.weight": short, "rope_factors_long.weight": long},
    )
    read = _read_by_transformers(tmp_path, config)
    assert np.array_equal(np.float32(read.rope_parameters["short_factor"]), short)
    assert np.array_equal(np.float32(read.rope_parameters["long_factor"]), long)
    assert read.original_max_position_embeddings == 32
    assert read.sliding_window == 100


def test_linear_and_yarn_scaling(tmp_path: Path) -> None:
    linear = _config(tmp_path, keys={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    assert linear["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}
    assert _config(tmp_path, "qwen2", keys=yarn)["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"block_count": None}, r"lacks the metadata key 'llama.block_count'"),
        ({"feed_forward_length": [96, 48]}, r"'llama.feed_forward_length' is \[96, 48\] and not of the kind int"),
        ({"rope.scaling.type": "spiral"}, r"unknown kind 'spiral'"),
        ({"rope.dimension_count": 8}, r"rotates 8 of 16 dimensions"),
        ({"embedding_length": 32}, r"tensor 'token_embd.weight': has rows of 64, the metadata says 32"),
    ],
)
def test_metadata_that_does_not_do_is_named(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        _config(tmp_path, keys=keys)


def test_a_file_without_an_embedding(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tensor 'token_embd.weight': is missing"):
        _config(tmp_path, left_out=("token_embd.weight",))
