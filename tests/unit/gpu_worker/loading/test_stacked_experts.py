"""Float8 experts that a checkpoint has in one tensor a layer, beside the same ones stored one by one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig

from gpu_worker.loading.stacked_experts import StackedExpertsSource
from gpu_worker.loading.tensor_source import CheckpointError, TensorIndex, TensorInfo
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.quant.scheme import read_quantization
from tests.unit.gpu_worker.quant.paged_model import QuantizedModel
from tests.unit.gpu_worker.quant.published import (
    MIXTURE,
    SIZES,
    TOKENS,
    Packer,
    Tensors,
    float8_by_block,
    float8_by_output,
    publish,
)

EXPERT = re.compile(r"(?P<stack>.+\.experts)\.(?P<number>\d+)\.(?P<part>\w+)\.(?P<kind>weight\w*|activation_scale)")
SUFFIXES = {"weight": "", "weight_scale_inv": "_scale_inv", "activation_scale": "_activation_scale"}
BLOCKS = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [32, 32]}
LLAMA4_LEFT_OUT = ("self_attn", "feed_forward.router")
STATIC = {"activation_scheme": "static", "quant_method": "fp8", "weight_block_size": None}


def float8_static(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = torch.tensor(2.0**-6)
    values = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale_inv": scale, "activation_scale": torch.tensor(0.05)}, values.float() * scale


def stacked(tensors: Tensors, *, transposed: bool) -> Tensors:
    """As Qwen3-VL-MoE has them (transposed), and as transformers 5 and Mistral do."""
    found: dict[tuple[str, str, str], dict[int, torch.Tensor]] = {}
    others: Tensors = {}
    for name, tensor in tensors.items():
        match = EXPERT.fullmatch(name)
        if match is None:
            others[name] = tensor
        else:
            found.setdefault((match["stack"], match["part"], match["kind"]), {})[int(match["number"])] = tensor

    def stack_of(prefix: str, part: str, kind: str) -> torch.Tensor:
        numbered = found[prefix, part, kind]
        return torch.stack([numbered[number].float() for number in range(len(numbered))])

    for prefix, part, kind in found:
        if part == "up_proj":
            continue
        stack, name = stack_of(prefix, part, kind), part
        if part == "gate_proj":
            name, ups = "gate_up_proj", stack_of(prefix, "up_proj", kind)
            assert stack.dim() == 3 or torch.equal(stack, ups)
            stack = torch.cat((stack, ups), 1) if stack.dim() == 3 else stack
        if stack.dim() == 1 and kind == "weight_scale_inv":
            stack = stack[:, None, None]
        if transposed and stack.dim() == 3:
            stack = stack.transpose(1, 2)
        stack = stack.to(found[prefix, part, kind][0].dtype)
        others[f"{prefix}.{name}{SUFFIXES[kind]}"] = stack.contiguous()
    return others


def write(directory: Path, quantization: dict[str, Any], packer: Packer, inner: int, packed: str = r".*_proj") -> Path:
    def packer_of(module: str) -> Packer | None:
        return packer if re.fullmatch(packed, module) else None

    config = Qwen3MoeConfig(**SIZES, **(MIXTURE | {"moe_intermediate_size": inner}))
    return publish(directory, config, quantization, packer_of) / "packed"


@pytest.mark.parametrize("transposed", [False, True])
def test_blocks_in_stacks_compute_like_experts_one_by_one(transposed: bool, tmp_path: Path) -> None:
    file = write(tmp_path, BLOCKS, float8_by_block(), 96) / "model.safetensors"
    expected = QuantizedModel(file.parent).logits(TOKENS)
    tensors = stacked(load_file(file), transposed=transposed)
    for name, shape in {"gate_up_proj": (192, 64), "gate_up_proj_scale_inv": (6, 2), "down_proj": (64, 96)}.items():
        found = tensors[f"model.layers.0.mlp.experts.{name}"].shape
        assert tuple(found) == (4, *(shape[::-1] if transposed else shape))
    save_file(tensors, file, {"format": "pt"})
    assert torch.equal(QuantizedModel(file.parent).logits(TOKENS), expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_one_scale_an_expert_for_weights_and_inputs(transposed: bool, tmp_path: Path) -> None:
    file = write(tmp_path, STATIC, float8_static, 96) / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        match = EXPERT.fullmatch(name)
        if match is not None and match["kind"] != "weight":
            tensors[name] = tensors[name] * 2.0 ** int(match["number"])
    save_file(tensors, file, {"format": "pt"})
    expected = QuantizedModel(file.parent).logits(TOKENS)
    tensors = stacked(tensors, transposed=transposed)
    assert tuple(tensors["model.layers.0.mlp.experts.gate_up_proj_scale_inv"].shape) == (4, 1, 1)
    assert tuple(tensors["model.layers.0.mlp.experts.down_proj_activation_scale"].shape) == (4,)
    save_file(tensors, file, {"format": "pt"})
    assert torch.equal(QuantizedModel(file.parent).logits(TOKENS), expected)
    # transformers itself has two an expert, for gate and up; three are nothing that is known.
    name = "model.layers.0.mlp.experts.gate_up_proj_scale_inv"
    save_file(tensors | {name: tensors[name].repeat(1, 2, 1)}, file, {"format": "pt"})
    assert torch.equal(QuantizedModel(file.parent).logits(TOKENS), expected)
    save_file(tensors | {name: tensors[name] * torch.tensor([1.0, 2.0])[:, None]}, file, {"format": "pt"})
    assert not torch.equal(QuantizedModel(file.parent).logits(TOKENS), expected)
    save_file(tensors | {name: tensors[name].repeat(1, 3, 1)}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks .* tensors that the model needs.*gate_up_proj"):
        QuantizedModel(file.parent)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "names", [["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"], []], ids=["listed", "unsaid"]
)
def test_plain_stacks_in_a_quantized_checkpoint(transposed: bool, names: list[str], tmp_path: Path) -> None:
    """Tools that look for linears leave them plain, and have no linear there to list as left out."""
    quantization = BLOCKS | {"modules_to_not_convert": names}
    file = write(tmp_path, quantization, float8_by_block(), 96, r".*self_attn.*") / "model.safetensors"
    expected = QuantizedModel(file.parent).logits(TOKENS)
    save_file(stacked(load_file(file), transposed=transposed), file, {"format": "pt"})
    assert torch.equal(QuantizedModel(file.parent).logits(TOKENS), expected)


@pytest.mark.parametrize(
    ("quantization", "suffixes"),
    [
        ({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}, ("_weight_scale", "_input_scale")),
        ({"quant_method": "fp8", "activation_scheme": "static"}, ("_scale", "_input_scale")),
    ],
    ids=["modelopt", "fp8"],
)
def test_names_of_other_tools(quantization: dict[str, Any], suffixes: tuple[str, str], tmp_path: Path) -> None:
    file = write(tmp_path, STATIC, float8_static, 96) / "model.safetensors"
    expected = QuantizedModel(file.parent).logits(TOKENS)
    kinds = {"_scale_inv": suffixes[0], "_activation_scale": suffixes[1]}
    renamed = {}
    for name, tensor in stacked(load_file(file), transposed=True).items():
        for old, new in kinds.items() if ".experts." in name else ():
            name = name.replace(f"_proj{old}", f"_proj{new}")
        name = name.replace("weight_scale_inv", "weight_scale").replace("activation_scale", "input_scale")
        renamed[name] = tensor
    save_file(renamed, file, {"format": "pt"})
    config = json.loads((file.parent / "config.json").read_text()) | {"quantization_config": quantization}
    (file.parent / "config.json").write_text(json.dumps(config))
    assert torch.equal(QuantizedModel(file.parent).logits(TOKENS), expected)


@pytest.mark.parametrize("quantization", [BLOCKS, STATIC], ids=lambda fields: fields["activation_scheme"])
def test_stacks_are_those_of_transformers(quantization: dict[str, Any]) -> None:
    """Names, shapes and which half is whose, by its own module for such experts."""
    from transformers.integrations.finegrained_fp8 import FP8Experts

    config = Qwen3MoeConfig(**SIZES, **(MIXTURE | {"moe_intermediate_size": 96}))
    block, scheme = quantization["weight_block_size"], quantization["activation_scheme"]
    module = FP8Experts(config, block_size=block, activation_scheme=scheme)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape))
    stored = {f"model.layers.0.mlp.experts.{name}": tensor for name, tensor in module.state_dict().items()}
    quant = read_quantization(HfConfig({"quantization_config": quantization}))
    assert quant is not None
    names = [f"model.layers.0.mlp.experts.{{}}.{part}" for part in ("gate_proj", "up_proj", "down_proj")]
    shapes: dict[str, tuple[int, ...] | None] = {}
    for expert in range(4):
        for name, shape in zip(names, ((96, 64), (96, 64), (64, 96)), strict=True):
            shapes[f"{name.format(expert)}.weight"] = shape
    source = StackedExpertsSource(_Stored(stored), shapes, quant.format_of)
    for expert in range(4):
        halves = module.gate_up_proj[expert].chunk(2), module.gate_up_proj_scale_inv[expert].chunk(2)
        for number, name in enumerate(names[:2]):
            assert torch.equal(source.read(f"{name.format(expert)}.weight").float(), halves[0][number].float())
            scale = source.read(f"{name.format(expert)}.weight_scale_inv")
            assert torch.equal(scale, halves[1][number] if block else halves[1][number].reshape(()))
        down = names[2].format(expert)
        assert torch.equal(source.read(f"{down}.weight").float(), module.down_proj[expert].float())
        assert torch.equal(
            source.read(f"{down}.weight_scale_inv").flatten(), module.down_proj_scale_inv[expert].flatten()
        )
    if not block:
        assert source.read(f"{names[1].format(3)}.activation_scale") == module.gate_up_proj_activation_scale[3]


def test_llama_4_as_meta_published_it(tmp_path: Path) -> None:
    """FBGEMM's own module for its experts: weights are transposed, scales of `down_proj` are not."""
    from transformers.integrations.fbgemm_fp8 import FbgemmFp8Llama4TextExperts
    from transformers.models.llama4 import Llama4TextConfig

    sizes = SIZES | {"intermediate_size": 96, "intermediate_size_mlp": 64, "num_local_experts": 4}
    config = Llama4TextConfig(**sizes, interleave_moe_layer_step=1, no_rope_layers=[1, 1])

    def packer_of(module: str) -> Packer | None:
        return float8_by_output if module.endswith("_proj") and "self_attn" not in module else None

    directory = publish(tmp_path, config, {}, packer_of)
    module = FbgemmFp8Llama4TextExperts(config)
    packed, plain = (load_file(directory / kind / "model.safetensors") for kind in ("packed", "plain"))
    generator = torch.Generator().manual_seed(5)
    for layer in (0, 1):
        prefix = f"model.layers.{layer}.feed_forward.experts"
        for projection in ("gate_up_proj", "down_proj"):
            shape, of_scale = (tuple(getattr(module, projection + suffix).shape) for suffix in ("", "_scale"))
            values = torch.randn(shape, generator=generator).mul(64).to(torch.float8_e4m3fn)
            scale = torch.exp2(-torch.randint(8, 12, of_scale, generator=generator).float())
            packed |= {f"{prefix}.{projection}": values, f"{prefix}.{projection}_scale": scale}
            plain[f"{prefix}.{projection}"] = values.float() * scale.reshape(4, 1, -1)
    quantization = {
        "activation_scale_ub": 1200.0,
        "modules_to_not_convert": [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in LLAMA4_LEFT_OUT],
        "quant_method": "fbgemm_fp8",
    }
    fields = json.loads((directory / "plain" / "config.json").read_text())
    for kind, tensors, more in (("packed", packed, {"quantization_config": quantization}), ("plain", plain, {})):
        save_file(tensors, directory / kind / "model.safetensors", {"format": "pt"})
        (directory / kind / "config.json").write_text(json.dumps(fields | more))
    ours, expected = (QuantizedModel(directory / kind).logits(TOKENS) for kind in ("packed", "plain"))
    # Inputs of experts are rounded to float8 here, after which a token may choose another expert.
    similarity = torch.nn.functional.cosine_similarity(ours, expected, dim=-1)
    assert (similarity > 0.99).sum() >= len(TOKENS) - 3


@pytest.mark.parametrize("transposed", [False, True])
def test_a_part_of_an_expert_is_that_part_of_the_whole(transposed: bool) -> None:
    """As ranks read their shares."""
    stack, scales = torch.rand(4, 192, 64), torch.rand(4, 6, 2)
    if transposed:
        stack, scales = stack.transpose(1, 2).contiguous(), scales.transpose(1, 2).contiguous()
    prefix = "model.layers.0.mlp.experts"
    stored = {f"{prefix}.gate_up_proj": stack.to(torch.float8_e4m3fn), f"{prefix}.gate_up_proj_scale_inv": scales}
    quant = read_quantization(HfConfig({"quantization_config": BLOCKS}))
    assert quant is not None
    shapes: dict[str, tuple[int, ...] | None] = {f"{prefix}.0.gate_proj.weight": (96, 64)}
    source = StackedExpertsSource(_Stored(stored), shapes, quant.format_of)
    for kind, rows, cols in (("weight", slice(10, 58), slice(3, 50)), ("weight_scale_inv", slice(1, 3), slice(1, 2))):
        whole = source.read(f"{prefix}.2.up_proj.{kind}")
        assert tuple(whole.shape) == ((96, 64) if kind == "weight" else (3, 2))
        part = source.read(f"{prefix}.2.up_proj.{kind}", (rows, cols))
        assert torch.equal(part.float(), whole.float()[rows, cols])


class _Stored:
    """Tensors in memory as a checkpoint."""

    path = Path("memory")

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors

    def names(self) -> list[TensorInfo]:
        return [TensorInfo(name, tuple(one.shape), one.dtype, self.path) for name, one in self._tensors.items()]

    def read(self, name: str, index: TensorIndex | None = None) -> torch.Tensor:
        return self._tensors[name][tuple(index or ())]

    def close(self) -> None:
        return None


def test_a_block_that_gate_and_up_share_is_refused(tmp_path: Path) -> None:
    """Blocks of 64 on 48 gates: the first ends in the ups, though half of all blocks is a whole number."""
    file = write(tmp_path, BLOCKS | {"weight_block_size": [64, 32]}, float8_by_block(48), 48) / "model.safetensors"
    tensors = stacked(
        {name: tensor for name, tensor in load_file(file).items() if "weight_scale_inv" not in name}, transposed=False
    )
    assert tuple(tensors["model.layers.0.mlp.experts.gate_up_proj"].shape) == (4, 96, 64)
    for layer in (0, 1):
        for name, shape in {"gate_up_proj": (4, 2, 2), "down_proj": (4, 1, 2)}.items():
            tensors[f"model.layers.{layer}.mlp.experts.{name}_scale_inv"] = torch.ones(shape)
        for name, shape in {"q": (1, 2), "k": (1, 2), "v": (1, 2), "o": (1, 2)}.items():
            tensors[f"model.layers.{layer}.self_attn.{name}_proj.weight_scale_inv"] = torch.ones(shape)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"gate_up_proj"):
        QuantizedModel(file.parent)
