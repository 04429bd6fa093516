"""Quantized checkpoints as files: what is accepted, what is refused before anything is allocated, what comes along."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpu_worker.assembly import load_model
from gpu_worker.config import WorkerSettings
from gpu_worker.layers.linear import BuildContext
from gpu_worker.layers.ops import TORCH_OPS
from gpu_worker.layers.sublayer_input import SublayerInput
from gpu_worker.loading.dequantized import DequantizedSource
from gpu_worker.loading.safetensors_reader import SafetensorsReader
from gpu_worker.loading.tensor_source import CheckpointError
from gpu_worker.model_spec import ModelConfigError
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.models.loader import fill_random, read_spec
from gpu_worker.parallel.shares import ParallelContext, Share
from gpu_worker.prepare.gguf_model import prepare_gguf
from gpu_worker.prepare.preparation import prepare
from gpu_worker.prepare.progress import SilentProgress
from gpu_worker.quant.none import UnquantizedLinear
from gpu_worker.quant.on_load import quantize_by_output
from gpu_worker.quant.scheme import GgufScheme, make_scheme, read_quantization
from gpu_worker.quant.stored import SplitLinear, StoredLinear
from tests.unit.gpu_worker.loading.synthetic_gguf import write_gguf
from tests.unit.gpu_worker.models.tiny_checkpoints import save_tiny
from tests.unit.gpu_worker.quant.paged_model import QuantizedModel, fixture

CPU = torch.device("cpu")
DOWN = "model.layers.0.mlp.down_proj"


def edited(name: str, directory: Path, **changes: torch.Tensor | None) -> Path:
    """A copy of a real checkpoint with other tensors."""
    for file in ("config.json", "model.safetensors"):
        shutil.copy(fixture(name) / file, directory / file)
    tensors = load_file(directory / "model.safetensors")
    for tensor, value in changes.items():
        if value is None:
            del tensors[tensor]
        else:
            tensors[tensor] = value
    save_file(tensors, directory / "model.safetensors")
    return directory


def edit_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(directory: Path, monkeypatch: pytest.MonkeyPatch) -> CheckpointError:
    """The error of loading; a model with memory must not have been built."""
    spec, family = read_spec(directory)
    devices: list[torch.device] = []
    build_layers = family.__init__

    def watched(self: Any, spec: Any, max_position: int, build: BuildContext) -> None:
        devices.append(build.device)
        build_layers(self, spec, max_position, build)

    monkeypatch.setattr(family, "__init__", watched)
    build = BuildContext(ParallelContext(), make_scheme(directory, family.name_rules), torch.float32, CPU)
    with pytest.raises(CheckpointError) as error:
        load_model(WorkerSettings(model=directory), family, spec, build, 64)
    assert devices == [torch.device("meta")]
    return error.value


@pytest.mark.parametrize(
    ("name", "tensor", "value", "words"),
    [
        ("awq-g64", f"{DOWN}.qzeros", None, ["lacks 1 tensor"]),
        ("awq-g64", f"{DOWN}.qweight", torch.zeros(1536, 71, dtype=torch.int32), ["[1536, 71]", "[1536, 72]"]),
        ("awq-g64", f"{DOWN}.qweight", torch.zeros(1536, 72), ["float32", "int32"]),
        ("gptq-g64-desc", f"{DOWN}.scales", torch.zeros(24, 576, dtype=torch.int32), ["int32", "bfloat16"]),
        ("gptq-g64-desc", f"{DOWN}.extra", torch.zeros(1), ["has no place for"]),
        ("ct-fp8-dynamic", f"{DOWN}.weight", torch.zeros(576, 1536, dtype=torch.int8), ["int8", "float8_e4m3fn"]),
        ("ct-fp8-dynamic", f"{DOWN}.weight_scale", torch.zeros(575, 1), ["[575, 1]", "[576, 1]"]),
        ("fp8-block", f"{DOWN}.weight_scale_inv", torch.zeros(4, 12), ["[4, 12]", "[5, 12]"]),
        ("fp8-block", "model.norm.weight", torch.zeros(576, dtype=torch.int8), ["int8", "float32"]),
    ],
    ids=str,
)
def test_a_tensor_that_does_not_fit_is_refused_before_memory_is_taken(
    name: str,
    tensor: str,
    value: torch.Tensor | None,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = refusal(edited(name, tmp_path, **{tensor: value}), monkeypatch)
    for word in [tensor, str(tmp_path), *words]:
        assert word in str(error)


def test_quantized_weights_under_a_plain_config_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = edited("ct-fp8-dynamic", tmp_path)
    edit_config(directory, quantization_config=None)
    message = str(refusal(directory, monkeypatch))
    assert "weight_scale" in message and "no place" in message


def test_a_truncated_file_is_refused_by_name(tmp_path: Path) -> None:
    directory = edited("awq-g64", tmp_path)
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    _, family = read_spec(directory)
    with pytest.raises(CheckpointError, match="truncated"):
        make_scheme(directory, family.name_rules)


def test_pickle_files_alone_are_refused(tmp_path: Path) -> None:
    directory = edited("awq-g64", tmp_path)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    _, family = read_spec(directory)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*pickle"):
        make_scheme(directory, family.name_rules)


def test_remote_code_is_refused_where_it_would_be_needed(tmp_path: Path) -> None:
    directory = edited("awq-g64", tmp_path)
    edit_config(directory, auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    assert read_spec(directory)[0].architecture == "LlamaForCausalLM"  # known here: the code is not needed
    edit_config(directory, architectures=["XForCausalLM"])
    with pytest.raises(ModelConfigError, match=r"auto_map.*XForCausalLM.*never.*LlamaForCausalLM"):
        read_spec(directory)


def test_old_gptq_files_without_group_index_and_with_empty_biases(tmp_path: Path) -> None:
    before = QuantizedModel(fixture("gptq-g32-asym-v2")).logits([5, 6, 7])
    names = load_file(fixture("gptq-g32-asym-v2") / "model.safetensors")
    changes: dict[str, torch.Tensor | None] = {name: None for name in names if name.endswith("g_idx")}
    changes[f"{DOWN}.bias"] = torch.zeros(576, dtype=torch.float16)
    assert torch.equal(QuantizedModel(edited("gptq-g32-asym-v2", tmp_path, **changes)).logits([5, 6, 7]), before)
    changes[f"{DOWN}.bias"] = torch.full((576,), 0.5, dtype=torch.float16)
    assert not torch.equal(QuantizedModel(edited("gptq-g32-asym-v2", tmp_path, **changes)).logits([5, 6, 7]), before)


def test_a_quantized_output_head(tmp_path: Path) -> None:
    """Made of the first columns of another linear's tensors, which are what a tool stores for as many outputs."""
    gate = "model.layers.0.mlp.gate_proj"
    stored = load_file(fixture("gptq-g64-desc") / "model.safetensors")
    own = {kind: stored[f"{gate}.{kind}"] for kind in ("qweight", "scales", "g_idx", "qzeros")}
    own |= {"qweight": own["qweight"][:, :256], "scales": own["scales"][:, :256], "qzeros": own["qzeros"][:, :32]}
    quantized = {f"lm_head.{kind}": tensor.contiguous() for kind, tensor in own.items()}
    (tmp_path / "quantized").mkdir()
    directory = edited("gptq-g64-desc", tmp_path / "quantized", **quantized)
    fields = json.loads((directory / "config.json").read_text())
    edit_config(
        directory,
        tie_word_embeddings=False,
        quantization_config=fields["quantization_config"] | {"lm_head": True},
    )
    quant = read_quantization(HfConfig.open(directory))
    assert quant is not None
    kind = quant.format_of("lm_head")
    assert kind is not None
    weight = kind.decode(own, Share(0, 256, 256), Share(0, 576, 576)).dequantize()
    (tmp_path / "plain").mkdir()
    plain = edited("gptq-g64-desc", tmp_path / "plain", **{"lm_head.weight": weight})
    edit_config(plain, tie_word_embeddings=False)
    assert torch.equal(QuantizedModel(directory).logits([5, 6, 7]), QuantizedModel(plain).logits([5, 6, 7]))


def test_ignored_layers_stay_plain(tmp_path: Path) -> None:
    directory = edited("ct-fp8-dynamic", tmp_path)
    tensors = load_file(directory / "model.safetensors")
    plain = tensors.pop(f"{DOWN}.weight").float() * tensors.pop(f"{DOWN}.weight_scale").float()
    q = "model.layers.0.self_attn.q_proj"
    plain_q = tensors.pop(f"{q}.weight").float() * tensors.pop(f"{q}.weight_scale").float()
    save_file(
        {**tensors, f"{DOWN}.weight": plain.bfloat16(), f"{q}.weight": plain_q.bfloat16()},
        directory / "model.safetensors",
    )
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["ignore"] += [DOWN, r"re:.*q_proj$"]
    edit_config(directory, **config)
    whole = QuantizedModel(fixture("ct-fp8-dynamic")).logits([5, 6, 7])
    mixed = QuantizedModel(directory).logits([5, 6, 7])
    assert not torch.equal(mixed, whole)
    assert torch.nn.functional.cosine_similarity(mixed, whole, dim=-1).min() > 0.99


@pytest.mark.parametrize(
    "names",
    [
        ("k_scale", "v_scale"),
        ("attn.k_scale", "attn.v_scale"),
        ("k_proj.k_scale", "v_proj.v_scale"),
        ("k_proj.output_scale", "v_proj.output_scale"),
        ("qkv_proj.k_scale", "qkv_proj.v_scale"),
        ("k_cache.scale", "v_cache.scale"),
        ("kv_scale",),
    ],
)
def test_scales_of_the_kv_cache_come_along(names: tuple[str, ...], tmp_path: Path) -> None:
    scales = [torch.tensor([0.25]), torch.tensor(0.5)]
    changes = {f"model.layers.0.self_attn.{name}": scale for name, scale in zip(names, scales, strict=False)}
    for zero in ("k_zero_point", "v_proj.v_zero_point", "q_zero_point"):
        changes[f"model.layers.0.self_attn.{zero}"] = torch.zeros(1, dtype=torch.int8)
    for unused in ("q_scale", "q_proj.output_scale", "prob_scale"):
        changes[f"model.layers.0.self_attn.{unused}"] = torch.ones(1)
    model = QuantizedModel(edited("fp8-block", tmp_path, **changes)).model
    assert model.kv_scales is not None
    (only,) = model.kv_scales
    assert (only.key, only.value) == (0.25, 0.25 if len(names) == 1 else 0.5)


@pytest.mark.parametrize("value", [torch.tensor(0.0), torch.ones(3), torch.tensor(float("nan"))])
def test_a_scale_of_the_kv_cache_that_is_no_positive_number_is_refused(value: torch.Tensor, tmp_path: Path) -> None:
    directory = edited("fp8-block", tmp_path, **{"model.layers.0.self_attn.k_scale": value})
    with pytest.raises(CheckpointError, match="k_scale"):
        QuantizedModel(directory)


def test_a_cache_with_a_zero_point_is_refused(tmp_path: Path) -> None:
    directory = edited("fp8-block", tmp_path, **{"model.layers.0.self_attn.v_zero_point": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"v_zero_point.*only symmetric scales are supported"):
        QuantizedModel(directory)


def test_layers_that_keep_no_packed_weights_see_plain_ones() -> None:
    """Experts, for instance: the checkpoint's `weight` as if it were stored plainly, any part of it."""
    for name in ("awq-g64", "ct-w4a16-asym", "fp8-block"):
        quant = read_quantization(HfConfig.open(fixture(name)))
        assert quant is not None
        reader = SafetensorsReader(fixture(name))
        source = DequantizedSource(reader, quant.format_of, {f"{DOWN}.weight"})
        infos = {info.name: info for info in source.names()}
        assert infos[f"{DOWN}.weight"].shape == (576, 1536)
        assert not [info for info in infos if info.startswith(DOWN) and info != f"{DOWN}.weight"]
        whole = source.read(f"{DOWN}.weight")
        assert whole.dtype == torch.bfloat16 and whole.float().std() > 0.01
        part = source.read(f"{DOWN}.weight", (slice(100, 228), slice(640, 768)))
        assert torch.equal(part, whole[100:228, 640:768])


def test_gpt_oss_experts_are_those_that_transformers_unpacks(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(4)
    blocks = torch.randint(0, 256, (3, 32, 4, 16), generator=generator).to(torch.uint8)
    scales = torch.randint(118, 130, (3, 32, 4), generator=generator).to(torch.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    save_file({f"{name}_blocks": blocks, f"{name}_scales": scales}, tmp_path / "model.safetensors")
    source = DequantizedSource(SafetensorsReader(tmp_path), lambda module: None, {name})
    (info,) = source.names()
    assert (info.name, info.shape) == (name, (3, 128, 32))
    expected = convert_moe_packed_tensors(blocks, scales)
    assert torch.equal(source.read(name), expected)
    part = source.read(name, (slice(1, 2), slice(32, 64), slice(4, 12)))
    assert torch.equal(part, expected[1:2, 32:64, 4:12])


def test_experts_of_a_quantized_mixture_are_found_by_both_numbers(tmp_path: Path) -> None:
    """Weights in float8 by output, as compressed-tensors writes them, beside transformers on what they stand for."""
    reference = save_tiny("mixtral", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    stands_for = {}
    for name in [name for name in tensors if ".experts." in name]:
        weight = tensors[name]
        scale = weight.abs().amax(dim=1, keepdim=True) / 448
        tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = scale
        stands_for[name] = tensors[name].float() * scale
    assert stands_for
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
    group = {"targets": ["re:.*experts.*"], "weights": weights, "input_activations": None}
    edit_config(
        tmp_path,
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": group},
            "ignore": [],
        },
    )
    tokens = list(range(3, 40))
    ours = QuantizedModel(tmp_path).logits(tokens)
    plain = tmp_path / "plain"
    plain.mkdir()
    save_tiny("mixtral", plain)
    save_file(
        load_file(plain / "model.safetensors") | stands_for, plain / "model.safetensors", metadata={"format": "pt"}
    )
    model = type(reference).from_pretrained(plain, dtype=torch.float32, experts_implementation="eager").eval()
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("setting", ["fp8", "int8"])
def test_plain_weights_are_quantized_while_they_are_loaded(setting: Any, tmp_path: Path) -> None:
    save_tiny("qwen2", tmp_path)
    token_ids = list(range(3, 43))
    plain = QuantizedModel(tmp_path).logits(token_ids)
    model = QuantizedModel(tmp_path, setting=setting)
    got = model.logits(token_ids)
    assert torch.nn.functional.cosine_similarity(got, plain, dim=-1).mean() > 0.98
    assert not torch.equal(got, plain)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantizing_on_load_is_round_to_nearest_by_output(dtype: torch.dtype) -> None:
    weight = torch.randn(1500, 64) * torch.rand(1500, 1)
    quantized = quantize_by_output(weight, dtype)
    error = (quantized.dequantize() - weight).abs()
    step = weight.abs().amax(1, keepdim=True) / (127 if dtype == torch.int8 else 448)
    bound = step * 0.501 if dtype == torch.int8 else (weight.abs() / 16).maximum(step * 2**-9) * 1.01
    assert (error <= bound).all()


def test_dummy_weights_and_a_second_quantization(tmp_path: Path) -> None:
    directory = edited("gptq-g64-desc", tmp_path)
    spec, family = read_spec(directory)
    with pytest.raises(ModelConfigError, match=r"set to fp8.*gptq 4 bit.*leave --quantization out"):
        make_scheme(directory, family.name_rules, setting="fp8")
    (directory / "model.safetensors").unlink()
    scheme = make_scheme(directory, family.name_rules, has_weights=False)
    model = family(spec, 64, BuildContext(ParallelContext(), scheme, torch.float32, CPU))
    fill_random(model, None, 3)
    hidden = model.blocks[0].mlp.apply(SublayerInput.of(TORCH_OPS, torch.randn(4, 576)))
    assert torch.isfinite(hidden).all() and 0.05 < hidden.std() < 5


def test_a_gguf_file_is_read_without_conversion(tmp_path: Path) -> None:
    """Blocks of several types in one layer, in parts of a fused linear too, against the converted model."""
    from gguf import GGMLQuantizationType as Kind

    kinds = {"attn_q": Kind.Q4_0, "attn_k": Kind.Q4_0, "attn_v": Kind.Q8_0, "ffn_gate": Kind.Q5_0, "ffn_up": Kind.Q5_0}
    quantized = {f"blk.{layer}.{name}.weight": kind for name, kind in kinds.items() for layer in (0, 1)}
    quantized["token_embd.weight"] = Kind.Q8_0
    directory = tmp_path / "packed"
    directory.mkdir()
    write_gguf(directory / "model.gguf", "llama", quantized=quantized)
    prepare_gguf(directory / "model.gguf", tmp_path / "converted", "float32", SilentProgress())
    shutil.copy(tmp_path / "converted" / "config.json", directory / "config.json")
    edit_config(directory, quantization_config={"quant_method": "gguf"})
    token_ids = list(range(3, 33))
    packed = QuantizedModel(directory)
    qkv, gate_up = packed.model.blocks[0].attention.qkv.method, packed.model.blocks[1].mlp.gate_up.method
    assert isinstance(qkv, SplitLinear) and isinstance(gate_up, StoredLinear)
    assert isinstance(packed.model.blocks[0].mlp.down.method, UnquantizedLinear)
    converted = QuantizedModel(tmp_path / "converted").logits(token_ids)
    torch.testing.assert_close(packed.logits(token_ids), converted, rtol=1e-5, atol=1e-4)


FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# What tools pack or scale along the outputs, and where: all else is one for all parts.
OUTPUT_AXES = {
    "gptq": {"qweight": 1, "qzeros": 1, "scales": 1},
    "awq": {"qweight": 1, "qzeros": 1, "scales": 1},
    "ct": {"weight_packed": 0, "weight_scale": 0, "weight_zero_point": 0, "weight": 0},
}


@pytest.mark.parametrize("name", ["awq-g64", "gptq-g32-asym-v2", "gptq-g64-desc", "ct-w4a16-asym", "ct-fp8-dynamic"])
def test_projections_that_a_checkpoint_fuses(name: str, tmp_path: Path) -> None:
    """Phi-3's layout, made of a real Llama's tensors: they lie side by side as the tool would have written them."""
    directory = edited(name, tmp_path)
    tensors = load_file(directory / "model.safetensors")
    axes = OUTPUT_AXES[name.split("-")[0]]
    for whole, parts in FUSED.items():
        block = "mlp" if whole == "gate_up_proj" else "self_attn"
        prefix = f"model.layers.0.{block}"
        for kind in [each.rpartition(".")[2] for each in list(tensors) if each.startswith(f"{prefix}.{parts[0]}.")]:
            stored = [tensors.pop(f"{prefix}.{part}.{kind}") for part in parts]
            if kind in axes:
                tensors[f"{prefix}.{whole}.{kind}"] = torch.cat(stored, axes[kind])
            elif kind == "weight_shape":
                tensors[f"{prefix}.{whole}.{kind}"] = torch.tensor([sum(int(s[0]) for s in stored), int(stored[0][1])])
            else:
                assert all(torch.equal(one, stored[0]) for one in stored), kind
                tensors[f"{prefix}.{whole}.{kind}"] = stored[0]
    save_file(tensors, directory / "model.safetensors")
    edit_config(directory, architectures=["Phi3ForCausalLM"], model_type="phi3")
    token_ids = list(range(3, 33))
    fused = QuantizedModel(directory)
    assert type(fused.model).__name__ == "Phi3"
    assert torch.equal(fused.logits(token_ids), QuantizedModel(fixture(name)).logits(token_ids))


def test_a_fused_part_that_begins_inside_of_a_word_is_refused(tmp_path: Path) -> None:
    from transformers.models.phi3 import Phi3Config

    from gpu_worker.models.loader import check_weights

    # Queries have 3 * 4 outputs, and a word of AWQ has 8.
    config = Phi3Config(
        hidden_size=16,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=4,
        intermediate_size=16,
        num_hidden_layers=1,
        vocab_size=32,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    config.save_pretrained(tmp_path)
    edit_config(
        tmp_path,
        architectures=["Phi3ForCausalLM"],
        quantization_config={"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True},
    )
    tensors: dict[str, torch.Tensor] = {"model.embed_tokens.weight": torch.zeros(32, 16)}
    for norm in ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"):
        tensors[f"{norm}.weight"] = torch.zeros(16)
    sizes = {"self_attn.qkv_proj": (16, 24), "self_attn.o_proj": (12, 16), "mlp.gate_up_proj": (16, 32)}
    for module, (inputs, outputs) in {**sizes, "mlp.down_proj": (16, 16)}.items():
        tensors[f"model.layers.0.{module}.qweight"] = torch.zeros(inputs, outputs // 8, dtype=torch.int32)
        tensors[f"model.layers.0.{module}.qzeros"] = torch.zeros(1, outputs // 8, dtype=torch.int32)
        tensors[f"model.layers.0.{module}.scales"] = torch.zeros(1, outputs)
    save_file(tensors, tmp_path / "model.safetensors")
    spec, family = read_spec(tmp_path)
    build = BuildContext(
        ParallelContext(), make_scheme(tmp_path, family.name_rules), torch.float32, torch.device("meta")
    )
    with pytest.raises(CheckpointError, match=r"qkv_proj\.q(weight|zeros)"):
        check_weights(family(spec, 64, build), tmp_path)


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma3"])
def test_prepare_keeps_a_gguf_file_packed(architecture: str, tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType as Kind

    kinds = {"attn_q": Kind.Q4_0, "attn_k": Kind.Q8_0, "attn_qkv": Kind.Q8_0, "ffn_up": Kind.Q5_0}
    quantized = {f"blk.{layer}.{name}.weight": kind for name, kind in kinds.items() for layer in (0, 1)}
    write_gguf(tmp_path / "m.gguf", architecture, quantized=quantized)
    packed = prepare(tmp_path / "m.gguf", tmp_path / "cache", dtype="packed", progress=SilentProgress())
    plain = prepare(tmp_path / "m.gguf", tmp_path / "cache", dtype="float32", progress=SilentProgress())
    assert packed.path != plain.path and not list(packed.path.glob("*.safetensors"))
    assert (packed.path / "model.gguf").samefile(tmp_path / "m.gguf")
    assert prepare(tmp_path / "m.gguf", tmp_path / "cache", dtype="packed", progress=SilentProgress()).reused
    assert prepare(packed.path, tmp_path / "cache", progress=SilentProgress()).path == packed.path
    model = QuantizedModel(packed.path)
    methods = [linear.method for linear in (model.model.blocks[0].attention.qkv, model.model.blocks[1].mlp.gate_up)]
    assert all(isinstance(method, SplitLinear | StoredLinear) for method in methods)
    token_ids = list(range(3, 33))
    expected = QuantizedModel(plain.path).logits(token_ids)
    torch.testing.assert_close(model.logits(token_ids), expected, rtol=1e-5, atol=1e-4)


def test_a_packed_gguf_file_under_a_familys_own_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a family renames or leaves out it does here as well."""
    from gguf import GGMLQuantizationType as Kind

    from gpu_worker.models.llama import Llama

    write_gguf(tmp_path / "m.gguf", quantized={f"blk.{layer}.ffn_down.weight": Kind.Q8_0 for layer in (0, 1)})
    directory = prepare(tmp_path / "m.gguf", tmp_path / "cache", dtype="packed", progress=SilentProgress()).path
    before = QuantizedModel(directory)
    rules = {
        path: {part: name.replace("model.", "own.") for part, name in parts.items()}
        for path, parts in Llama.name_rules.items()
    }
    monkeypatch.setattr(Llama, "name_rules", rules)
    monkeypatch.setattr(Llama, "canonical_name", classmethod(lambda cls, name: name.replace("model.", "own.")))
    after = QuantizedModel(directory)
    assert isinstance(after.model.blocks[0].mlp.down.method, StoredLinear)
    assert torch.equal(after.logits([5, 6, 7]), before.logits([5, 6, 7]))
    monkeypatch.setattr(Llama, "skipped_tensors", r"model\.norm\.")
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor that the model needs: own\.norm\.weight"):
        QuantizedModel(directory)


def test_a_gguf_file_of_an_unknown_type_is_refused(tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType as Kind

    write_gguf(tmp_path / "model.gguf", "llama", quantized={"blk.0.ffn_up.weight": Kind.Q8_0})
    data = (tmp_path / "model.gguf").read_bytes()
    at = data.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 2 * 8
    assert data[at] == int(Kind.Q8_0)
    (tmp_path / "model.gguf").write_bytes(data[:at] + bytes([250]) + data[at + 1 :])
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_up\.weight.*250"):
        GgufScheme(tmp_path / "model.gguf", {})
