"""Tiny checkpoints as tools publish them: some modules packed by the formula of the format, the others plain.

Values are whole numbers times powers of 2, so that a loaded weight has to be exactly the one that was packed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PretrainedConfig

from gpu_worker.loading.dequantized import DequantizedSource
from gpu_worker.loading.safetensors_reader import SafetensorsReader
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.quant.scheme import module_format, read_quantization
from tests.unit.gpu_worker.quant.paged_model import QuantizedModel

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
MIXTURE: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
    "norm_topk_prob": True,
}
TOKENS = list(range(3, 43))
Tensors = dict[str, torch.Tensor]
Packer = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
"""A weight [N, K] -> its stored tensors, and the weight that they stand for."""


def words(values: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Integers [..., m] -> int32 [..., m * bits / 32]; `order`: which value of a word's is in which place."""
    per_word = 32 // bits
    grouped = values.long().unflatten(-1, (-1, per_word))
    grouped = grouped if order is None else grouped[..., list(order)]
    shifts = torch.arange(per_word) * bits
    return ((grouped << shifts).sum(-1) & 0xFFFFFFFF).to(torch.int32)


def codes_of(weight: torch.Tensor, bits: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [N, K], zero points and scales [N, G] of a weight, rounded to the nearest."""
    groups = weight.unflatten(1, (-1, group_size))
    top = (1 << bits) - 1
    # A group of zeros, which the row of the padding token is made of, may have any scale.
    scales = torch.exp2((2 * groups.abs().amax(-1) / top).clamp(min=2.0**-12).log2().ceil())
    zeros = torch.full_like(scales, (top + 1) // 2)
    zeros[:, 1::2] -= 1
    codes = (groups / scales[..., None]).round().add(zeros[..., None]).clamp(0, top)
    return codes.flatten(1), zeros, scales


def stands_for(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    group_size = codes.shape[1] // scales.shape[1]
    return (codes - zeros.repeat_interleave(group_size, 1)) * scales.repeat_interleave(group_size, 1)


def gptq(bits: int = 4, group_size: int = 32, *, version: int = 1) -> Packer:
    """AutoGPTQ and GPTQModel: codes along the inputs, zero points (minus one in version 1) along the outputs."""

    def packed(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        codes, zeros, scales = codes_of(weight, bits, weight.shape[1] if group_size == -1 else group_size)
        tensors = {
            "qweight": words(codes, bits).T,
            "qzeros": words(zeros.T - (1 if version == 1 else 0), bits),
            "scales": scales.T.half(),
            "g_idx": (torch.arange(weight.shape[1]) // (weight.shape[1] // scales.shape[1])).int(),
        }
        return tensors, stands_for(codes, zeros, scales)

    return packed


def awq(group_size: int = 32) -> Packer:
    """AutoAWQ's `gemm`: both along the outputs, the values of a word in the order 0 2 4 6 1 3 5 7."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def packed(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        codes, zeros, scales = codes_of(weight, 4, weight.shape[1] if group_size == -1 else group_size)
        tensors = {
            "qweight": words(codes.T, 4, order),
            "qzeros": words(zeros.T, 4, order),
            "scales": scales.T.half(),
        }
        return tensors, stands_for(codes, zeros, scales)

    return packed


def float8_by_output(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """compressed-tensors' `float-quantized` with the strategy `channel`."""
    scales = torch.exp2((weight.abs().amax(1, keepdim=True) / 448).log2().ceil())
    values = (weight / scales).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale": scales.bfloat16()}, values.float() * scales


def float8_by_block(size: int = 32) -> Packer:
    """DeepSeek's layout: a scale for every block, which multiplies in spite of its name."""

    def packed(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        rows, cols = (-(-length // size) for length in weight.shape)
        scales = torch.exp2(-torch.arange(float(rows * cols)).remainder(5) - 9).view(rows, cols)
        wide = scales.repeat_interleave(size, 0).repeat_interleave(size, 1)[: weight.shape[0], : weight.shape[1]]
        values = (weight / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {"weight": values, "weight_scale_inv": scales}, values.float() * wide

    return packed


def float8_of_exponents(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """MXFP8: a power of 2 for every 32 inputs, of which the exponent plus 127 is stored as a byte."""
    groups = weight.unflatten(1, (-1, 32))
    exponents = (groups.abs().amax(-1).clamp(min=2.0**-12) / 448).log2().ceil()
    values = (groups / exponents.exp2()[..., None]).to(torch.float8_e4m3fn)
    stands_for = (values.float() * exponents.exp2()[..., None]).flatten(1)
    return {"weight": values.flatten(1), "weight_scale_inv": (exponents + 127).to(torch.uint8)}, stands_for


def packed_integers(bits: int = 4, group_size: int = 32) -> Packer:
    """compressed-tensors' `pack-quantized`, symmetric: signed values with 2^(bits-1) added, along the inputs."""

    def packed(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        codes, zeros, scales = codes_of(weight, bits, group_size)
        zeros = torch.full_like(zeros, 1 << (bits - 1))
        tensors = {
            "weight_packed": words(codes, bits),
            "weight_scale": scales.bfloat16(),
            "weight_shape": torch.tensor(weight.shape),
        }
        return tensors, stands_for(codes, zeros, scales)

    return packed


def publish(
    directory: Path,
    config: PretrainedConfig,
    quantization: dict[str, Any],
    packer_of: Callable[[str], Packer | None],
) -> Path:
    """In `directory`: `packed`, with `packer_of(module)` applied to the weights, and `plain`, what they stand for."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    saved = directory / "saved"
    model.save_pretrained(saved)
    fields = json.loads((saved / "config.json").read_text())
    packed: Tensors = {}
    plain: Tensors = {}
    for name, weight in load_file(saved / "model.safetensors").items():
        # Whole sixteenths: what a bfloat16 holds exactly.
        weight = (weight * 64).round() / 16 if weight.dim() == 2 else weight
        if name.endswith(".bias"):  # which the class begins with zeros
            weight = (torch.randn_like(weight) * 16).round() / 16
        module = name.removesuffix(".weight")
        packer = packer_of(module) if weight.dim() == 2 else None
        if packer is None:
            packed[name] = plain[name] = weight
            continue
        tensors, plain[name] = packer(weight)
        packed |= {f"{module}.{kind}": tensor.contiguous() for kind, tensor in tensors.items()}
    for kind, tensors, more in (("packed", packed, {"quantization_config": quantization}), ("plain", plain, {})):
        (directory / kind).mkdir()
        save_file(tensors, directory / kind / "model.safetensors", {"format": "pt"})
        (directory / kind / "config.json").write_text(json.dumps(fields | more))
    return directory


def assert_equal_logits(directory: Path) -> QuantizedModel:
    """The packed checkpoint computes what the plain one does, bit for bit; returns the former."""
    ours, plain = QuantizedModel(directory / "packed"), QuantizedModel(directory / "plain")
    expected = plain.logits(TOKENS)
    assert expected.std() > 0.01
    torch.testing.assert_close(ours.logits(TOKENS), expected, rtol=0, atol=0)
    return ours


def assert_equal_weights(directory: Path) -> None:
    """Every weight of the packed checkpoint is exactly the plain one's; for formats that quantize inputs as well."""
    packed, plain = (SafetensorsReader(directory / kind) for kind in ("packed", "plain"))
    names = {info.name for info in packed.names()}
    quant = read_quantization(HfConfig.open(directory / "packed"), names)
    assert quant is not None
    wanted = {info.name for info in plain.names()}
    source = DequantizedSource(packed, lambda module: module_format(quant, module, module, names), wanted)
    assert {info.name for info in source.names()} == wanted
    for name in wanted:
        assert torch.equal(source.read(name).float(), plain.read(name)), name
