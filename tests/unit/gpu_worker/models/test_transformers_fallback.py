"""Architectures without a file of their own: transformers' code on the paged cache, or a refusal that says why."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs
from transformers import PretrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.biogpt import BioGptConfig
from transformers.models.bloom import BloomConfig
from transformers.models.codegen import CodeGenConfig
from transformers.models.cpmant import CpmAntConfig
from transformers.models.dots1 import Dots1Config
from transformers.models.falcon import FalconConfig
from transformers.models.gpt2 import GPT2Config
from transformers.models.gpt_neo import GPTNeoConfig
from transformers.models.gpt_neox import GPTNeoXConfig
from transformers.models.gptj import GPTJConfig
from transformers.models.hunyuan_v1_dense import HunYuanDenseV1Config
from transformers.models.longcat_flash import LongcatFlashConfig
from transformers.models.modernbert_decoder import ModernBertDecoderConfig
from transformers.models.mpt import MptConfig
from transformers.models.nemotron import NemotronConfig
from transformers.models.olmo import OlmoConfig
from transformers.models.openai import OpenAIGPTConfig
from transformers.models.opt import OPTConfig
from transformers.models.phi import PhiConfig
from transformers.models.phimoe import PhimoeConfig
from transformers.models.roberta import RobertaConfig
from transformers.models.stablelm import StableLmConfig
from transformers.models.vaultgemma import VaultGemmaConfig
from transformers.models.xglm import XGLMConfig
from transformers.models.xlm import XLMConfig

from gpu_worker.config import WorkerSettings
from gpu_worker.layers.linear import BuildContext
from gpu_worker.loading.tensor_source import CheckpointError
from gpu_worker.model_spec import ModelConfigError
from gpu_worker.models import fallback_probe
from gpu_worker.models.loader import read_spec
from gpu_worker.models.transformers_fallback import TransformersModel
from gpu_worker.parallel.shares import ParallelContext
from gpu_worker.quant.scheme import make_scheme
from gpu_worker.runner import TorchRunner
from load_tests.cpu_worker.step_driver import StepDriver, greedy
from tests.unit.gpu_worker.models.test_families import PagedModel, check_logits
from tests.unit.gpu_worker.models.tiny_checkpoints import Tiny, save_model
from tests.unit.gpu_worker.quant.published import (
    MIXTURE,
    SIZES,
    Packer,
    awq,
    float8_by_block,
    gptq,
    packed_integers,
    publish,
)

SMALL: dict[str, Any] = {"num_hidden_layers": 2}
# 40 tokens are more than the original context, so that transformers takes the long factors.
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0 + 0.3 * i for i in range(5)],
    "long_factor": [1.0 + 0.6 * i for i in range(5)],
}
CARRIED = {
    # Learnt positions, fused qkv in a transposed linear, a scale that differs from layer to layer.
    "gpt2": Tiny(GPT2Config, {"scale_attn_by_inverse_layer_idx": True, "n_positions": 256}),
    # Parallel block, partly rotated heads.
    "gpt-neox": Tiny(GPTNeoXConfig, {"rotary_pct": 0.4, "num_attention_heads": 6}),
    "opt": Tiny(OPTConfig, {"ffn_dim": 90, "word_embed_proj_dim": 60}),
    "biogpt": Tiny(BioGptConfig, {"num_attention_heads": 6}),
    "phi": Tiny(PhiConfig, {"hidden_size": 72, "partial_rotary_factor": 0.5}),
    # A mixture of experts.
    "phimoe": Tiny(PhimoeConfig, {"sliding_window": None, "num_local_experts": 5}),
    # Frequencies that transformers chooses anew in every step.
    "dynamic-rope": Tiny(
        GPTNeoXConfig,
        {"rotary_pct": 1.0, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 4.0}},
    ),
    "longrope": Tiny(GPTNeoXConfig, {"rotary_pct": 1.0, "rope_parameters": LONGROPE}),
    "phimoe-longrope": Tiny(
        PhimoeConfig,
        {
            "sliding_window": None,
            "num_local_experts": 5,
            # transformers 5.23 takes the short factors for any length, and the scale by the length.
            "rope_parameters": LONGROPE
            | {"short_factor": LONGROPE["long_factor"], "short_mscale": 1.1, "long_mscale": 1.3},
        },
    ),
    "hunyuan": Tiny(
        HunYuanDenseV1Config,
        {
            "head_dim": 16,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 1.0, "alpha": 50.0},
        },
    ),
    # Two attentions a layer, and experts that give what they get.
    "longcat-flash": Tiny(
        LongcatFlashConfig,
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": 6,
            "q_lora_rank": 32,
            "kv_lora_rank": 24,
            "qk_nope_head_dim": 12,
            "qk_rope_head_dim": 8,
            "head_dim": 8,
            "v_head_dim": 14,
            "moe_topk": 3,
            "n_routed_experts": 6,
            "zero_expert_num": 3,
            "expert_ffn_hidden_size": 40,
        },
    ),
    "olmo": Tiny(OlmoConfig, {"clip_qkv": 1.5}),
    "nemotron": Tiny(NemotronConfig, {"hidden_size": 72}),
    # Alternating windows, soft caps on scores and on logits.
    "vaultgemma": Tiny(
        VaultGemmaConfig,
        {"head_dim": 16, "sliding_window": 11, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
    ),
    "stablelm": Tiny(StableLmConfig, {"partial_rotary_factor": 0.5, "hidden_size": 72, "use_parallel_residual": True}),
    # Attention of their own, rotated pairs.
    "gptj": Tiny(GPTJConfig, {"n_head": 6, "rotary_dim": 8}),
    "codegen": Tiny(CodeGenConfig, {"num_attention_heads": 4, "hidden_size": 64, "rotary_dim": 8}),
    # Its head has a part that is called decoder.
    "modernbert-decoder": Tiny(ModernBertDecoderConfig, {"local_attention": 22, "global_attn_every_n_layers": 2}),
    "gpt": Tiny(OpenAIGPTConfig, {"n_head": 6, "n_positions": 256}),
    "xglm": Tiny(XGLMConfig, {"attention_heads": 6, "ffn_dim": 90}),
    # Learnt positions, no scale, every second layer with a window.
    "gpt-neo": Tiny(
        GPTNeoConfig, {"num_hidden_layers": 4, "attention_types": [[["global", "local"], 2]], "window_size": 11}
    ),
    "falcon": Tiny(FalconConfig, {"multi_query": True, "parallel_attn": True, "bias": False}),
    "falcon-groups": Tiny(FalconConfig, {"new_decoder_architecture": True, "num_kv_heads": 2}),
    # ALiBi. Transformers rounds Falcon's to bfloat16, which holds the products of 8 heads' slopes, and its eager
    # attention adds it twice (once within the mask).
    "falcon-alibi": Tiny(
        FalconConfig,
        {
            "alibi": True,
            "num_attention_heads": 8,
            "hidden_size": 64,
            "multi_query": False,
            "attn_implementation": "sdpa",
        },
    ),
    "bloom": Tiny(BloomConfig, {"n_head": 6}),
    "mpt": Tiny(MptConfig, {"d_model": 60, "n_heads": 6, "n_layers": 2, "max_seq_len": 256}),
}
REFUSED = {
    "cpmant": (
        Tiny(CpmAntConfig, {"dim_head": 10, "dim_ff": 90, "prompt_types": 4, "prompt_length": 4, "segment_types": 4}),
        "cannot be tried out",
    ),
    "xlm": (Tiny(XLMConfig, {"emb_dim": 60, "n_heads": 6, "n_layers": 2}), "cannot be tried out"),
    "roberta": (Tiny(RobertaConfig, {"is_decoder": True}), "from its padding token on"),
}


@pytest.mark.parametrize("name", CARRIED)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    reference = save_model(CARRIED[name], tmp_path)
    assert read_spec(tmp_path)[1] is TransformersModel
    check_logits(reference, tmp_path)


def test_longrope_is_chosen_by_the_longest_sequence_that_is_served(tmp_path: Path) -> None:
    """A row within the original context, where sequences may have 256 tokens: the beginning of a longer row."""
    reference = save_model(CARRIED["longrope"], tmp_path)
    tokens = list(range(5, 45))
    with torch.inference_mode():
        expected = reference(torch.tensor([tokens])).logits[0][:10]
    torch.testing.assert_close(PagedModel(tmp_path).logits(tokens[:10], 0), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt-neox", "vaultgemma"])
def test_the_runner_generates_with_it(name: str, tmp_path: Path) -> None:
    reference = save_model(CARRIED[name], tmp_path)
    settings = WorkerSettings(model=tmp_path, device="cpu", dtype="float32", cpu_kv_cache_gib=0.01, num_threads=1)
    runner = TorchRunner.load(settings)
    assert runner.describe().architecture == type(reference).__name__
    driver = StepDriver(runner)
    for row, length in enumerate((3, 21)):
        driver.add(row, list(range(5, 5 + length)), greedy())
    for _ in range(24):
        driver.step()
    for row, length in enumerate((3, 21)):
        tokens = driver.rows[row].tokens
        with torch.inference_mode():
            logits = reference(torch.tensor([tokens])).logits[0]
        assert logits[length - 1 : -1].argmax(-1).tolist() == tokens[length:]


def test_random_weights(tmp_path: Path) -> None:
    save_model(CARRIED["gpt-neox"], tmp_path)
    (tmp_path / "model.safetensors").unlink()
    settings = WorkerSettings(model=tmp_path, device="cpu", load_format="dummy", cpu_kv_cache_gib=0.01, num_threads=1)
    driver = StepDriver(TorchRunner.load(settings))
    driver.add(0, [5, 6, 7], greedy())
    driver.step()
    assert len(driver.rows[0].tokens) == 4


def test_it_is_built_on_device_meta_once_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(CARRIED["gpt-neox"], tmp_path, vocab_size=311)
    built: list[str] = []
    build = fallback_probe._build

    def watched(config: Any, architecture: str, dtype: torch.dtype) -> Any:
        built.append(architecture)
        return build(config, architecture, dtype)

    monkeypatch.setattr(fallback_probe, "_build", watched)
    PagedModel(tmp_path)
    assert built == ["GPTNeoXForCausalLM"]
    # Nor in the type that it runs in: its rows keep nothing but keys and values.
    settings = WorkerSettings(model=tmp_path, device="cpu", dtype="bfloat16", num_threads=1, cpu_kv_cache_gib=0.01)
    TorchRunner.load(settings)
    assert len(built) == 1
    # Another config in the same place is another model.
    _edit(tmp_path, num_hidden_layers=1)
    assert read_spec(tmp_path)[0].num_layers == 1
    assert len(built) == 2


def test_experts_are_not_copied_for_every_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe has them multiplied that way, whose sizes do not hang on what a router chooses."""
    save_model(CARRIED["phimoe"], tmp_path)
    model = PagedModel(tmp_path)

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("experts are copied")

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "batched_mm", refused)
    assert model.logits([5, 6, 7], 0).shape == (3, 301)


def test_it_says_so(tmp_path: Path) -> None:
    save_model(CARRIED["gpt-neox"], tmp_path)
    with capture_logs() as logs:
        PagedModel(tmp_path)
    lines = [line for line in logs if "no native code" in line["event"]]
    assert [line["architecture"] for line in lines] == ["GPTNeoXForCausalLM"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_carried_in_no_way_is_refused_with_its_reason(name: str, tmp_path: Path) -> None:
    tiny, reason = REFUSED[name]
    save_model(tiny, tmp_path)
    with pytest.raises(ModelConfigError, match=reason):
        PagedModel(tmp_path)


def test_remote_code_is_refused(tmp_path: Path) -> None:
    save_model(CARRIED["gpt2"], tmp_path)
    _edit(tmp_path, architectures=["OwnForCausalLM"], model_type="own", auto_map={"AutoModelForCausalLM": "own.Own"})
    (tmp_path / "own.py").write_text("raise SystemExit('this code was run')\n")
    with pytest.raises(ModelConfigError, match=r"auto_map asks to run the repository's own code for OwnForCausalLM"):
        read_spec(tmp_path)
    # With a known name it is transformers' own code that runs, whatever the repository carries.
    _edit(tmp_path, architectures=["GPT2LMHeadModel"], model_type="gpt2", auto_map={"AutoConfig": "own.Own"})
    assert PagedModel(tmp_path).logits([5, 6, 7], 0).shape == (3, 301)


def test_other_weights_are_an_error(tmp_path: Path) -> None:
    save_model(CARRIED["gpt-neox"], tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    dropped = tensors.pop("gpt_neox.layers.1.mlp.dense_h_to_4h.weight")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks tensors .*layers\.1\.mlp\.dense_h_to_4h\.weight"):
        PagedModel(tmp_path)
    odd = torch.zeros(2)
    save_file(tensors | {"gpt_neox.layers.1.mlp.dense_h_to_4h.weight": dropped, "odd": odd}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="no place for: odd"):
        PagedModel(tmp_path)
    save_file(tensors | {"gpt_neox.layers.1.mlp.dense_h_to_4h.weight": dropped[:-1].clone()}, file, {"format": "pt"})
    with pytest.raises(CheckpointError):
        PagedModel(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    file.unlink()
    with pytest.raises(CheckpointError, match="pickle"):
        PagedModel(tmp_path)


GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
QUANTIZED: dict[str, tuple[type[PretrainedConfig], dict[str, Any], Packer]] = {
    "gptq-biases": (StableLmConfig, GPTQ, gptq()),
    "gptq-experts": (Dots1Config, GPTQ, gptq()),
    "awq": (NemotronConfig, {"quant_method": "awq", "bits": 4, "group_size": 32}, awq()),
    "fp8-experts": (Dots1Config, {"quant_method": "fp8", "weight_block_size": [32, 32]}, float8_by_block()),
    "compressed-tensors": (
        PhiConfig,
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}}},
            "ignore": ["lm_head"],
        },
        packed_integers(),
    ),
}


@pytest.mark.parametrize("case", QUANTIZED)
def test_quantized_weights_are_dequantized_while_they_are_loaded(case: str, tmp_path: Path) -> None:
    config_class, quantization, packer = QUANTIZED[case]
    config = config_class(
        **SIZES, **MIXTURE, n_routed_experts=4, first_k_dense_replace=1, n_shared_experts=1, n_group=1, topk_group=1
    )
    plain = re.compile(r".*(embed_tokens|lm_head|mlp\.gate)")
    publish(tmp_path, config, quantization, lambda name: None if plain.fullmatch(name) else packer)
    packed = load_file(tmp_path / "packed" / "model.safetensors")
    if case == "gptq-biases":  # GPTQModel and AutoGPTQ write zeros where a linear has none
        packed["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(64)
    packed["model.layers.0.self_attn.k_scale"] = torch.ones(1)
    save_file(packed, tmp_path / "packed" / "model.safetensors", {"format": "pt"})
    expected = PagedModel(tmp_path / "plain").logits(list(range(3, 43)), 0)
    assert expected.std() > 0.01
    assert torch.equal(PagedModel(tmp_path / "packed").logits(list(range(3, 43)), 0), expected)


DOTS1 = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    save_model(Tiny(Dots1Config, DOTS1), tmp_path)
    before = PagedModel(tmp_path).logits([5, 6, 7], 0)
    tensors = load_file(tmp_path / "model.safetensors")
    ahead = {"model.layers.3.eh_proj.weight": torch.ones(2), "mtp.fc.weight": torch.ones(2)}
    save_file(tensors | ahead, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no place for: model\.layers\.3\.eh_proj\.weight;"):
        PagedModel(tmp_path)
    _edit(tmp_path, num_nextn_predict_layers=1)
    assert torch.equal(PagedModel(tmp_path).logits([5, 6, 7], 0), before)


def test_plain_weights_are_not_quantized_while_they_are_loaded(tmp_path: Path) -> None:
    save_model(CARRIED["gpt-neox"], tmp_path)
    scheme = make_scheme(tmp_path, {}, setting="int8")
    spec, family = read_spec(tmp_path)
    build = BuildContext(ParallelContext(), scheme, torch.float32, torch.device("cpu"))
    with pytest.raises(ModelConfigError, match="leave --quantization out"):
        family(spec, 256, build)
    _edit(tmp_path, quantization_config={"quant_method": "aqlm"})
    with pytest.raises(ModelConfigError, match="'aqlm', which is not supported"):
        read_spec(tmp_path)


def _edit(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
