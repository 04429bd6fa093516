"""Mixtures of experts in GGUF: names by the `gguf` package's own map, values and logits by transformers."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from gpu_worker.loading.gguf_reader import GgufReader
from gpu_worker.loading.tensor_source import CheckpointError
from gpu_worker.models.loader import read_spec
from gpu_worker.prepare.preparation import prepare
from gpu_worker.prepare.progress import SilentProgress
from tests.unit.gpu_worker.loading.synthetic_gguf import EXPERT_INNER, EXPERTS, HIDDEN, LAYERS, MIXTURES, write_gguf
from tests.unit.gpu_worker.quant.paged_model import QuantizedModel

TOKENS = list(range(3, 33))


@pytest.mark.parametrize("architecture", MIXTURES)
def test_experts_are_rows_of_the_files_tensors(tmp_path: Path, architecture: str) -> None:
    """Each name's values are those of the tensor that llama.cpp's name map gives for it."""
    kinds = {name: kind for name, kind in (("ffn_gate_exps", Kind.Q8_0), ("ffn_down_exps", Kind.Q4_0))}
    quantized = {f"blk.{layer}.{name}.weight": kind for name, kind in kinds.items() for layer in range(LAYERS)}
    stored = write_gguf(tmp_path / "m.gguf", architecture, quantized=quantized)
    written_as = MIXTURES[architecture].written_as or architecture
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == written_as)
    names = gguf.get_tensor_name_map(number, LAYERS)
    seen = 0
    with GgufReader(tmp_path / "m.gguf") as reader:
        for info in reader.names():
            pieces = info.name.split(".")
            if "experts" not in pieces:
                continue
            at = pieces.index("experts")
            expert = int(pieces.pop(at + 1))
            if "block_sparse_moe" in pieces:  # the converter merges experts under Qwen's and Mixtral's names
                pieces = ["layers", pieces[2], "feed_forward", "experts", pieces[-2], pieces[-1]]
            expected = names.get_name(".".join(pieces), try_suffixes=(".weight", ".bias"))
            assert expected is not None, info.name
            values = stored[expected]
            if expected in quantized:
                values = gguf.quants.dequantize(gguf.quants.quantize(values, quantized[expected]), quantized[expected])
            assert np.array_equal(reader.read(info.name).numpy(), values[expert]), info.name
            seen += 1
    assert seen == LAYERS * EXPERTS * (6 if architecture == "gpt-oss" else 3)


@pytest.mark.parametrize("architecture", [name for name in MIXTURES if name != "gpt-oss"])
def test_logits_are_those_of_transformers(tmp_path: Path, architecture: str) -> None:
    """Of the file as it is, and of what it is converted to, which transformers reads."""
    from transformers import AutoModelForCausalLM

    quantized = {f"blk.0.ffn_{name}_exps.weight": Kind.Q8_0 for name in ("gate", "up", "down")}
    write_gguf(tmp_path / "m.gguf", architecture, quantized=quantized)
    plain = prepare(tmp_path / "m.gguf", tmp_path / "cache", dtype="float32", progress=SilentProgress())
    model = AutoModelForCausalLM.from_pretrained(plain.path, dtype=torch.float32, experts_implementation="eager").eval()
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0]
    packed = prepare(tmp_path / "m.gguf", tmp_path / "cache", dtype="packed", progress=SilentProgress())
    for directory in (plain.path, packed.path):
        assert (QuantizedModel(directory).logits(TOKENS) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_gpt_oss_computes_as_its_safetensors_release_does(tmp_path: Path) -> None:
    """Gate and up of the file are the even and odd rows of the release's tensor, matrices the transposed ones."""
    from transformers import GptOssConfig, GptOssForCausalLM

    stored = write_gguf(
        tmp_path / "m.gguf",
        "gpt-oss",
        quantized={f"blk.0.ffn_{n}_exps.weight": Kind.Q8_0 for n in ("gate", "up", "down")},
    )
    packed = prepare(tmp_path / "m.gguf", tmp_path / "cache", dtype="packed", progress=SilentProgress())
    spec = read_spec(packed.path)[0]
    assert spec.moe is not None and (spec.moe.storage, spec.moe.intermediate_size) == ("each", EXPERT_INNER)
    config = GptOssConfig.from_pretrained(packed.path, experts_implementation="eager", attn_implementation="eager")
    del config.quantization_config
    model = GptOssForCausalLM(config).eval()
    state = model.state_dict()
    with GgufReader(tmp_path / "m.gguf") as reader:
        for name in state:
            if ".experts." not in name:
                state[name] = reader.read(name)
                continue
            base, _, part = name.rpartition(".experts.")
            kind = "bias" if part.endswith("_bias") else "weight"

            def one(expert: int, which: str, base: str = base, kind: str = kind) -> torch.Tensor:
                return reader.read(f"{base}.experts.{expert}.{which}.{kind}")

            if part.startswith("down"):
                rows = torch.stack([one(expert, "down_proj") for expert in range(EXPERTS)])
            else:
                both = [torch.stack([one(e, which) for e in range(EXPERTS)]) for which in ("gate_proj", "up_proj")]
                rows = torch.stack(both, dim=2).flatten(1, 2)
            state[name] = rows if kind == "bias" else rows.transpose(1, 2)
    model.load_state_dict(state)
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0]
    assert stored["blk.0.attn_sinks.weight"].shape == (4,)
    assert (QuantizedModel(packed.path).logits(TOKENS) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_files_of_2023_have_every_expert_by_itself(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf", "mixtral")
    alone = {
        f"blk.{layer}.ffn_{name}.{expert}.weight": whole[f"blk.{layer}.ffn_{name}_exps.weight"][expert]
        for layer in range(LAYERS)
        for name in ("gate", "up", "down")
        for expert in range(EXPERTS)
    }
    together = tuple(name for name in whole if "_exps" in name)
    write_gguf(tmp_path / "old.gguf", "mixtral", extra_tensors=alone, left_out=together)
    with GgufReader(tmp_path / "m.gguf") as reader, GgufReader(tmp_path / "old.gguf") as old:
        assert {info.name: info.shape for info in reader.names()} == {info.name: info.shape for info in old.names()}
        name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
        assert torch.equal(reader.read(name), old.read(name))


def test_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    odd = np.zeros((EXPERTS + 1, EXPERT_INNER, HIDDEN), dtype=np.float32)
    write_gguf(tmp_path / "m.gguf", "qwen3moe", extra_tensors={"blk.1.ffn_up_exps.weight": odd})
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up_exps\.weight.*not those of 4 experts"):
        GgufReader(tmp_path / "m.gguf")
