"""Checkpoints that transformers saved with bitsandbytes, against bitsandbytes' own unpacking of them.

The files are made by `tests/fixtures/quant/make_bitsandbytes.py`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpu_worker.errors import LoadError
from gpu_worker.loading.bitsandbytes_source import BitsAndBytesSource
from gpu_worker.loading.safetensors_reader import SafetensorsReader
from gpu_worker.loading.tensor_source import CheckpointError
from gpu_worker.model_spec import ModelConfigError
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.quant.none import UnquantizedLinear
from gpu_worker.quant.scheme import make_scheme, read_quantization
from gpu_worker.quant.stored import StoredLinear
from tests.unit.gpu_worker.quant.exported import TOKENS, reference_logits
from tests.unit.gpu_worker.quant.paged_model import QuantizedModel

FIXTURES = Path(__file__).resolve().parents[3] / "fixtures" / "quant" / "bitsandbytes"
FOUR_BIT = ("nf4", "nf4-double", "fp4-as-bfloat16")
CASES = (*FOUR_BIT, "int8")
DOWN = "model.layers.0.mlp.down_proj.weight"


def dequantized(case: str) -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / case / "dequantized.safetensors")


def copied(case: str, directory: Path, **changes: torch.Tensor | None) -> Path:
    """A copy of a checkpoint with other tensors."""
    shutil.copy(FIXTURES / case / "config.json", directory / "config.json")
    tensors: dict[str, Any] = load_file(FIXTURES / case / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize("case", FOUR_BIT)
def test_values_are_those_of_the_tool(case: str) -> None:
    source = BitsAndBytesSource(SafetensorsReader(FIXTURES / case / "model.safetensors"))
    infos = {info.name: info for info in source.names()}
    expected = dequantized(case)
    assert not [name for name in infos if "quant" in name or "absmax" in name]
    for name, weight in expected.items():
        assert (infos[name].shape, infos[name].dtype) == (tuple(weight.shape), torch.bfloat16)
        assert torch.equal(source.read(name), weight)
        # Rows and columns that begin and end inside of blocks and of bytes.
        for rows, columns in ((slice(1, 7), slice(3, 20)), (slice(5, 24), slice(0, 72)), (slice(4, 4), slice(0, 3))):
            assert torch.equal(source.read(name, (rows, columns)), weight[rows, columns])
    assert ("model.layers.0.self_attn.v_proj.weight" in expected) == (case != "nf4")  # which was left out


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_dequantized_weights(case: str, tmp_path: Path) -> None:
    expected = reference_logits(FIXTURES / case, dequantized(case), tmp_path)
    ours = QuantizedModel(FIXTURES / case)
    logits = ours.logits(TOKENS)
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    kind = StoredLinear if case == "int8" else UnquantizedLinear
    assert isinstance(ours.model.blocks[0].mlp.down.method, kind)


@pytest.mark.parametrize("missing", ["absmax", "quant_map", "nested_absmax", "nested_quant_map"])
def test_a_part_that_is_missing_is_named(missing: str, tmp_path: Path) -> None:
    directory = copied("nf4-double", tmp_path, **{f"{DOWN}.{missing}": None})
    with pytest.raises(CheckpointError, match=rf"down_proj\.weight\.{missing}.*is missing"):
        QuantizedModel(directory)


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    state = "quant_state.bitsandbytes__nf4"
    stored = load_file(FIXTURES / "nf4" / "model.safetensors")[f"{DOWN}.{state}"]
    fields = json.loads(bytes(stored.tolist()))

    def with_state(**changes: Any) -> torch.Tensor:
        return torch.tensor(list(json.dumps(fields | changes).encode()), dtype=torch.uint8)

    for changes, words in (
        ({f"{DOWN}.{state}": with_state(shape=[72, 135])}, "half a byte"),
        ({f"{DOWN}.{state}": with_state(blocksize=128)}, "153 scales"),
        ({f"{DOWN}.{state}": with_state(nested_blocksize=256)}, "nested_absmax"),
        ({f"{DOWN}.{state}": torch.zeros(4, dtype=torch.uint8)}, "does not describe"),
        ({f"{DOWN}.{state}": None}, "quant_map|absmax"),
    ):
        with pytest.raises(CheckpointError, match=words):
            QuantizedModel(copied("nf4", tmp_path, **changes))


def test_int8_weights_in_the_order_of_a_gpu_are_refused(tmp_path: Path) -> None:
    layout = DOWN.replace(".weight", ".weight_format")
    directory = copied("int8", tmp_path, **{layout: torch.tensor(2, dtype=torch.uint8)})
    with pytest.raises(LoadError, match="weight_format is 2"):
        QuantizedModel(directory)


def test_what_the_config_says(tmp_path: Path) -> None:
    from gpu_worker.models.llama import LLAMA_NAMES

    quant = read_quantization(HfConfig.open(FIXTURES / "nf4"))
    assert quant is not None and quant.label == "bitsandbytes nf4"
    with pytest.raises(ModelConfigError, match=r"bnb_4bit_quant_type 'int4'.*awq \(4 bit"):
        read_quantization(HfConfig({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}}))
    with pytest.raises(ModelConfigError, match="bitsandbytes nf4; leave --quantization out"):
        make_scheme(FIXTURES / "nf4", LLAMA_NAMES, setting="fp8")
