"""Whole checkpoints with the `quantization_config` that a publisher wrote, and with what it leaves unsaid."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GraniteMoeConfig,
    Llama4TextConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from gpu_worker.assembly import load_model
from gpu_worker.config import WorkerSettings
from gpu_worker.errors import LoadError
from gpu_worker.layers.linear import BuildContext
from gpu_worker.loading.tensor_source import CheckpointError
from gpu_worker.models.loader import read_spec
from gpu_worker.parallel.shares import ParallelContext
from gpu_worker.quant.scheme import make_scheme
from tests.unit.gpu_worker.quant.paged_model import QuantizedModel
from tests.unit.gpu_worker.quant.published import (
    MIXTURE,
    SIZES,
    Packer,
    assert_equal_logits,
    assert_equal_weights,
    awq,
    float8_by_block,
    float8_by_output,
    float8_of_exponents,
    gptq,
    packed_integers,
    publish,
)

PLAIN = r"(.*\.)?(lm_head|embed_tokens|gate|shared_expert_gate)"
OLD_GPTQ = {  # transformers 4.39 with optimum
    "batch_size": 1,
    "block_name_to_quantize": None,
    "cache_block_outputs": True,
    "damp_percent": 0.1,
    "dataset": None,
    "desc_act": False,
    "exllama_config": {"version": 1},
    "max_input_length": None,
    "model_seqlen": None,
    "module_name_preceding_first_block": None,
    "modules_in_block_to_quantize": None,
    "pad_token_id": None,
    "quant_method": "gptq",
    "tokenizer": None,
    "true_sequential": True,
    "use_cuda_fp16": False,
    "use_exllama": True,
}
NEW_GPTQ = {  # GPTQModel
    "checkpoint_format": "gptq",
    "desc_act": False,
    "format": "gptq",
    "lm_head": False,
    "meta": {"damp_percent": 0.01, "mse": 0.0, "quantizer": ["gptqmodel:4.0.0"], "static_groups": False},
    "method": "gptq",
    "pack_dtype": "int32",
    "quant_method": "gptq",
    "sym": True,
}
AWQ = {"bits": 4, "group_size": 32, "quant_method": "awq", "version": "gemm", "zero_point": True}


def int4(**more: Any) -> dict[str, Any]:
    fixed = {"actorder": None, "block_structure": None, "dynamic": False, "observer": "minmax", "observer_kwargs": {}}
    return fixed | {"group_size": 32, "num_bits": 4, "strategy": "group", "symmetric": True, "type": "int"} | more


def float8(**more: Any) -> dict[str, Any]:
    return int4(group_size=None, num_bits=8, strategy="channel", type="float", **more)


FLOAT8_TOKENS = float8() | {"dynamic": True, "strategy": "token"}


def group(weights: dict[str, Any], *targets: str, **more: Any) -> dict[str, Any]:
    return {"input_activations": None, "output_activations": None, "targets": list(targets), "weights": weights} | more


def compressed(format_name: str, *groups: dict[str, Any], ignore: list[str], **more: Any) -> dict[str, Any]:
    return {
        "config_groups": {f"group_{number}": fields for number, fields in enumerate(groups)},
        "format": format_name,
        "global_compression_ratio": None,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.12.2",
    } | more


@dataclass(frozen=True)
class Published:
    config_class: type[PretrainedConfig]
    quantization: dict[str, Any]
    packers: list[tuple[str, Packer | None]]
    """The first pattern that a module's name matches says how it is packed."""
    fields: dict[str, Any] = field(default_factory=dict)

    def packer_of(self) -> Callable[[str], Packer | None]:
        return lambda name: next((packer for pattern, packer in self.packers if re.fullmatch(pattern, name)), None)

    def write(self, directory: Path) -> Path:
        return publish(
            directory, self.config_class(**(SIZES | MIXTURE | self.fields)), self.quantization, self.packer_of()
        )


CASES = {
    # Routers and the shared expert's gate are no linears that the tool quantizes, and no list says so.
    "gptq-mixture": Published(
        Qwen2MoeConfig, OLD_GPTQ | {"bits": 4, "group_size": 32}, [(PLAIN, None), (".*", gptq())]
    ),
    "gptq-one-group": Published(
        Qwen3Config, OLD_GPTQ | {"bits": 8, "group_size": -1}, [(PLAIN, None), (".*", gptq(8, -1))]
    ),
    "gptq-v2": Published(
        Qwen3Config,
        NEW_GPTQ | {"bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2", "format": "gptq_v2"},
        [(PLAIN, None), (".*", gptq(version=2))],
    ),
    "gptq-dynamic": Published(
        Qwen3Config,
        NEW_GPTQ
        | {
            "bits": 4,
            "group_size": 32,
            "lm_head": True,
            "dynamic": {
                r"-:model\.layers\.0\.self_attn\..*": {},
                r"+:.*\.down_proj$": {"bits": 8, "group_size": 64},
                "lm_head": {"bits": 8},
            },
        },
        [
            (r".*embed_tokens|model\.layers\.0\.self_attn\..*", None),
            (".*down_proj", gptq(8, 64)),
            ("lm_head", gptq(8)),
            (".*", gptq()),
        ],
    ),
    "gptq-biases": Published(
        Qwen2Config, OLD_GPTQ | {"bits": 4, "group_size": 32, "desc_act": True}, [(PLAIN, None), (".*", gptq())]
    ),
    "awq-biases": Published(Qwen2Config, AWQ | {"modules_to_not_convert": ["visual"]}, [(PLAIN, None), (".*", awq())]),
    # A head that is quantized though an old config has no word for it.
    "gptq-unsaid-head": Published(
        Qwen3Config, OLD_GPTQ | {"bits": 4, "group_size": 32}, [(".*embed_tokens", None), (".*", gptq())]
    ),
    "awq": Published(
        Qwen3Config,
        AWQ | {"backend": "autoawq", "do_fuse": False, "exllama_config": None, "modules_to_not_convert": None},
        [(PLAIN, None), (".*", awq())],
        {"dtype": "float16"},
    ),
    "awq-one-group": Published(Qwen3Config, AWQ | {"group_size": None}, [(PLAIN, None), (".*", awq(-1))]),
    "awq-mixtral": Published(MixtralConfig, AWQ | {"modules_to_not_convert": ["gate"]}, [(PLAIN, None), (".*", awq())]),
    # The list's pieces are in the names of other modules too: `gate` in gate_proj.
    "awq-pieces-of-names": Published(
        Qwen3MoeConfig, AWQ | {"modules_to_not_convert": ["gate", "lm_head"]}, [(PLAIN, None), (".*", awq())]
    ),
    "awq-skips": Published(
        Qwen3MoeConfig,
        AWQ | {"modules_to_not_convert": ["self_attn", "mlp.gate", "layers.0.", "mtp"]},
        [(rf"{PLAIN}|.*self_attn.*|.*layers\.0\..*", None), (".*", awq())],
    ),
    "awq-by-gptqmodel": Published(
        Qwen3Config,
        {key: value for key, value in NEW_GPTQ.items() if key != "sym"}
        | AWQ
        | {"checkpoint_format": "gemm", "format": "gemm", "method": "awq", "desc_act": False},
        [(PLAIN, None), (".*", awq())],
    ),
    # Written with transformers 5, where a router is no Linear: it is neither targeted nor ignored by name.
    "compressed-mixture": Published(
        Qwen3MoeConfig,
        compressed("pack-quantized", group(int4(), "Linear"), ignore=["lm_head"]),
        [(PLAIN, None), (".*", packed_integers())],
    ),
    # Experts that the library has in one tensor a layer, which is no Linear either.
    "compressed-llama-4": Published(
        Llama4TextConfig,
        compressed("pack-quantized", group(int4(), "Linear"), ignore=["lm_head", "re:.*router"]),
        [(rf"{PLAIN}|.*router", None), (".*", packed_integers())],
        {
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 64,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 16,
        },
    ),
    "compressed-granite-moe": Published(
        GraniteMoeConfig,
        compressed("pack-quantized", group(int4(), "Linear"), ignore=["lm_head"]),
        [(rf"{PLAIN}|.*router.*", None), (".*", packed_integers())],
    ),
    "compressed-mixed-precision": Published(
        Qwen3Config,
        compressed(
            "mixed-precision",
            group(float8(), r"re:.*self_attn\.(q|k|v|o)_proj$", format="float-quantized"),
            group(int4(num_bits=8), "model.layers.1.mlp.down_proj", format="pack-quantized"),
            group(int4(), "Linear", format="pack-quantized"),
            ignore=["lm_head", "re:.*vision_tower.*", "model.layers.7.mlp.gate", r"re:model\.layers\.0\.mlp\.up_proj"],
        ),
        [
            (rf"{PLAIN}|model\.layers\.0\.mlp\.up_proj", None),
            (".*self_attn.*", float8_by_output),
            (r"model\.layers\.1\.mlp\.down_proj", packed_integers(8)),
            (".*", packed_integers()),
        ],
    ),
    "compressed-head-and-embedding": Published(
        Qwen3Config,
        compressed("pack-quantized", group(int4(num_bits=8), "Linear", "Embedding"), ignore=[]),
        [(".*", packed_integers(8))],
    ),
    # 4-bit weights whose inputs another runtime would quantize to 8 bits.
    "compressed-w4a8": Published(
        Qwen3Config,
        compressed(
            "pack-quantized",
            group(int4(), "Linear", input_activations=FLOAT8_TOKENS),
            ignore=["lm_head"],
        ),
        [(PLAIN, None), (".*", packed_integers())],
    ),
}


def in_elevenths(packer: Packer) -> Packer:
    """Scales that float16 holds and bfloat16 does not."""
    factor = torch.tensor(1.1).half()

    def packed(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        tensors, plain = packer(weight)
        return tensors | {"scales": tensors["scales"] * factor}, plain * factor.float()

    return packed


@pytest.mark.parametrize("packer", [gptq(), awq()], ids=["gptq", "awq"])
def test_experts_and_heads_are_dequantized_to_the_type_that_is_computed_in(packer: Packer, tmp_path: Path) -> None:
    settings = AWQ if packer.__qualname__.startswith("awq") else NEW_GPTQ | {"bits": 4, "group_size": 32}
    plain = ".*(embed_tokens|gate|shared_expert_gate)"
    packers: list[tuple[str, Packer | None]] = [(plain, None), (".*", in_elevenths(packer))]
    assert_equal_logits(Published(Qwen2MoeConfig, settings | {"lm_head": True}, packers).write(tmp_path))


@pytest.mark.parametrize("case", CASES)
def test_a_published_checkpoint_computes_what_its_weights_stand_for(case: str, tmp_path: Path) -> None:
    assert_equal_logits(CASES[case].write(tmp_path))


FLOAT8_CASES = {
    # DeepSeek names nothing that it leaves plain.
    "fp8-blocks-without-a-list": Published(
        Qwen3MoeConfig,
        {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [32, 32]},
        [(PLAIN, None), (".*", float8_by_block())],
    ),
    "fp8-blocks-with-a-list": Published(
        Qwen3MoeConfig,
        {
            "activation_scheme": "dynamic",
            "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate", "gate"],
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [32, 32],
        },
        [(PLAIN, None), (".*", float8_by_block())],
    ),
    "mxfp8": Published(
        Qwen3Config,
        {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "modules_to_not_convert": ["lm_head", "model.embed_tokens"],
            "quant_method": "mxfp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [1, 32],
        },
        [(PLAIN, None), (".*", float8_of_exponents)],
    ),
    "compressed-float8-by-token": Published(
        Qwen3MoeConfig,
        compressed(
            "float-quantized",
            group(float8(), "Linear", input_activations=FLOAT8_TOKENS),
            ignore=["lm_head"],
        ),
        [(PLAIN, None), (".*", float8_by_output)],
    ),
}


@pytest.mark.parametrize("case", FLOAT8_CASES)
def test_published_float8_weights_are_those_that_were_packed(case: str, tmp_path: Path) -> None:
    directory = FLOAT8_CASES[case].write(tmp_path)
    assert_equal_weights(directory)
    spec, family = read_spec(directory / "packed")
    scheme = make_scheme(directory / "packed", family.name_rules)
    build = BuildContext(ParallelContext(), scheme, torch.float32, torch.device("cpu"))
    load_model(WorkerSettings(model=directory / "packed"), family, spec, build, 64)


def test_mxfp8_means_what_transformers_makes_of_it(tmp_path: Path) -> None:
    directory = FLOAT8_CASES["mxfp8"].write(tmp_path)
    # It unpacks such weights where there is no GPU, to bfloat16, which holds all of these.
    reference = AutoModelForCausalLM.from_pretrained(directory / "packed", dtype=torch.bfloat16).float().eval()
    stored = load_file(directory / "packed" / "model.safetensors")
    scales = [name for name in stored if name.endswith("_scale_inv")]
    assert len(scales) == 14 and all(stored[name].dtype == torch.uint8 for name in scales)
    tokens = list(range(3, 43))
    with torch.inference_mode():
        expected = reference(torch.tensor([tokens])).logits[0]
    logits = QuantizedModel(directory / "packed").logits(tokens)
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("shards", [1, 2])
def test_a_repository_of_2023(shards: int, tmp_path: Path) -> None:
    """Settings in a file of their own, weights under a name that says them, in one file or in shards without index."""
    directory = CASES["gptq-mixture"].write(tmp_path) / "packed"
    expected = QuantizedModel(directory).logits([5, 6, 7])
    config = json.loads((directory / "config.json").read_text())
    settings = config.pop("quantization_config")
    (directory / "config.json").write_text(json.dumps(config))
    own = {name: settings[name] for name in ("bits", "group_size", "desc_act", "damp_percent", "true_sequential")}
    name = "gptq_model-4bit-32g"
    own |= {"sym": True, "model_name_or_path": None, "model_file_base_name": name}
    (directory / "quantize_config.json").write_text(json.dumps(own))
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    for shard in range(shards):
        file = f"{name}.safetensors" if shards == 1 else f"{name}-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file({key: tensors[key] for key in sorted(tensors)[shard::shards]}, directory / file)
    assert torch.equal(QuantizedModel(directory).logits([5, 6, 7]), expected)


def test_float8_blocks_whose_scales_are_not_called_by_their_opposite(tmp_path: Path) -> None:
    directory = FLOAT8_CASES["fp8-blocks-without-a-list"].write(tmp_path) / "packed"
    expected = QuantizedModel(directory).logits([5, 6, 7])
    file = directory / "model.safetensors"
    save_file({name.removesuffix("_inv"): tensor for name, tensor in load_file(file).items()}, file)
    assert torch.equal(QuantizedModel(directory).logits([5, 6, 7]), expected)


LEFTOVERS = {
    "qlora": {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_type": "nf4",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    },
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 6.0, "quant_method": "bitsandbytes"},
    "gptq": OLD_GPTQ | {"bits": 4, "group_size": 32},
    "fp8": {"activation_scheme": "dynamic", "quant_method": "fp8", "weight_block_size": [128, 128]},
}


@pytest.mark.parametrize("case", LEFTOVERS)
def test_a_config_that_is_left_over_from_training(case: str, tmp_path: Path) -> None:
    """Adapters merged into plain weights, under the config of the model that they were trained on."""
    assert_equal_logits(Published(Qwen3Config, LEFTOVERS[case], [(".*", None)]).write(tmp_path))


def test_symmetric_awq_with_its_zero_points(tmp_path: Path) -> None:
    """GPTQModel writes 8s beside `zero_point: false`, others an empty tensor or none."""
    directory = CASES["awq"].write(tmp_path)
    file = directory / "packed" / "model.safetensors"
    tensors = load_file(file)
    shifted = {name: torch.full_like(zeros, -0x77777778) for name, zeros in tensors.items() if name.endswith("qzeros")}
    results = []
    for change in (shifted, {name: torch.zeros_like(zeros) for name, zeros in shifted.items()}, None):
        kept = {name: tensor for name, tensor in tensors.items() if name not in shifted} | (change or {})
        save_file(kept, file, {"format": "pt"})
        config = (directory / "packed" / "config.json").read_text()
        (directory / "packed" / "config.json").write_text(config.replace('"zero_point": true', '"zero_point": false'))
        results.append(QuantizedModel(directory / "packed").logits([5, 6, 7]))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("number", [-1, 99])
def test_groups_that_do_not_exist_are_refused(number: int, tmp_path: Path) -> None:
    file = CASES["gptq-biases"].write(tmp_path) / "packed" / "model.safetensors"
    tensors = load_file(file)
    save_file(
        {name: torch.full_like(tensor, number) if "g_idx" in name else tensor for name, tensor in tensors.items()}, file
    )
    with pytest.raises(LoadError, match=rf"g_idx holds numbers from {number} to {number}, and a weight has 2 groups"):
        QuantizedModel(file.parent)


def test_an_index_of_groups_that_was_never_filled(tmp_path: Path) -> None:
    """compressed-tensors begins it with -1, which its own code takes for groups in their order."""
    fields = compressed("pack-quantized", group(int4(actorder="group"), "Linear"), ignore=["lm_head"])
    directory = Published(Qwen3Config, fields, [(PLAIN, None), (".*", packed_integers())]).write(tmp_path)
    file = directory / "packed" / "model.safetensors"
    tensors = load_file(file)
    indices = {
        name.replace("_packed", "_g_idx"): torch.full((64,), -1, dtype=torch.int32)
        for name in tensors
        if name.endswith("weight_packed")
    }
    save_file(tensors | indices, file)
    assert_equal_logits(directory)


def test_packed_weights_that_no_config_speaks_of_are_refused_as_such(tmp_path: Path) -> None:
    directory = CASES["awq"].write(tmp_path) / "packed"
    fields = json.loads((directory / "config.json").read_text())
    del fields["quantization_config"]
    (directory / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"lacks 14 tensors.*quantized in another way than the config says, or"):
        QuantizedModel(directory)


def test_a_float8_weight_whose_scale_is_missing_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    directory = FLOAT8_CASES["fp8-blocks-without-a-list"].write(tmp_path) / "packed"
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    del tensors[f"{name}_scale_inv"]
    save_file(tensors, directory / "model.safetensors")
    spec, family = read_spec(directory)
    build = BuildContext(
        ParallelContext(), make_scheme(directory, family.name_rules), torch.float32, torch.device("cpu")
    )
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}.*float8_e4m3fn"):
        load_model(WorkerSettings(model=directory), family, spec, build, 64)
