"""Random checkpoints of transformers, written as GGUF and served: values, logits and refusals.

The writer is the `gguf` package with its own names; which rows it interleaves and which keys it writes is
llama.cpp's converter (`conversion/` of https://github.com/ggml-org/llama.cpp).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind

from gpu_worker.loading.gguf_names import ARCHITECTURES
from gpu_worker.loading.gguf_reader import GgufReader
from gpu_worker.loading.tensor_source import CheckpointError
from gpu_worker.prepare.preparation import prepare
from gpu_worker.prepare.progress import SilentProgress
from tests.unit.gpu_worker.loading.checkpoint_as_gguf import write_checkpoint
from tests.unit.gpu_worker.loading.synthetic_gguf import ARCHITECTURES as SYNTHETIC
from tests.unit.gpu_worker.loading.synthetic_gguf import MIXTURES
from tests.unit.gpu_worker.quant.paged_model import QuantizedModel

TOKENS = list(range(3, 33))
# Four layers: in SmolLM3, OLMo 3 and Cohere 2 the fourth is the other kind.
SIZES = {
    "vocab_size": 40,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
HEAD_DIM, WINDOW, THETA = 64, 11, 50000.0
RMS = {"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": THETA}
LAYER = {"attention.layer_norm_epsilon": 1e-5, "rope.freq_base": THETA}
ROTATED = {"rope.dimension_count": HEAD_DIM}
YARN_KEYS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 16,
    "rope.scaling.yarn_beta_fast": 24.0,
    "rope.scaling.yarn_beta_slow": 2.0,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 24.0,
    "beta_slow": 2.0,
    "rope_theta": THETA,
}
PLAIN = {"rope_type": "default", "rope_theta": THETA}


@dataclass(frozen=True)
class Family:
    """One model: its config in transformers beside SIZES, and the keys that llama.cpp's converter writes for it."""

    architecture: str
    config: Callable[..., Any]
    fields: Mapping[str, Any]
    keys: Mapping[str, Any]
    mlp: tuple[str, str] = field(default=("up_proj.weight", "down_proj.weight"))


FAMILIES = {
    "smollm3": Family(
        "smollm3", transformers.SmolLM3Config, {"rope_parameters": PLAIN, "rms_norm_eps": 1e-5}, RMS | ROTATED
    ),
    "granite": Family(
        "granite",
        transformers.GraniteConfig,
        {
            "rope_parameters": PLAIN,
            "rms_norm_eps": 1e-5,
            "attention_multiplier": 0.1,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.25,
            "logits_scaling": 5.0,
            "tie_word_embeddings": True,
        },
        RMS
        | ROTATED
        | {
            "attention.scale": 0.1,
            "embedding_scale": 3.0,
            "residual_scale": 0.25,
            "logit_scale": 5.0,
            "vocab_size": 40,
        },
    ),
    "granite-biased": Family(
        "granite",
        transformers.GraniteConfig,
        {
            "rope_parameters": PLAIN,
            "rms_norm_eps": 1e-5,
            "attention_bias": True,
            "mlp_bias": True,
            "attention_multiplier": HEAD_DIM**-0.5,
        },
        RMS | ROTATED | {"logit_scale": 1.0},
    ),
    "olmo2": Family("olmo2", transformers.Olmo2Config, {"rope_parameters": PLAIN, "rms_norm_eps": 1e-5}, RMS),
    "olmo3": Family(
        "olmo2",
        transformers.Olmo3Config,
        {
            "rope_parameters": {"full_attention": YARN | {"attention_factor": 1.2}, "sliding_attention": PLAIN},
            "rms_norm_eps": 1e-5,
            "sliding_window": WINDOW,
        },
        RMS
        | YARN_KEYS
        | {
            "rope.scaling.attn_factor": 1.2,
            "attention.sliding_window": WINDOW,
            "attention.sliding_window_pattern": [True, True, True, False],
        },
    ),
    "ministral3": Family(
        "mistral3",
        transformers.Ministral3Config,
        {
            "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
            "head_dim": HEAD_DIM,
        },
        RMS
        | ROTATED
        | YARN_KEYS
        | {
            "attention.key_length": HEAD_DIM,
            "attention.value_length": HEAD_DIM,
            "rope.scaling.yarn_log_multiplier": 1.0,
            "attention.temperature_scale": 0.1,
        },
    ),
    "mistral-small": Family(
        "mistral3",
        transformers.MistralConfig,
        {"rope_parameters": PLAIN, "rms_norm_eps": 1e-5, "head_dim": 32, "sliding_window": None},
        RMS | {"attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": 32},
    ),
    "command-r": Family(
        "command-r",
        transformers.CohereConfig,
        {"rope_parameters": PLAIN, "logit_scale": 0.5},
        LAYER | {"logit_scale": 0.5, "rope.scaling.type": "none"},
    ),
    "command-r-plus": Family(
        "command-r",
        transformers.CohereConfig,
        {"rope_parameters": PLAIN, "logit_scale": 0.5, "use_qk_norm": True},
        LAYER | {"logit_scale": 0.5, "rope.scaling.type": "none"},
    ),
    "cohere2": Family(
        "cohere2",
        transformers.Cohere2Config,
        {"rope_parameters": PLAIN, "logit_scale": 0.5, "sliding_window": WINDOW},
        LAYER
        | ROTATED
        | {"logit_scale": 0.5, "attention.sliding_window": WINDOW, "rope.scaling.type": "none", "vocab_size": 40},
    ),
    "starcoder2": Family(
        "starcoder2",
        transformers.Starcoder2Config,
        {"rope_parameters": PLAIN, "tie_word_embeddings": True, "sliding_window": 4096},
        LAYER,
        ("c_fc.weight", "c_proj.weight"),
    ),
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": THETA,
}
FAMILIES |= {
    "seed_oss": Family(
        "seed_oss",
        transformers.SeedOssConfig,
        {"rope_parameters": PLAIN, "rms_norm_eps": 1e-5, "head_dim": HEAD_DIM},
        RMS | {"attention.key_length": HEAD_DIM, "attention.value_length": HEAD_DIM},
    ),
    "ernie4_5": Family(
        "ernie4_5",
        transformers.Ernie4_5Config,
        {"rope_parameters": PLAIN, "rms_norm_eps": 1e-5, "head_dim": 32},
        RMS | {"attention.key_length": 32, "attention.value_length": 32},
    ),
    "glm4": Family(
        "glm4",
        transformers.Glm4Config,
        {"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}, "rms_norm_eps": 1e-5, "head_dim": HEAD_DIM},
        RMS
        | {
            "attention.key_length": HEAD_DIM,
            "attention.value_length": HEAD_DIM,
            "rope.dimension_count": HEAD_DIM // 2,
        },
        ("mlp.gate_up_proj.weight", "down_proj.weight"),
    ),
    "exaone4": Family(
        "exaone4",
        transformers.Exaone4Config,
        {
            "rope_parameters": PLAIN,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "layer_types": ["full_attention"] * 4,
            "tie_word_embeddings": True,
        },
        RMS,
    ),
    "exaone4-windows": Family(
        "exaone4",
        transformers.Exaone4Config,
        {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-5, "sliding_window": WINDOW},
        RMS | {"attention.sliding_window": WINDOW, "attention.sliding_window_pattern": [True, True, True, False]},
    ),
}
# Those of SYNTHETIC and MIXTURES are tested with files of their own.
TESTED = {family.architecture for family in FAMILIES.values()} | {"qwen3vl"}


def test_every_architecture_has_files_to_be_tested_with() -> None:
    assert TESTED | set(SYNTHETIC) | set(MIXTURES) - {"mixtral"} == set(ARCHITECTURES)


def _random_model(family: Family, **fields: Any) -> Any:
    """In which every number, norms and biases too, is other than what a missing tensor would leave."""
    config = family.config(**{**SIZES, **family.fields, **fields})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, values in model.named_parameters():
            is_norm = "norm" in name and name.endswith("weight")
            values.copy_(torch.randn_like(values) * (0.3 if is_norm else 0.1) + is_norm)
    return model


def _logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return torch.as_tensor(model(torch.tensor([TOKENS])).logits[0])


def _rope_factors(model: Any) -> torch.Tensor | None:
    """By what Llama 3's scaling divides the frequencies: the file has these and not the parameters."""
    if model.config.rope_parameters.get("rope_type") != "llama3":
        return None
    steps = torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM
    return torch.as_tensor(THETA**-steps / model.model.rotary_emb.inv_freq)


def _prepared(tmp_path: Path, dtype: str) -> Path:
    return prepare(tmp_path / "m.gguf", tmp_path / "cache", dtype=dtype, progress=SilentProgress()).path


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_the_checkpoint_that_was_written(tmp_path: Path, name: str) -> None:
    """Ours from the file, and those of transformers from what the file is converted to."""
    family = FAMILIES[name]
    model = _random_model(family)
    write_checkpoint(tmp_path / "m.gguf", family.architecture, model, family.keys, rope_factors=_rope_factors(model))
    expected = _logits(model)
    plain = _prepared(tmp_path, "float32")
    again = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32, attn_implementation="eager")
    assert type(again) is type(model)
    assert torch.equal(_logits(again), expected)
    for directory in (plain, _prepared(tmp_path, "packed")):
        assert (QuantizedModel(directory).logits(TOKENS) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_are_what_the_package_says_they_are(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    model = _random_model(family)
    up, down = family.mlp
    kinds = {"q_proj.weight": Kind.Q8_0, "k_proj.weight": Kind.Q4_0, up: Kind.Q4_0, down: Kind.Q8_0}
    kinds["embed_tokens.weight"] = Kind.Q8_0
    path, factors = tmp_path / "m.gguf", _rope_factors(model)
    state = write_checkpoint(path, family.architecture, model, family.keys, kinds, rope_factors=factors)
    with GgufReader(path) as reader:
        assert {info.name: info.shape for info in reader.names()} == {n: tuple(v.shape) for n, v in state.items()}
        for tensor, values in state.items():
            assert torch.equal(reader.read(tensor), values), tensor
    model.load_state_dict(state, strict=False)
    expected = _logits(model)
    for dtype in ("float32", "packed"):
        ours = QuantizedModel(_prepared(tmp_path, dtype)).logits(TOKENS)
        assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_starcoder2_is_what_transformers_itself_loads(tmp_path: Path) -> None:
    family = FAMILIES["starcoder2"]
    model = _random_model(family)
    state = write_checkpoint(tmp_path / "m.gguf", "starcoder2", model, family.keys)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    with GgufReader(tmp_path / "m.gguf") as reader:
        for name in state:
            assert torch.equal(reader.read(name), loaded.state_dict()[name]), name


def test_text_parts_of_models_that_see_compute_as_the_whole_model(tmp_path: Path) -> None:
    """Qwen3-VL with its rope of three positions and its vision tower; the file has neither."""
    text = {**SIZES, "head_dim": HEAD_DIM, "rms_norm_eps": 1e-6}
    sections = {"mrope_section": [12, 10, 10], "mrope_interleaved": True}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 256}
    config = transformers.Qwen3VLConfig(
        text_config={**text, "rope_parameters": PLAIN | sections},
        vision_config={**vision, "deepstack_visual_indexes": [0, 1]},
        tie_word_embeddings=False,
    )
    whole = transformers.Qwen3VLForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    language = _random_model(Family("qwen3vl", transformers.Qwen3Config, {**text, "rope_parameters": PLAIN}, {}))
    named = {f"model.language_{name}": values for name, values in language.state_dict().items()}
    named["lm_head.weight"] = named.pop("model.language_lm_head.weight")
    missing, unexpected = whole.load_state_dict(named, strict=False)
    assert not unexpected and all(name.startswith("model.visual.") for name in missing)
    keys = {**RMS, "attention.layer_norm_rms_epsilon": 1e-6, "attention.key_length": HEAD_DIM}
    keys |= {"rope.dimension_sections": [12, 10, 10, 0], "n_deepstack_layers": 2}
    write_checkpoint(tmp_path / "m.gguf", "qwen3vl", language, keys)
    expected = _logits(whole)
    assert (QuantizedModel(_prepared(tmp_path, "float32")).logits(TOKENS) - expected).abs().max() <= 1e-4 * (
        expected.abs().max()
    )


def test_windows_follow_the_pattern_of_the_file(tmp_path: Path) -> None:
    family = FAMILIES["cohere2"]
    model = _random_model(family)
    for pattern, full in ((None, [3]), (2, [1, 3]), ([True, False, False, True], [1, 2])):
        keys = {**family.keys, "attention.sliding_window_pattern": pattern}
        write_checkpoint(tmp_path / "m.gguf", "cohere2", model, keys)
        config = json.loads((_prepared(tmp_path, "float32") / "config.json").read_text())
        assert [at for at, kind in enumerate(config["layer_types"]) if kind == "full_attention"] == full


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("granite", {"rope.scaling.finetuned": False}, r"rotates nothing \(rope\.scaling\.finetuned\)"),
        ("granite", {"logit_scale": None}, r"lacks the metadata key 'granite\.logit_scale'"),
        ("granite", {"expert_count": 8}, r"mixture of 8 experts, which is not read from GGUF for 'granite'"),
        ("ministral3", {"expert_count": 8}, r"mixture of 8 experts, which is not read from GGUF for 'mistral3'"),
        ("cohere2", {"attention.sliding_window": None}, r"lacks the metadata key 'cohere2\.attention\.sliding_window'"),
        ("cohere2", {"attention.sliding_window_pattern": [True]}, r"has the windows \[True\] for 4 layers"),
        ("glm4", {"rope.dimension_sections": [8, 12, 12]}, r"text part of a model that sees"),
        ("cohere2", {"rope.dimension_count": 32}, r"rotates 32 of 64 dimensions"),
        ("command-r", {"attention.layer_norm_epsilon": None}, r"lacks .*'command-r\.attention\.layer_norm_epsilon'"),
    ],
)
def test_variants_that_are_not_known_are_refused(tmp_path: Path, name: str, keys: dict[str, Any], message: str) -> None:
    family = FAMILIES[name]
    write_checkpoint(tmp_path / "m.gguf", family.architecture, _random_model(family), {**family.keys, **keys})
    with pytest.raises(CheckpointError, match=message):
        _prepared(tmp_path, "float32")
