"""Checkpoints that HQQ wrote, against HQQ's own unpacking of them.

The files are made by `tests/fixtures/quant/make_hqq.py`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpu_worker.errors import LoadError
from gpu_worker.loading.hqq_source import HqqSource
from gpu_worker.loading.safetensors_reader import SafetensorsReader
from gpu_worker.loading.tensor_source import CheckpointError
from gpu_worker.model_spec import ModelConfigError
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.parallel.shares import ParallelError, Share
from gpu_worker.quant.hqq import HqqFormat
from gpu_worker.quant.none import UnquantizedLinear
from gpu_worker.quant.repack import repack
from gpu_worker.quant.scheme import read_quantization
from gpu_worker.quant.stored import StoredLinear
from tests.unit.gpu_worker.quant.exported import TOKENS, reference_logits
from tests.unit.gpu_worker.quant.paged_model import QuantizedModel

FIXTURES = Path(__file__).resolve().parents[3] / "fixtures" / "quant" / "hqq"
CASES = ("4-bit", "4-bit-as-float", "3-bit", "4-bit-by-outputs", "by-name")
DOWN = "model.layers.0.mlp.down_proj"


def of_case(case: str) -> tuple[HqqSource, dict[str, Any], dict[str, torch.Tensor]]:
    """The checkpoint, the format of each packed module (None: unpacked by the source) and what they stand for."""
    quant = read_quantization(HfConfig.open(FIXTURES / case))
    assert quant is not None
    expected = load_file(FIXTURES / case / "dequantized.safetensors")
    formats = {name: quant.format_of(name) for name in (whole.removesuffix(".weight") for whole in expected)}
    return HqqSource(SafetensorsReader(FIXTURES / case / "model.safetensors")), formats, expected


def decoded(source: HqqSource, module: str, stored: Any, rows: Share, cols: Share) -> torch.Tensor:
    if stored is None:
        return source.read(f"{module}.weight", (rows.as_slice(), cols.as_slice()))
    infos = {info.name: info for info in source.names()}
    tensors = {
        name: source.read(f"{module}.{name}", stored.index(name, infos[f"{module}.{name}"].shape, rows, cols))
        for name in stored.rules(rows.total, cols.total)
    }
    weight: torch.Tensor = stored.decode(tensors, rows, cols).dequantize()
    return weight


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_tool(case: str) -> None:
    source, formats, expected = of_case(case)
    infos = {info.name: info for info in source.names()}
    assert len(expected) == (6 if case == "by-name" else 7)
    assert not [name for name in infos if name.rpartition(".")[2] in ("nbits", "axis", "packing", "compute_dtype")]
    for module, stored in formats.items():
        weight = expected[f"{module}.weight"]
        whole = tuple(Share(0, size, size) for size in weight.shape)
        ours = decoded(source, module, stored, *whole)
        assert weight.std() > 0.01
        # Ours multiplies before it subtracts.
        torch.testing.assert_close(ours, weight, rtol=0, atol=3e-7)
        assert ours.sub(weight).count_nonzero() < ours.numel() // 2
        if stored is None:
            assert torch.equal(ours, weight)
            continue
        rules = stored.rules(*weight.shape)
        for name, rule in rules.items():
            info = infos[f"{module}.{name}"]
            assert info.shape in rule.shapes and info.dtype in rule.dtypes
        shapes = {name: infos[f"{module}.{name}"].shape for name in rules}
        assert stored.size_of(shapes) == tuple(weight.shape)
        packed = stored.decode({name: source.read(f"{module}.{name}") for name in rules}, *whole)
        assert repack(packed) is not None


@pytest.mark.parametrize("case", CASES)
def test_a_share_is_that_part_of_the_whole(case: str) -> None:
    """Rows and columns on both sides of where the table is folded, and across it."""
    source, formats, expected = of_case(case)
    for module, stored in formats.items():
        num_outputs, num_inputs = expected[f"{module}.weight"].shape
        whole = decoded(source, module, stored, Share(0, num_outputs, num_outputs), Share(0, num_inputs, num_inputs))
        half = num_outputs // 2
        size = num_inputs if stored is None or stored.group_size == -1 else stored.group_size
        for start, count in ((0, half), (half, half), (half - 3, 7), (num_outputs - 1, 1), (2, 0)):
            for first in range(0, num_inputs, size):
                rows, cols = Share(start, count, num_outputs), Share(first, size, num_inputs)
                part = decoded(source, module, stored, rows, cols)
                assert torch.equal(part, whole[rows.as_slice(), cols.as_slice()])
        if size < num_inputs:
            with pytest.raises(ParallelError, match="another --tensor-parallel-size"):
                decoded(source, module, stored, Share(0, 1, num_outputs), Share(size // 2, size, num_inputs))


@pytest.mark.parametrize("case", [*CASES, "4-bit-fused"])
def test_logits_are_those_of_the_dequantized_weights(case: str, tmp_path: Path) -> None:
    expected = reference_logits(FIXTURES / case, load_file(FIXTURES / case / "dequantized.safetensors"), tmp_path)
    ours = QuantizedModel(FIXTURES / case)
    logits = ours.logits(TOKENS)
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    kind = UnquantizedLinear if case in ("4-bit-by-outputs", "by-name") else StoredLinear
    assert isinstance(ours.model.blocks[0].mlp.down.method, kind)


def test_settings_go_by_names_without_the_numbers_of_layers() -> None:
    _, formats, _ = of_case("by-name")
    assert formats["model.layers.0.self_attn.q_proj"] == HqqFormat(8, -1)
    assert formats["model.layers.0.self_attn.k_proj"] == HqqFormat(1, 16)
    assert formats[DOWN] is None  # by outputs
    quant = read_quantization(HfConfig.open(FIXTURES / "by-name"))
    assert quant is not None and quant.format_of("model.layers.0.self_attn.o_proj") is None
    assert quant.format_of("model.layers.17.self_attn.q_proj") == HqqFormat(8, -1)


def changed(case: str, directory: Path, **changes: torch.Tensor | None) -> Path:
    shutil.copytree(FIXTURES / case, directory, dirs_exist_ok=True)
    tensors: dict[str, Any] = load_file(directory / "model.safetensors")
    tensors |= {f"{DOWN}.{name}": tensor for name, tensor in changes.items()}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"zero": None}, r"down_proj\.zero.*is missing"),
        ({"shape": None}, r"down_proj\.shape.*is missing"),
        ({"shape": torch.tensor([32, 128])}, "needs 2,048 bytes"),
        ({"group_size": torch.tensor(24)}, "groups of 24 that are no whole part"),
        ({"nbits": torch.tensor(7)}, "7 bits along axis 1"),
        ({"scale": torch.ones(4, 1)}, "for 128 groups"),
    ],
    ids=str,
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, torch.Tensor | None], words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words):
        QuantizedModel(changed("4-bit", tmp_path, **changes))


def test_codes_of_more_bits_than_the_config_says_are_refused(tmp_path: Path) -> None:
    wide = {"nbits": torch.tensor(8), "W_q": torch.full((128, 16), 200, dtype=torch.uint8)}
    with pytest.raises(LoadError, match="W_q holds 200, and the config says 4 bits"):
        QuantizedModel(changed("4-bit", tmp_path, **wide))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weight_quant_params": {"nbits": 1.58, "group_size": 64, "axis": 1}}, "hqq with nbits 1.58"),
        ({"weight_quant_params": {"nbits": 4, "channel_wise": False, "axis": 1}}, "hqq with channel_wise false"),
        (
            {"weight_quant_params": {"nbits": 4, "axis": 0}, "zero_quant_params": {"nbits": 8, "group_size": 128}},
            "hqq with zero_quant_params",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused_by_its_name(settings: dict[str, Any], words: str) -> None:
    fields = {"quant_method": "hqq", "quant_config": settings, "skip_modules": ["lm_head"]}
    with pytest.raises(ModelConfigError, match=words) as refusal:
        read_quantization(HfConfig({"quantization_config": fields}))
    assert "hqq (1 to 6 and 8 bit)" in str(refusal.value)
