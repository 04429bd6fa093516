"""Random checkpoints of transformers, written as GGUF and served: values, logits and refusals.

The writer is the `gguf` package with its own names; which rows it interleaves and which keys it writes is
llama.cpp's converter (`conversion/` of https://github.com/ggml-org/llama.cpp).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from transformers.models.mistral4 import Mistral4ForCausalLM

from gpu_worker.loading.gguf_names import ARCHITECTURES, architecture_of
from gpu_worker.loading.gguf_reader import GgufReader
from gpu_worker.loading.tensor_source import CheckpointError
from gpu_worker.prepare.preparation import prepare
from gpu_worker.prepare.progress import SilentProgress
from tests.unit.gpu_worker.loading.checkpoint_as_gguf import write_checkpoint
from tests.unit.gpu_worker.loading.gguf_families import FAMILIES, HEAD_DIM, PLAIN, RMS, SIZES, THETA, Family
from tests.unit.gpu_worker.loading.synthetic_gguf import ARCHITECTURES as SYNTHETIC
from tests.unit.gpu_worker.loading.synthetic_gguf import MIXTURES
from tests.unit.gpu_worker.quant.paged_model import QuantizedModel

TOKENS = list(range(3, 33))
# Those of SYNTHETIC and MIXTURES are tested with files of their own.
TESTED = {family.architecture for family in FAMILIES.values()} | {"qwen3vl"}


def test_every_architecture_has_files_to_be_tested_with() -> None:
    assert TESTED | set(SYNTHETIC) | set(MIXTURES) - {"mixtral"} == set(ARCHITECTURES)


def _random_model(family: Family, **fields: Any) -> Any:
    """In which every number, norms and biases too, is other than what a missing tensor would leave."""
    config = family.config(**{**SIZES, **family.fields, **fields})
    torch.manual_seed(0)
    if isinstance(config, transformers.Mistral4Config):  # which the automatic class has as a part of others alone
        config._attn_implementation = "eager"
        model: Any = Mistral4ForCausalLM(config).eval()
    else:
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, values in model.named_parameters():
            is_norm = "norm" in name and name.endswith("weight")
            values.copy_(torch.randn_like(values) * (0.3 if is_norm else 0.1) + is_norm)
        for name, values in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                values.copy_(torch.randn_like(values) * 0.1)
            if name.endswith("layer_scalar"):
                values.add_(torch.randn_like(values) * 0.2)
    return model


def _logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return torch.as_tensor(model(torch.tensor([TOKENS])).logits[0])


def _rope_factors(model: Any) -> dict[str, torch.Tensor]:
    """By what Llama 3's scaling divides the frequencies: the file has these and not the parameters."""
    if model.config.model_type == "gemma4_text":
        num_pairs = model.config.per_layer_config["full_attention"].head_dim // 2
        return {"rope_freqs.weight": torch.tensor([1.0] * (num_pairs // 4) + [1e30] * (num_pairs - num_pairs // 4))}
    if model.config.rope_parameters.get("rope_type") != "llama3":
        return {}
    steps = torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM
    return {"rope_freqs.weight": THETA**-steps / model.model.rotary_emb.inv_freq}


def _prepared(tmp_path: Path, dtype: str) -> Path:
    return prepare(tmp_path / "m.gguf", tmp_path / "cache", dtype=dtype, progress=SilentProgress()).path


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_the_checkpoint_that_was_written(tmp_path: Path, name: str) -> None:
    """Ours from the file, and those of transformers from what the file is converted to."""
    family = FAMILIES[name]
    model = _random_model(family)
    write_checkpoint(tmp_path / "m.gguf", family.architecture, model, family.keys, extra=_rope_factors(model))
    expected = _logits(model)
    plain = _prepared(tmp_path, "float32")
    if family.transformers_reads_it:
        again = transformers.AutoModelForCausalLM.from_pretrained(
            plain, dtype=torch.float32, attn_implementation="eager"
        )
        assert type(again) is type(model)
        assert torch.equal(_logits(again), expected)
    for directory in (plain, _prepared(tmp_path, "packed")):
        assert (QuantizedModel(directory).logits(TOKENS) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_are_what_the_package_says_they_are(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    model = _random_model(family)
    kinds = {"q_proj.weight": Kind.Q8_0, "k_proj.weight": Kind.Q4_0, "embed_tokens.weight": Kind.Q8_0}
    kinds |= {end: (Kind.Q4_0, Kind.Q8_0)[number % 2] for number, end in enumerate(family.blocks)}
    path, factors = tmp_path / "m.gguf", _rope_factors(model)
    state = write_checkpoint(path, family.architecture, model, family.keys, kinds, extra=factors)
    # what transformers has under names of its own is in the logits
    renamed = re.compile(r"\.experts\.|\.moe_statics\.")
    same = {tensor: values for tensor, values in state.items() if not renamed.search(tensor)}
    if name == "minimax-m2":  # as its release has them
        same = {tensor.replace(".mlp.", ".block_sparse_moe."): values for tensor, values in same.items()}
    with GgufReader(path) as reader:
        shapes = {info.name: info.shape for info in reader.names() if not renamed.search(info.name)}
        assert shapes == {tensor: tuple(values.shape) for tensor, values in same.items()}
        for tensor, values in same.items():
            assert torch.equal(reader.read(tensor), values), tensor
    model.load_state_dict(state, strict=False)
    expected = _logits(model)
    for dtype in ("float32", "packed"):
        ours = QuantizedModel(_prepared(tmp_path, dtype)).logits(TOKENS)
        assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("keys", "hf_class"),
    [
        ({"expert_gating_func": 2}, "DeepseekV3ForCausalLM"),
        ({"expert_gating_func": 1}, "DeepseekV2ForCausalLM"),
        ({}, "DeepseekV2ForCausalLM"),
        # GLM-4.7-Flash, whose first files do not say how experts are chosen, with and without what predicts further.
        ({"block_count": 47, "vocab_size": 154_880}, "DeepseekV3ForCausalLM"),
        ({"block_count": 48, "nextn_predict_layers": 1, "vocab_size": 154_880}, "DeepseekV3ForCausalLM"),
        ({"block_count": 47, "vocab_size": 102_400}, "DeepseekV2ForCausalLM"),
        ({"block_count": 47, "vocab_size": 154_880, "expert_gating_func": 1}, "DeepseekV2ForCausalLM"),
        ({"expert_gating_func": 1, "attention.temperature_scale": 0.1}, "Mistral4ForCausalLM"),
    ],
    ids=str,
)
def test_which_of_the_models_behind_deepseek2_a_file_is(keys: dict[str, Any], hf_class: str) -> None:
    fields = {"block_count": 27, "vocab_size": 102_400, "expert_count": 64} | keys
    metadata = {"general.architecture": "deepseek2"} | {f"deepseek2.{key}": value for key, value in fields.items()}
    assert architecture_of(Path("m.gguf"), metadata)[1].hf_class == hf_class


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


def test_slices_of_joined_projections_equal_slices_of_the_whole(tmp_path: Path) -> None:
    family = FAMILIES["deepseek-v3"]
    model = _random_model(family)
    kinds = {"k_b_proj.weight": Kind.Q4_0, "v_b_proj.weight": Kind.Q8_0}
    state = write_checkpoint(tmp_path / "m.gguf", "deepseek2", model, family.keys, kinds)
    name = "model.layers.2.self_attn.kv_b_proj.weight"  # [4 heads * (32 + 64), 64]
    with GgufReader(tmp_path / "m.gguf") as reader:
        for rows, columns in [((0, 0), (0, 64)), ((95, 97), (3, 9)), ((40, 300), (0, 64)), ((96, 192), (63, 64))]:
            ours = reader.read(name, (slice(*rows), slice(*columns)))
            assert torch.equal(ours, state[name][slice(*rows), slice(*columns)])
        with pytest.raises(IndexError):
            reader.read(name, (slice(0, 385),))


def test_keys_without_values_are_refused(tmp_path: Path) -> None:
    family = FAMILIES["deepseek-v3"]
    write_checkpoint(tmp_path / "m.gguf", "deepseek2", _random_model(family), family.keys)
    damaged = (tmp_path / "m.gguf").read_bytes().replace(b"blk.1.attn_v_b.weight", b"blk.9.attn_v_b.weight")
    (tmp_path / "m.gguf").write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"has of it only blk\.1\.attn_k_b\.weight \[4, 64, 32\]"):
        GgufReader(tmp_path / "m.gguf")


def test_groups_of_experts_are_those_of_the_released_models_where_the_file_lacks_them(tmp_path: Path) -> None:
    """Files of DeepSeek-V2 and V3 that are older than the keys."""
    keys = {name: value for name, value in FAMILIES["deepseek-v3"].keys.items() if "expert_group" not in name}
    for num_experts, groups in ((256, (8, 4)), (8, (1, 1))):
        model = _random_model(FAMILIES["deepseek-v3"], n_routed_experts=num_experts, num_hidden_layers=2)
        write_checkpoint(tmp_path / "m.gguf", "deepseek2", model, {**keys, "expert_count": num_experts})
        config = json.loads((_prepared(tmp_path, "packed") / "config.json").read_text())
        assert (config["n_group"], config["topk_group"]) == groups


@pytest.mark.parametrize("name", ["glm-4.5", "deepseek-v3"])
def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path, name: str) -> None:
    """Files of GLM-4.5 and of GLM-4.7-Flash have one behind the model's own, and count it."""
    family = FAMILIES[name]
    model = _random_model(family)
    whole = _random_model(family, num_hidden_layers=5)
    whole.load_state_dict(model.state_dict(), strict=False)
    keys = {**family.keys, "nextn_predict_layers": 1}
    extra = {"blk.4.nextn.eh_proj.weight": torch.zeros(256, 512)}
    write_checkpoint(tmp_path / "m.gguf", family.architecture, whole, keys, extra=extra)
    expected = _logits(model)
    for dtype in ("float32", "packed"):
        ours = QuantizedModel(_prepared(tmp_path, dtype)).logits(TOKENS)
        assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


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
        ("granite-4", {"attention.head_count_kv": [2, 2, 0, 2]}, r"has 128 rows, which \[2, 2, 0, 2\] heads"),
        ("ministral3", {"expert_count": 8}, r"mixture of 8 experts, which is not read from GGUF for 'mistral3'"),
        ("cohere2", {"attention.sliding_window": None}, r"lacks the metadata key 'cohere2\.attention\.sliding_window'"),
        ("cohere2", {"attention.sliding_window_pattern": [True]}, r"has the windows \[True\] for 4 layers"),
        ("granitemoe", {"expert_shared_feed_forward_length": 64}, r"has an expert that every token takes"),
        ("llama4", {"attention.sliding_window": 0}, r"attends to everything in every layer"),
        ("glm-4.5", {"expert_gating_func": 1}, r"another function than sigmoid"),
        ("deepseek-v3", {"leading_dense_block_count": None}, r"lacks .* 'deepseek2\.leading_dense_block_count'"),
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


def test_a_granite_file_without_its_first_gate(tmp_path: Path) -> None:
    family, path = FAMILIES["granite"], tmp_path / "m.gguf"
    write_checkpoint(path, family.architecture, _random_model(family), family.keys)
    path.write_bytes(path.read_bytes().replace(b"blk.0.ffn_gate.weight", b"blk.9.ffn_gate.weight"))
    with pytest.raises(CheckpointError, match=r"tensor 'blk\.0\.ffn_gate\.weight': is missing"):
        _prepared(tmp_path, "float32")
