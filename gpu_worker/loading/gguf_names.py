"""Where each tensor of a GGUF file belongs in the Hugging Face layout of its architecture.

One table per architecture that `gpu_worker` loads from GGUF. What differs between them: whether q and k rows are
interleaved for rope (`llama` and what its converter writes too), whether norms carry their +1 (Gemma), what `ffn_norm`
means, which norms there are, and fused projections. Source: llama.cpp's converter and graphs (`conversion/`,
`src/models/` of https://github.com/ggml-org/llama.cpp) and the name maps of the `gguf` package.
A mixture's experts are one tensor in the file, and each by itself here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from gpu_worker.loading.tensor_source import CheckpointError


class RowOrder(Enum):
    """How the rows of a tensor lie in the file."""

    PLAIN = "plain"
    ROPE_PAIRS_OF_HEADS = "query heads, each with its two rope halves interleaved"
    ROPE_PAIRS_OF_KV_HEADS = "key heads, each with its two rope halves interleaved"


@dataclass(frozen=True, slots=True)
class TensorRule:
    """The Hugging Face name (with `{layer}` in a layer), and what the file did to the values."""

    hf_name: str
    """With `{expert}` where the file has all experts in one tensor."""
    row_order: RowOrder = RowOrder.PLAIN
    plus_one: bool = False
    is_bare: bool = False
    """The tensor has no `.weight` behind its name."""
    lacks_row: bool = False
    """A matrix of one row, which the file has as a vector."""


@dataclass(frozen=True, slots=True)
class GgufArchitecture:
    """One value of `general.architecture`.

    Attributes:
        model_type: `model_type` of the Hugging Face config.
        hf_class: the class name for its `architectures`.
        whole: rules for tensors outside the layers, by GGUF name without `.weight` or `.bias`.
        per_layer: rules for tensors in a layer, by the part of the GGUF name after `blk.N.`.
    """

    model_type: str
    hf_class: str
    whole: Mapping[str, TensorRule]
    per_layer: Mapping[str, TensorRule]


def _layer(name: str, *, row_order: RowOrder = RowOrder.PLAIN, plus_one: bool = False) -> TensorRule:
    return TensorRule(f"model.layers.{{layer}}.{name}", row_order, plus_one)


_WHOLE = {
    "token_embd": TensorRule("model.embed_tokens"),
    "output_norm": TensorRule("model.norm"),
    "output": TensorRule("lm_head"),
}
_ATTENTION = {
    "attn_norm": _layer("input_layernorm"),
    "attn_q": _layer("self_attn.q_proj"),
    "attn_k": _layer("self_attn.k_proj"),
    "attn_v": _layer("self_attn.v_proj"),
    "attn_output": _layer("self_attn.o_proj"),
}
_INTERLEAVED_ATTENTION = _ATTENTION | {
    "attn_q": _layer("self_attn.q_proj", row_order=RowOrder.ROPE_PAIRS_OF_HEADS),
    "attn_k": _layer("self_attn.k_proj", row_order=RowOrder.ROPE_PAIRS_OF_KV_HEADS),
}
_QK_NORMS = {
    "attn_q_norm": _layer("self_attn.q_norm"),
    "attn_k_norm": _layer("self_attn.k_norm"),
}
_GATED_MLP = {
    "ffn_norm": _layer("post_attention_layernorm"),
    "ffn_gate": _layer("mlp.gate_proj"),
    "ffn_up": _layer("mlp.up_proj"),
    "ffn_down": _layer("mlp.down_proj"),
}
# Both of the sublayers' results are normed, and nothing before them.
_POST_NORMS = {
    "post_attention_norm": _layer("post_attention_layernorm"),
    "post_ffw_norm": _layer("post_feedforward_layernorm"),
}
# One norm for the block, whose attention and MLP run side by side.
_PARALLEL_BLOCK = {name: rule for name, rule in (_ATTENTION | _GATED_MLP).items() if name != "ffn_norm"}
_OLMO2 = {name: rule for name, rule in _PARALLEL_BLOCK.items() if name != "attn_norm"} | _QK_NORMS | _POST_NORMS
_GLM4 = _ATTENTION | {
    "post_attention_norm": _layer("post_self_attn_layernorm"),
    "ffn_norm": _layer("post_attention_layernorm"),
    "ffn_up": _layer("mlp.gate_up_proj"),
    "ffn_down": _layer("mlp.down_proj"),
    "post_ffw_norm": _layer("post_mlp_layernorm"),
}
_SEED_OSS = _PARALLEL_BLOCK | {"post_attention_norm": _layer("post_attention_layernorm")}
_PLAIN_MLP = {
    "ffn_norm": _layer("post_attention_layernorm"),
    "ffn_up": _layer("mlp.c_fc"),
    "ffn_down": _layer("mlp.c_proj"),
}
_SANDWICH_NORMS = {
    "ffn_norm": _layer("pre_feedforward_layernorm"),
    "post_attention_norm": _layer("post_attention_layernorm"),
    "post_ffw_norm": _layer("post_feedforward_layernorm"),
}


_EXPERTS = {
    "ffn_norm": _layer("post_attention_layernorm"),
    "ffn_gate_inp": _layer("mlp.gate"),
    "ffn_gate_exps": _layer("mlp.experts.{{expert}}.gate_proj"),
    "ffn_up_exps": _layer("mlp.experts.{{expert}}.up_proj"),
    "ffn_down_exps": _layer("mlp.experts.{{expert}}.down_proj"),
}
_SHARED_EXPERT = {
    "ffn_gate_inp_shexp": TensorRule("model.layers.{layer}.mlp.shared_expert_gate", lacks_row=True),
    "ffn_gate_shexp": _layer("mlp.shared_expert.gate_proj"),
    "ffn_up_shexp": _layer("mlp.shared_expert.up_proj"),
    "ffn_down_shexp": _layer("mlp.shared_expert.down_proj"),
}
_DEEPSEEK = (
    {name: rule for name, rule in _ATTENTION.items() if name not in ("attn_k", "attn_v")}
    | _GATED_MLP
    | _EXPERTS
    | {
        "attn_q_a": _layer("self_attn.q_a_proj"),
        "attn_q_a_norm": _layer("self_attn.q_a_layernorm"),
        "attn_q_b": _layer("self_attn.q_b_proj"),
        "attn_kv_a_mqa": _layer("self_attn.kv_a_proj_with_mqa"),
        "attn_kv_a_norm": _layer("self_attn.kv_a_layernorm"),
        # One, or in files since the middle of 2025 two, which are joined (gguf_latent.py).
        "attn_kv_b": _layer("self_attn.kv_b_proj"),
        "attn_k_b": _layer("self_attn.k_b_proj"),
        "attn_v_b": _layer("self_attn.v_b_proj"),
        "exp_probs_b": TensorRule("model.layers.{layer}.mlp.gate.e_score_correction_bias", is_bare=True),
        "ffn_gate_shexp": _layer("mlp.shared_experts.gate_proj"),
        "ffn_up_shexp": _layer("mlp.shared_experts.up_proj"),
        "ffn_down_shexp": _layer("mlp.shared_experts.down_proj"),
    }
)
_GLM4_MOE = (
    _ATTENTION
    | _QK_NORMS
    | {
        name: rule
        for name, rule in _DEEPSEEK.items()
        if name.startswith(("ffn_", "exp_probs_b")) and name != "ffn_norm"
    }
    | {"post_attention_norm": _layer("post_attention_layernorm")}
)
_ERNIE_MOE = (
    _ATTENTION
    | {name: rule for name, rule in _DEEPSEEK.items() if name.startswith("ffn_")}
    | {
        "exp_probs_b": TensorRule(
            "model.layers.{layer}.mlp.moe_statics.e_score_correction_bias", is_bare=True, lacks_row=True
        )
    }
)
_MIXTRAL_EXPERTS = {
    "ffn_norm": _layer("post_attention_layernorm"),
    "ffn_gate_inp": _layer("block_sparse_moe.gate"),
    "ffn_gate_exps": _layer("block_sparse_moe.experts.{{expert}}.w1"),
    "ffn_up_exps": _layer("block_sparse_moe.experts.{{expert}}.w3"),
    "ffn_down_exps": _layer("block_sparse_moe.experts.{{expert}}.w2"),
}
_MINIMAX = (
    _ATTENTION
    | _QK_NORMS
    | _MIXTRAL_EXPERTS
    | {"exp_probs_b": TensorRule("model.layers.{layer}.block_sparse_moe.e_score_correction_bias", is_bare=True)}
)
_LLAMA4 = (
    _ATTENTION
    | {"ffn_norm": _GATED_MLP["ffn_norm"], "ffn_gate_inp": _layer("feed_forward.router")}
    | {
        f"ffn_{short}{end}": _layer(f"feed_forward.{of}{short}_proj")
        for short in ("gate", "up", "down")
        for end, of in (("", ""), ("_exps", "experts.{{expert}}."), ("_shexp", "shared_expert."))
    }
)
_GRANITE_MOE = _INTERLEAVED_ATTENTION | {
    "ffn_norm": _GATED_MLP["ffn_norm"],
    "ffn_gate_inp": _layer("block_sparse_moe.router"),
    **{
        f"ffn_{short}_exps": _layer(f"block_sparse_moe.experts.{{{{expert}}}}.{short}_proj")
        for short in ("gate", "up", "down")
    },
}
_GPT_OSS = _EXPERTS | {
    "post_attention_norm": _layer("post_attention_layernorm"),
    "attn_sinks": TensorRule("model.layers.{layer}.self_attn.sinks", is_bare=True),
    "ffn_gate_inp": _layer("mlp.router"),
}


GATE_AND_UP = "gate+up"
"""In a name: the file has the two below each other, and here each is a tensor of its own."""
_GEMMA4_WHOLE = _WHOLE | {
    "per_layer_token_embd": TensorRule("model.embed_tokens_per_layer"),
    "per_layer_model_proj": TensorRule("model.per_layer_model_projection"),
    "per_layer_proj_norm": TensorRule("model.per_layer_projection_norm"),
}
_GEMMA4 = (
    _ATTENTION
    | _QK_NORMS
    | _GATED_MLP
    | _SANDWICH_NORMS
    | {
        "inp_gate": _layer("per_layer_input_gate"),
        "proj": _layer("per_layer_projection"),
        "post_norm": _layer("post_per_layer_input_norm"),
        "layer_output_scale": TensorRule("model.layers.{layer}.layer_scalar", is_bare=True),
        "post_ffw_norm_1": _layer("post_feedforward_layernorm_1"),
        "pre_ffw_norm_2": _layer("pre_feedforward_layernorm_2"),
        "post_ffw_norm_2": _layer("post_feedforward_layernorm_2"),
        "ffn_gate_inp": _layer("router.proj"),
        "ffn_gate_inp.scale": TensorRule("model.layers.{layer}.router.scale", is_bare=True),
        "ffn_down_exps.scale": TensorRule("model.layers.{layer}.router.per_expert_scale", is_bare=True),
        **{
            f"ffn_{short}_exps": _layer(f"experts.{{{{expert}}}}.{whole}_proj")
            for short, whole in (("gate", "gate"), ("up", "up"), ("gate_up", GATE_AND_UP), ("down", "down"))
        },
    }
)


def _with_plus_one(rules: Mapping[str, TensorRule]) -> dict[str, TensorRule]:
    """Gemma multiplies by 1 + weight; its converter stores that sum for every norm."""
    return {
        name: TensorRule(rule.hf_name, rule.row_order, plus_one=name.endswith("_norm")) for name, rule in rules.items()
    }


_LLAMA = _INTERLEAVED_ATTENTION | _GATED_MLP

ARCHITECTURES: Mapping[str, GgufArchitecture] = {
    "llama": GgufArchitecture("llama", "LlamaForCausalLM", _WHOLE, _LLAMA),
    "mistral3": GgufArchitecture("ministral3", "Ministral3ForCausalLM", _WHOLE, _LLAMA),
    "smollm3": GgufArchitecture("smollm3", "SmolLM3ForCausalLM", _WHOLE, _LLAMA),
    "granite": GgufArchitecture("granite", "GraniteForCausalLM", _WHOLE, _LLAMA),
    "olmo2": GgufArchitecture("olmo2", "Olmo2ForCausalLM", _WHOLE, _OLMO2),
    # Cohere's own code rotates neighbouring dimensions, so these rows lie as they do in safetensors.
    "command-r": GgufArchitecture("cohere", "CohereForCausalLM", _WHOLE, _PARALLEL_BLOCK | _QK_NORMS),
    "cohere2": GgufArchitecture("cohere2", "Cohere2ForCausalLM", _WHOLE, _PARALLEL_BLOCK),
    "starcoder2": GgufArchitecture("starcoder2", "Starcoder2ForCausalLM", _WHOLE, _ATTENTION | _PLAIN_MLP),
    "qwen2": GgufArchitecture("qwen2", "Qwen2ForCausalLM", _WHOLE, _ATTENTION | _GATED_MLP),
    "qwen2moe": GgufArchitecture("qwen2_moe", "Qwen2MoeForCausalLM", _WHOLE, _ATTENTION | _EXPERTS | _SHARED_EXPERT),
    "qwen3moe": GgufArchitecture("qwen3_moe", "Qwen3MoeForCausalLM", _WHOLE, _ATTENTION | _QK_NORMS | _EXPERTS),
    "gpt-oss": GgufArchitecture("gpt_oss", "GptOssForCausalLM", _WHOLE, _ATTENTION | _GPT_OSS),
    "qwen3": GgufArchitecture("qwen3", "Qwen3ForCausalLM", _WHOLE, _ATTENTION | _QK_NORMS | _GATED_MLP),
    # The text parts of models that see: in text, the three positions of their rope are the same.
    "qwen2vl": GgufArchitecture("qwen2", "Qwen2ForCausalLM", _WHOLE, _ATTENTION | _GATED_MLP),
    "qwen3vl": GgufArchitecture("qwen3", "Qwen3ForCausalLM", _WHOLE, _ATTENTION | _QK_NORMS | _GATED_MLP),
    "qwen3vlmoe": GgufArchitecture("qwen3_moe", "Qwen3MoeForCausalLM", _WHOLE, _ATTENTION | _QK_NORMS | _EXPERTS),
    "seed_oss": GgufArchitecture("seed_oss", "SeedOssForCausalLM", _WHOLE, _SEED_OSS),
    # As in Cohere's models, neighbouring dimensions are rotated.
    "ernie4_5": GgufArchitecture("ernie4_5", "Ernie4_5ForCausalLM", _WHOLE, _ATTENTION | _GATED_MLP),
    "ernie4_5-moe": GgufArchitecture("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", _WHOLE, _ERNIE_MOE),
    "minimax-m2": GgufArchitecture("minimax_m2", "MiniMaxM2ForCausalLM", _WHOLE, _MINIMAX),
    "glm4": GgufArchitecture("glm4", "Glm4ForCausalLM", _WHOLE, _GLM4),
    "exaone4": GgufArchitecture("exaone4", "Exaone4ForCausalLM", _WHOLE, _OLMO2),
    "olmoe": GgufArchitecture("olmoe", "OlmoeForCausalLM", _WHOLE, _ATTENTION | _QK_NORMS | _EXPERTS),
    "deepseek2": GgufArchitecture("deepseek_v3", "DeepseekV3ForCausalLM", _WHOLE, _DEEPSEEK),
    "mistral4": GgufArchitecture("mistral4", "Mistral4ForCausalLM", _WHOLE, _DEEPSEEK),
    # Its release rotates neighbouring dimensions too.
    "llama4": GgufArchitecture("llama4_text", "Llama4ForCausalLM", _WHOLE, _LLAMA4),
    "granitemoe": GgufArchitecture("granitemoe", "GraniteMoeForCausalLM", _WHOLE, _GRANITE_MOE),
    "glm4moe": GgufArchitecture("glm4_moe", "Glm4MoeForCausalLM", _WHOLE, _GLM4_MOE),
    "gemma": GgufArchitecture(
        "gemma", "GemmaForCausalLM", _with_plus_one(_WHOLE), _with_plus_one(_ATTENTION | _GATED_MLP)
    ),
    "gemma2": GgufArchitecture(
        "gemma2",
        "Gemma2ForCausalLM",
        _with_plus_one(_WHOLE),
        _with_plus_one(_ATTENTION | _GATED_MLP | _SANDWICH_NORMS),
    ),
    "gemma3": GgufArchitecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        _with_plus_one(_WHOLE),
        _with_plus_one(_ATTENTION | _QK_NORMS | _GATED_MLP | _SANDWICH_NORMS),
    ),
    "gemma4": GgufArchitecture("gemma4_text", "Gemma4ForCausalLM", _GEMMA4_WHOLE, _GEMMA4),
    "phi3": GgufArchitecture(
        "phi3",
        "Phi3ForCausalLM",
        _WHOLE,
        {
            "attn_norm": _ATTENTION["attn_norm"],
            "attn_qkv": _layer("self_attn.qkv_proj"),
            "attn_output": _ATTENTION["attn_output"],
            "ffn_norm": _GATED_MLP["ffn_norm"],
            "ffn_up": _layer("mlp.gate_up_proj"),
            "ffn_down": _GATED_MLP["ffn_down"],
        },
    ),
}

MIXTRAL = GgufArchitecture("mixtral", "MixtralForCausalLM", _WHOLE, _INTERLEAVED_ATTENTION | _MIXTRAL_EXPERTS)
"""What calls itself `llama` and has experts."""
MIXTURES = (
    "qwen2moe",
    "qwen3moe",
    "qwen3vlmoe",
    "olmoe",
    "gpt-oss",
    "deepseek2",
    "glm4moe",
    "ernie4_5-moe",
    "minimax-m2",
    "mistral4",
    "llama4",
    "granitemoe",
    "gemma4",
)
MISTRAL = GgufArchitecture("mistral", "MistralForCausalLM", _WHOLE, _LLAMA)
"""What calls itself `mistral3` and scales no query by its position: Mistral Small 3.1 and 3.2, Devstral."""
OLMO3 = GgufArchitecture("olmo3", "Olmo3ForCausalLM", _WHOLE, _OLMO2)
"""What calls itself `olmo2` and has windows."""
DEEPSEEK_V2 = GgufArchitecture("deepseek_v2", "DeepseekV2ForCausalLM", _WHOLE, _DEEPSEEK)
"""What calls itself `deepseek2` and routes by softmax."""
MISTRAL_LARGE_3 = GgufArchitecture("mistral4", "Mistral4ForCausalLM", _WHOLE, _DEEPSEEK)
"""What calls itself `deepseek2` and scales queries by their position."""
SOFTMAX, SIGMOID = 1, 2  # of expert_gating_func; files of V2 may lack the key
VARIANTS: Mapping[str, tuple[GgufArchitecture, ...]] = {
    "llama": (MIXTRAL,),
    "mistral3": (MISTRAL,),
    "olmo2": (OLMO3,),
    "deepseek2": (DEEPSEEK_V2, MISTRAL_LARGE_3),
}
"""The other models behind one name."""

PROJECTORS = ("clip", "mmproj")

# Not weights: they say how rope is scaled, and go into the config. `attn_rot_embd` is the inv_freq buffer of old files.
ROPE_TENSORS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
# Vision towers, where a file has them in itself, begin with v. and mm.
_IGNORED = re.compile(
    r"(v|mm)\..+|blk\.\d+\.attn_rot_embd\.weight|" + "|".join(re.escape(name) for name in sorted(ROPE_TENSORS))
)
_LAYER_NAME = re.compile(r"blk\.(?P<layer>\d+)\.(?P<part>.+)")
# Files of 2023 have every expert of Mixtral in a tensor of its own.
_LONE_EXPERT = re.compile(r"(?P<part>ffn_(gate|up|down))\.(?P<expert>\d+)")


def architecture_of(path: Path, metadata: Mapping[str, object]) -> tuple[str, GgufArchitecture]:
    """The architecture a file names, refused with the list of those that work."""
    name = metadata.get("general.architecture")
    known = ", ".join(ARCHITECTURES)
    if name in PROJECTORS:
        raise CheckpointError(
            path,
            "holds a projector for images or sound and no language model",
            advice="give the file of the model, which is published beside it",
        )
    if not isinstance(name, str):
        raise CheckpointError(path, "does not name its architecture", advice=f"these can be loaded: {known}")
    if name not in ARCHITECTURES:
        raise CheckpointError(
            path,
            f"is of the architecture {name!r}",
            advice=f"from GGUF these can be loaded: {known}; try the safetensors version of the model",
        )
    num_experts = metadata.get(f"{name}.expert_count", 0)
    if num_experts and name == "llama":
        return name, MIXTRAL
    if num_experts and name not in MIXTURES:
        raise CheckpointError(
            path,
            f"is a mixture of {num_experts} experts, which is not read from GGUF for {name!r}",
            advice="use the safetensors version of the model",
        )
    if name == "mistral3" and not metadata.get(f"{name}.attention.temperature_scale"):
        return name, MISTRAL
    if name == "olmo2" and metadata.get(f"{name}.attention.sliding_window"):
        return name, OLMO3
    if name == "deepseek2" and metadata.get(f"{name}.attention.temperature_scale"):
        return name, MISTRAL_LARGE_3
    if name == "deepseek2" and num_experts and gating_function(name, metadata) != SIGMOID:
        return name, DEEPSEEK_V2
    return name, ARCHITECTURES[name]


def gating_function(name: str, metadata: Mapping[str, object]) -> object:
    """`expert_gating_func`, or what files without the key mean: GLM-4.7-Flash's, known by its sizes, the sigmoid."""
    stored = metadata.get(f"{name}.expert_gating_func")
    if stored:
        return stored
    sizes = (num_layers_of(name, metadata), metadata.get(f"{name}.vocab_size"))
    return SIGMOID if sizes in ((47, 154_880), (48, 154_880)) else SOFTMAX


def num_layers_of(name: str, metadata: Mapping[str, object]) -> int | None:
    """Layers without those behind them that predict further tokens (`nextn`), None where the file does not say."""
    count, beyond = (metadata.get(f"{name}.{key}", 0) for key in ("block_count", "nextn_predict_layers"))
    return count - beyond if isinstance(count, int) and isinstance(beyond, int) and count > beyond else None


def is_beyond(gguf_name: str, num_layers: int | None) -> bool:
    """Whether a tensor is of a layer behind the model's own."""
    match = _LAYER_NAME.fullmatch(gguf_name)
    return match is not None and num_layers is not None and int(match["layer"]) >= num_layers


def rule_for(path: Path, architecture: GgufArchitecture, gguf_name: str) -> TensorRule | None:
    """What to do with a tensor of the file; None for one that holds no weights.

    Raises:
        CheckpointError: the architecture has no such tensor.
    """
    if _IGNORED.fullmatch(gguf_name):
        return None
    stem, _, kind = gguf_name.rpartition(".")
    match = _LAYER_NAME.fullmatch(stem)
    part = match["part"] if match else ""
    if match and kind == "scale":
        part, kind = f"{part}.scale", "weight"
    lone = _LONE_EXPERT.fullmatch(part)
    rule = (
        architecture.per_layer.get(f"{lone['part']}_exps" if lone else part) if match else architecture.whole.get(stem)
    )
    if rule is None or kind not in ("weight", "bias"):
        raise CheckpointError(
            path,
            f"the architecture {architecture.model_type!r} has no such tensor",
            tensor=gguf_name,
            advice="the file is of a variant that is not known: use the safetensors version of the model",
        )
    hf_name = rule.hf_name.format(layer=match["layer"] if match else "")
    if lone:
        hf_name = hf_name.format(expert=lone["expert"])
    return replace(rule, hf_name=hf_name if rule.is_bare else f"{hf_name}.{kind}")
