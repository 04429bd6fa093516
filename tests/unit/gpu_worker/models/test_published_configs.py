"""config.json and the files beside it as they are published: fields of all times, contradictions, leftovers."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gpu_worker.assembly import load_model
from gpu_worker.config import WorkerSettings
from gpu_worker.layers.linear import BuildContext
from gpu_worker.layers.rope import attention_factor, inverse_frequencies
from gpu_worker.loading.tensor_source import CheckpointError
from gpu_worker.model_spec import ModelConfigError
from gpu_worker.models.family import ModelFamily
from gpu_worker.models.hf_config import FULL, SLIDING, HfConfig
from gpu_worker.models.loader import read_spec
from gpu_worker.models.registry import find_family
from gpu_worker.parallel.shares import ParallelContext
from gpu_worker.quant.none import Unquantized
from tests.unit.gpu_worker.models.test_families import PagedModel
from tests.unit.gpu_worker.models.tiny_checkpoints import save_tiny

SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2.5-stretched": ("qwen2", {"rope_theta": 1e6, "rope_scaling": YARN | {"type": "yarn"}}),
    "qwen3-stretched": ("qwen3", {"head_dim": 128, "rope_theta": 1e6, "rope_scaling": YARN | {"rope_type": "yarn"}}),
    "yarn-without-original": ("llama", {"rope_theta": 5e5, "rope_scaling": {"factor": 8.0, "type": "yarn"}}),
    "yarn-with-original-outside": (
        "llama",
        {"original_max_position_embeddings": 4096, "rope_scaling": YARN | {"rope_type": "yarn"}},
    ),
    "yarn-with-its-own-factor": (
        "llama",
        {"rope_scaling": YARN | {"type": "yarn", "attention_factor": 1.3, "beta_fast": 24, "beta_slow": 2}},
    ),
    "llama-3.1": ("llama", {"rope_theta": 500000.0, "rope_scaling": LLAMA3}),
    "llama-3.1-v5": ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}}),
    "both": ("llama", {"rope_theta": 5e5, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "rope_scaling": LLAMA3}),
    "both-and-one-is-default": (
        "llama",
        {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default"}, "rope_scaling": YARN | {"type": "yarn"}},
    ),
    "linear": ("llama", {"rope_theta": 10000, "rope_scaling": {"type": "linear", "factor": 4}}),
    "theta-inside": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 77.0}}),
    "dynamic": ("llama", {"rope_theta": 10000, "rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "null": ("llama", {"rope_theta": 1000000, "rope_scaling": None}),
    "default-twice": ("llama", {"rope_theta": 5e5, "rope_scaling": {"rope_type": "default", "type": "default"}}),
    "partial": ("glm4", {"head_dim": 128, "partial_rotary_factor": 0.5, "rope_theta": 10000.0}),
}


@pytest.mark.parametrize("case", ROPES)
def test_rope_is_what_transformers_makes_of_the_config(case: str) -> None:
    kind, fields = ROPES[case]
    config = CONFIG_MAPPING[kind].from_dict(deepcopy(SIZES | {"max_position_embeddings": 32768} | fields))
    parameters = config.rope_parameters
    rope = HfConfig(SIZES | {"max_position_embeddings": 32768} | fields).rope(128, rotates_partly=True)
    if parameters["rope_type"] == "default":
        size = int(128 * parameters.get("partial_rotary_factor", 1.0))
        expected, factor = parameters["rope_theta"] ** (-torch.arange(0, size, 2) / size), 1.0
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"))
    torch.testing.assert_close(inverse_frequencies(rope), expected, rtol=1e-5, atol=0)
    assert attention_factor(rope) == pytest.approx(factor)


def test_who_stretches_a_new_config_by_hand_keeps_its_base() -> None:
    """transformers 5.23 falls back to the class's base there, which no model was trained with."""
    fields = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": YARN | {"type": "yarn"}}
    rope = HfConfig(fields).rope(128)
    assert (rope.theta, rope.kind, rope.factor) == (1e6, "yarn", 4.0)


def test_a_part_of_a_head_is_not_rotated_where_transformers_cannot_either() -> None:
    fields = {"partial_rotary_factor": 0.5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    with pytest.raises(ModelConfigError, match=r"partial_rotary_factor is 0\.5, and this architecture rotates whole"):
        HfConfig(fields).rope(128)


def test_a_rope_for_every_kind_of_layer() -> None:
    parameters = {FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, SLIDING: {"rope_theta": 1e4}}
    config = HfConfig({"rope_parameters": parameters})
    assert [config.rope(64, layer_type=kind).theta for kind in (FULL, SLIDING)] == [1e6, 1e4]
    for contradiction in ({"rope_parameters": parameters}, {"rope_parameters": parameters, "rope_scaling": YARN}):
        with pytest.raises(ModelConfigError, match="rope_parameters has full_attention, sliding_attention"):
            HfConfig(contradiction).rope(64)
    assert HfConfig({"rope_parameters": {FULL: {"rope_theta": 7.0}}}).rope(64).theta == 7.0


def spec_of(architecture: str, **fields: Any) -> Any:
    config = HfConfig(SIZES | {"max_position_embeddings": 4096} | fields)
    return find_family([architecture])[1].read_config(config, architecture)


@pytest.mark.parametrize(
    ("architecture", "fields", "expected"),
    [
        ("LlamaForCausalLM", {"torch_dtype": "bfloat16"}, {"dtype": torch.bfloat16}),
        ("LlamaForCausalLM", {"dtype": "torch.float16", "torch_dtype": None}, {"dtype": torch.float16}),
        ("LlamaForCausalLM", {"head_dim": None, "num_key_value_heads": None}, {"head_dim": 128, "num_kv_heads": 4}),
        ("LlamaForCausalLM", {"eos_token_id": [7, 8, 9]}, {"eos_token_ids": (7, 8, 9)}),
        ("LlamaForCausalLM", {"eos_token_id": None}, {"eos_token_ids": ()}),
        ("LlamaForCausalLM", {}, {"tie_word_embeddings": False}),
        ("LlamaForCausalLM", {"torch_dtype": "auto"}, {"dtype": torch.float32}),
        ("LlamaForCausalLM", {"dtype": "auto", "torch_dtype": "float16"}, {"dtype": torch.float16}),
        (
            "LlamaForCausalLM",
            {"torch_dtype": "float8_e4m3fn", "quantization_config": {"quant_method": "fp8"}},
            {"dtype": torch.bfloat16},
        ),
        # As Qwen's model cards say to stretch a model, and as DeepSeek and Kimi publish theirs.
        (
            "Qwen2ForCausalLM",
            {"max_position_embeddings": 32768, "rope_scaling": YARN | {"type": "yarn"}},
            {"max_position_embeddings": 131_072},
        ),
        (
            "LlamaForCausalLM",
            {"max_position_embeddings": 163_840, "rope_scaling": YARN | {"type": "yarn"}},
            {"max_position_embeddings": 163_840},
        ),
        (
            "LlamaForCausalLM",
            {"max_position_embeddings": 8192, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            {"max_position_embeddings": 8192},
        ),
        ("Gemma2ForCausalLM", {"head_dim": 128}, {"tie_word_embeddings": True}),
        ("Qwen3ForCausalLM", {}, {"head_dim": 128}),
    ],
    ids=str,
)
def test_fields_that_are_missing_null_or_of_another_time(
    architecture: str, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    spec = spec_of(architecture, **fields)
    assert {name: getattr(spec, name) for name in expected} == expected


# Of the classes in transformers: what a config leaves out is theirs.
DEFAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "MixtralForCausalLM": ("mixtral", {}),
    "Qwen2MoeForCausalLM": ("qwen2_moe", {"num_experts": 8, "moe_intermediate_size": 32}),
    "Qwen3MoeForCausalLM": ("qwen3_moe", {"num_experts": 8, "moe_intermediate_size": 32}),
    "DeepseekV2ForCausalLM": (
        "deepseek_v2",
        {"n_routed_experts": 64, "num_experts_per_tok": 6, "moe_intermediate_size": 32},
    ),
    "DeepseekV3ForCausalLM": ("deepseek_v3", {"n_routed_experts": 64, "moe_intermediate_size": 32}),
}


@pytest.mark.parametrize("architecture", DEFAULTS)
def test_mixtures_of_which_a_config_says_little(architecture: str) -> None:
    kind, fields = DEFAULTS[architecture]
    more = {"num_hidden_layers": 4, "shared_expert_intermediate_size": 64, **fields}
    spec, config = spec_of(architecture, **more), CONFIG_MAPPING[kind](**SIZES | more)
    assert spec.layers[0].rope.theta == config.rope_parameters["rope_theta"]
    assert spec.moe.num_chosen == config.num_experts_per_tok
    shared = (
        getattr(config, "n_shared_experts", 0) * config.moe_intermediate_size if "Deepseek" in architecture else None
    )
    assert shared is None or spec.moe.shared_intermediate_size == shared
    first_sparse = getattr(config, "first_k_dense_replace", 0)
    assert [layer.is_moe for layer in spec.layers] == [number >= first_sparse for number in range(4)]


@pytest.mark.parametrize(
    ("architecture", "fields", "windows"),
    [
        ("MistralForCausalLM", {}, [4096, 4096]),
        ("MistralForCausalLM", {"sliding_window": None}, [None, None]),
        (
            "Qwen2ForCausalLM",
            {"sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 70},
            [None] * 2,
        ),
        ("Qwen2ForCausalLM", {"sliding_window": 99, "use_sliding_window": True, "max_window_layers": 1}, [None, 99]),
        ("Qwen3ForCausalLM", {"sliding_window": None, "layer_types": [FULL, FULL]}, [None, None]),
        ("LlamaForCausalLM", {"sliding_window": 128}, [None, None]),
        ("Gemma2ForCausalLM", {"head_dim": 128, "sliding_window": 64, "layer_types": [FULL, SLIDING]}, [None, 64]),
    ],
    ids=str,
)
def test_windows(architecture: str, fields: dict[str, Any], windows: list[int | None]) -> None:
    assert [layer.sliding_window for layer in spec_of(architecture, **fields).layers] == windows


@pytest.mark.parametrize(("value", "is_scaled"), [(4, True), (True, True), (0, False), (False, False)], ids=str)
def test_llama_4s_first_releases_have_a_number_for_whether_queries_are_scaled(value: Any, is_scaled: bool) -> None:
    spec = spec_of("Llama4ForCausalLM", attn_temperature_tuning=value, head_dim=128)
    assert (spec.query_scaling is not None) is is_scaled


# As DeepSeek-V3.2 and GLM-5 have them, layers left out.
INDEXED: dict[str, Any] = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_hidden_layers": 6,
    "index_topk": 2048,
    "index_head_dim": 128,
}


@pytest.mark.parametrize(
    ("fields", "chosen"),
    [
        ({}, "FFFFFF"),
        ({"index_topk_freq": 4, "index_skip_topk_offset": 3}, "FFFSSS"),
        ({"index_topk_pattern": "FSFSSF"}, "FSFSSF"),
        ({"indexer_types": ["full", "shared", "full", "full", "shared", "full"]}, "FSFFSF"),
        ({"layer_types": ["indexed_attention"] * 6}, "FFFFFF"),
    ],
    ids=str,
)
def test_layers_that_choose_what_is_attended_to(fields: dict[str, Any], chosen: str) -> None:
    spec = spec_of("GlmMoeDsaForCausalLM", **INDEXED, **fields)
    assert "".join("F" if layer.has_indexer else "S" for layer in spec.layers) == chosen
    assert spec.indexer is not None and spec.indexer.num_heads == 32 and spec.indexer.rope.interleaved


def test_the_choice_of_one_stage_is_not_known_to_the_next() -> None:
    spec = spec_of("GlmMoeDsaForCausalLM", **INDEXED, index_topk_pattern="FSFSSF")
    meta = torch.device("meta")

    def build(stages: tuple[int, ...]) -> None:
        for stage in range(len(stages)):
            parallel = ParallelContext(stage=stage, stage_layers=stages)
            find_family([spec.architecture])[1](spec, 64, BuildContext(parallel, Unquantized(), torch.bfloat16, meta))

    build((2, 4))
    with pytest.raises(ModelConfigError, match=r"layer 3 of GlmMoeDsa.* --pipeline-parallel-size"):
        build((3, 3))
    with pytest.raises(ModelConfigError, match="indexer_types must have full or shared for each of 6 layers"):
        spec_of("GlmMoeDsaForCausalLM", **INDEXED, index_topk_pattern="SFFFFF")


def loaded(directory: Path) -> ModelFamily:
    spec, family = read_spec(directory)
    build = BuildContext(ParallelContext(), Unquantized(), torch.float32, torch.device("cpu"))
    return load_model(WorkerSettings(model=directory), family, spec, build, 64)


def test_what_lies_beside_the_weights_and_among_them(tmp_path: Path) -> None:
    """Shards under an index with names of their own, Mistral's file and an adapter beside them, old buffers inside."""
    save_tiny("llama", tmp_path)
    before = PagedModel(tmp_path).logits([5, 6, 7], 0)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["model.layers.1.self_attn.k_scale"] = torch.ones(1)
    names = sorted(tensors)
    files = {"gptq_model-4bit-128g-1.safetensors": names[::2], "extra.safetensors": names[1::2]}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, tmp_path / file)
    index = {name: file for file, held in files.items() for name in held}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for file in ("consolidated.safetensors", "adapter_model.safetensors"):
        save_file({"tok_embeddings.weight": torch.ones(3)}, tmp_path / file)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    assert torch.equal(PagedModel(tmp_path).logits([5, 6, 7], 0), before)


@pytest.mark.parametrize("name", ["mtp.fc", "model.mtp.layers.0.x", "model.mtp_block.0.x", "language_model.mtp.x"])
@pytest.mark.parametrize("tiny", ["qwen3", "ernie-moe"])
def test_what_predicts_further_tokens_is_left_out(tiny: str, name: str, tmp_path: Path) -> None:
    save_tiny(tiny, tmp_path)
    before = PagedModel(tmp_path).logits([5, 6, 7], 0)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {f"{name}.weight": torch.ones(2)}, file, {"format": "pt"})
    assert torch.equal(PagedModel(tmp_path).logits([5, 6, 7], 0), before)


@pytest.mark.parametrize(
    "architectures", [None, [], ["LLaMAForCausalLM"]], ids=["null", "empty", "in capitals of 2023"]
)
def test_architectures_that_are_left_out_or_written_otherwise(architectures: list[str] | None, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    before = PagedModel(tmp_path).logits([5, 6, 7], 0)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"architectures": architectures}))
    assert torch.equal(PagedModel(tmp_path).logits([5, 6, 7], 0), before)
    (tmp_path / "config.json").write_text(json.dumps(fields | {"architectures": [], "model_type": "of_my_own"}))
    with pytest.raises(ModelConfigError, match="names nothing in architectures"):
        read_spec(tmp_path)


@pytest.mark.parametrize(
    ("kind", "architecture", "served"),
    [
        ("phimoe", "PhiMoEForCausalLM", "PhimoeForCausalLM"),
        ("mpt", "MPTForCausalLM", "MptForCausalLM"),
        ("internlm3", "InternLM3ForCausalLM", "LlamaForCausalLM"),
    ],
)
def test_repositories_with_code_that_transformers_has_under_another_name(
    kind: str, architecture: str, served: str, tmp_path: Path
) -> None:
    config = CONFIG_MAPPING[kind](vocab_size=64).to_dict()
    code = {"AutoModelForCausalLM": f"modeling_{kind}.{architecture}"}
    fields = config | {"architectures": [architecture], "auto_map": code, "pad_token_id": None}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert read_spec(tmp_path)[0].architecture == served
    (tmp_path / "config.json").write_text(json.dumps(fields | {"architectures": ["MyOwnForCausalLM"]}))
    with pytest.raises(ModelConfigError, match="own code for MyOwnForCausalLM, which is never done"):
        read_spec(tmp_path)


@pytest.mark.parametrize(
    ("trunk", "head"),
    [("", "lm_head."), ("language_model.model.", "language_model.lm_head."), ("model.language_model.", "lm_head.")],
    ids=["of the trunk", "of a part in transformers 4", "of a part in transformers 5"],
)
@pytest.mark.parametrize("tiny", ["qwen3", "deepseek-v3", "ernie-moe", "minimax-m2", "gemma3"])
def test_names_of_a_trunk_or_part_under_the_architecture_of_the_whole(
    tiny: str, trunk: str, head: str, tmp_path: Path
) -> None:
    """Qwen3-Embedding and gte-Qwen2 are published like the first, language models cut out of others like the rest."""
    save_tiny(tiny, tmp_path)
    before = PagedModel(tmp_path).logits([5, 6, 7], 0)
    file = tmp_path / "model.safetensors"
    renamed = {
        name.replace("model.", trunk, 1) if name.startswith("model.") else name.replace("lm_head.", head): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(renamed, file)
    assert torch.equal(PagedModel(tmp_path).logits([5, 6, 7], 0), before)


def test_cache_scales_of_a_kind_that_is_not_done_are_refused_before_memory_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.k_scale"] = torch.ones(2)
    save_file(tensors, tmp_path / "model.safetensors")
    devices: list[torch.device] = []
    _, family = read_spec(tmp_path)
    build_layers = family.__init__

    def watched(self: Any, spec: Any, max_position: int, build: BuildContext) -> None:
        devices.append(build.device)
        build_layers(self, spec, max_position, build)

    monkeypatch.setattr(family, "__init__", watched)
    with pytest.raises(CheckpointError, match=r"k_scale.*\[2\].*one scale for a layer's keys"):
        loaded(tmp_path)
    assert devices == [torch.device("meta")]
