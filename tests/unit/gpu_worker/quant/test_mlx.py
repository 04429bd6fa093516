"""Weights that MLX packed, against its own unpacking of them; and whole checkpoints as mlx-lm saves them.

The file is made by `tests/fixtures/quant/make_mlx.py`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GemmaConfig, MixtralConfig, Qwen2Config, Qwen3MoeConfig

from gpu_worker.model_spec import ModelConfigError
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.parallel.shares import ParallelError, Share
from gpu_worker.quant.config import QuantConfig
from gpu_worker.quant.mlx import MlxFormat
from gpu_worker.quant.repack import repack
from gpu_worker.quant.scheme import read_quantization
from gpu_worker.quant.weights import ROW_STEP, OffsetWeight
from tests.unit.gpu_worker.quant.paged_model import QuantizedModel
from tests.unit.gpu_worker.quant.published import (
    MIXTURE,
    SIZES,
    Packer,
    Tensors,
    assert_equal_logits,
    codes_of,
    publish,
    stands_for,
    words,
)
from tests.unit.gpu_worker.quant.stored_cases import stored_cases

N, K = 40, 192
UP = "model.layers.3.mlp.up_proj"


def stored() -> tuple[dict[str, Any], dict[str, Tensors]]:
    return stored_cases("mlx.safetensors", "settings")


CASES = sorted(stored()[0])


def read(**fields: Any) -> QuantConfig:
    quant = read_quantization(HfConfig({"quantization": {"group_size": 64, "bits": 4} | fields}))
    assert quant is not None
    return quant


def dequantize(case: str, rows: Share, cols: Share) -> torch.Tensor:
    kind, tensors = read(**stored()[0][case]).format_of(UP), stored()[1][case]
    assert isinstance(kind, MlxFormat)
    cut = {name: tensors[name][kind.index(name, tuple(tensors[name].shape), rows, cols)] for name in kind.rules(N, K)}
    return kind.decode(cut, rows, cols).dequantize()


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_tool(case: str) -> None:
    kind, tensors = read(**stored()[0][case]).format_of(UP), stored()[1][case]
    assert isinstance(kind, MlxFormat)
    rules = kind.rules(N, K)
    assert set(rules) == set(tensors) - {"dequantized"}
    for name, rule in rules.items():
        assert tuple(tensors[name].shape) in rule.shapes and tensors[name].dtype in rule.dtypes
    assert kind.size_of({name: tuple(tensors[name].shape) for name in rules}) == (N, K)
    ours = dequantize(case, Share(0, N, N), Share(0, K, K))
    assert ours.std() > 0.01
    # The tool may round once where a product and a sum are two roundings.
    torch.testing.assert_close(ours, tensors["dequantized"], rtol=0, atol=2e-8)
    assert ours.sub(tensors["dequantized"]).count_nonzero() < ours.numel() // 2


@pytest.mark.parametrize("case", CASES)
def test_a_share_is_that_part_of_the_whole_and_kernels_have_a_layout(case: str) -> None:
    whole = dequantize(case, Share(0, N, N), Share(0, K, K))
    for rows, cols in ((Share(8, 24, N), Share(0, K, K)), (Share(0, N, N), Share(64, 128, K))):
        assert torch.equal(dequantize(case, rows, cols), whole[rows.as_slice(), cols.as_slice()])
    with pytest.raises(ParallelError, match="another --tensor-parallel-size"):
        dequantize(case, Share(0, N, N), Share(16, 64, K))
    kind, tensors = read(**stored()[0][case]).format_of(UP), stored()[1][case]
    assert kind is not None
    assert repack(kind.decode(dict(tensors), Share(0, N, N), Share(0, K, K))) is not None


def packed_by_mlx(bits: int, group_size: int = 32) -> Packer:
    def packed(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        codes, zeros, scales = codes_of(weight, bits, group_size)
        tensors = {
            "weight": words(codes, bits).view(torch.uint32),
            "scales": scales.bfloat16(),
            "biases": (-zeros * scales).bfloat16(),
        }
        return tensors, stands_for(codes, zeros, scales)

    return packed


def test_a_checkpoint_of_mlx_lm(tmp_path: Path) -> None:
    """The table and the head are packed as well; some layers have other widths, one is left out."""
    overrides = {
        "model.embed_tokens": {"group_size": 32, "bits": 8},
        "model.layers.0.mlp.down_proj": {"bits": 8, "group_size": 64},
        "model.layers.1.self_attn.v_proj": False,
        "lm_head": True,
    }

    def packer_of(module: str) -> Packer | None:
        change = overrides.get(module, True)
        if isinstance(change, dict):
            return packed_by_mlx(change["bits"], change["group_size"])
        return packed_by_mlx(4) if change else None

    settings = {"group_size": 32, "bits": 4, "mode": "affine"} | overrides
    directory = publish(tmp_path, Qwen2Config(**SIZES), settings, packer_of)
    assert_equal_logits(directory)
    # Files of 2024 have the settings under MLX's own key alone.
    config = json.loads((directory / "packed" / "config.json").read_text())
    config["quantization"] = config.pop("quantization_config")
    (directory / "packed" / "config.json").write_text(json.dumps(config))
    assert_equal_logits(directory)


def test_a_packed_table_is_unpacked_some_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 it would be the peak of loading."""
    sizes = SIZES | {"vocab_size": 2 * ROW_STEP + 100}
    directory = publish(tmp_path, Qwen2Config(**sizes), {"group_size": 32, "bits": 4}, lambda name: packed_by_mlx(4))
    rows: list[int] = []
    unpack = OffsetWeight.dequantize

    def watched(self: OffsetWeight) -> torch.Tensor:
        rows.append(self.num_outputs)
        return unpack(self)

    monkeypatch.setattr(OffsetWeight, "dequantize", watched)
    QuantizedModel(directory / "packed")
    assert max(rows) == ROW_STEP and rows.count(ROW_STEP) == 4


def test_a_packed_table_that_is_the_head_too(tmp_path: Path) -> None:
    sizes = SIZES | {"tie_word_embeddings": True}
    directory = publish(tmp_path, GemmaConfig(**sizes), {"group_size": 32, "bits": 4}, lambda name: packed_by_mlx(4))
    assert "lm_head.weight" not in load_file(directory / "packed" / "model.safetensors")
    assert_equal_logits(directory)


@pytest.mark.parametrize(
    ("fields", "words_of_it"),
    [
        ({"mode": "mxfp4"}, "MLX with the mode 'mxfp4' and 4 bits in groups of 64"),
        ({"bits": 7}, "MLX with the mode 'affine' and 7 bits"),
        ({"lm_head": {"mode": "nvfp4", "group_size": 32}}, "MLX with the mode 'nvfp4' and 4 bits in groups of 32"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused_by_its_name(fields: dict[str, Any], words_of_it: str) -> None:
    with pytest.raises(ModelConfigError, match=words_of_it) as refusal:
        read(**fields)
    assert "supported are awq" in str(refusal.value)


@pytest.mark.parametrize("config_class", [Qwen3MoeConfig, MixtralConfig])
def test_mixtures_have_their_experts_in_one_tensor(config_class: Any, tmp_path: Path) -> None:
    """As `sanitize` of mlx-lm's models joins them: every tensor has all of a layer's; the router is packed too."""
    block = "mlp" if config_class is Qwen3MoeConfig else "block_sparse_moe"
    switch = f"model.layers.0.{block}.switch_mlp.down_proj"
    settings = {"group_size": 32, "bits": 4, switch: {"group_size": 32, "bits": 8}}

    def packer_of(module: str) -> Packer | None:
        return packed_by_mlx(8 if re.search(r"layers\.0\..*experts.*(down_proj|w2)$", module) else 4)

    directory = publish(tmp_path, config_class(**SIZES, **MIXTURE), settings, packer_of)
    file = directory / "packed" / "model.safetensors"
    members: dict[str, dict[int, torch.Tensor]] = {}
    joined: Tensors = {}
    for name, tensor in load_file(file).items():
        match = re.fullmatch(r"(.*)\.experts\.(\d+)\.(\w+)\.(\w+)", name)
        if match is None:
            joined[name] = tensor
        else:
            part = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.get(match[3], match[3])
            members.setdefault(f"{match[1]}.switch_mlp.{part}.{match[4]}", {})[int(match[2])] = tensor
    assert len(members) == 18 and f"{switch}.scales" in members
    for name, tensors in members.items():
        # Stacks of uint32 are not a thing in torch.
        stack = torch.stack([tensors[expert].view(torch.int16) for expert in range(4)])
        joined[name] = stack.view(tensors[0].dtype)
    save_file(joined, file, {"format": "mlx"})
    assert_equal_logits(directory)
