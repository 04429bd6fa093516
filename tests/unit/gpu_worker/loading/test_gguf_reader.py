"""GGUF tensors under their Hugging Face names, against what transformers' own GGUF loader makes of the same files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from gpu_worker.loading.gguf_blocks import decode_rows
from gpu_worker.loading.gguf_names import ARCHITECTURES
from gpu_worker.loading.gguf_reader import GgufReader
from gpu_worker.loading.tensor_source import CheckpointError, iterate
from tests.unit.gpu_worker.loading.synthetic_gguf import ARCHITECTURES as SIZES
from tests.unit.gpu_worker.loading.synthetic_gguf import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, write_gguf


@pytest.mark.parametrize("architecture", sorted(set(SIZES) - {"gemma", "qwen2vl"}))  # transformers loads neither
def test_every_tensor_equals_what_transformers_loads(tmp_path: Path, architecture: str) -> None:
    from transformers import AutoModelForCausalLM, GgufConfig

    tied = architecture.startswith("gemma")
    write_gguf(tmp_path / "m.gguf", architecture, tied=tied, raw_keys={"tokenizer.ggml.padding_token_id": 1})
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    assert type(model).__name__ == ARCHITECTURES[architecture].hf_class
    reference = model.state_dict()
    if tied:
        del reference["lm_head.weight"]
    with GgufReader(tmp_path / "m.gguf") as reader:
        ours = dict(iterate(reader))
        assert set(ours) == set(reference)
        for info in reader.names():
            assert info.shape == tuple(reference[info.name].shape), info.name
            assert torch.equal(ours[info.name], reference[info.name]), info.name


def test_gemma_norms_lose_their_one_and_names_are_those_of_its_class(tmp_path: Path) -> None:
    from transformers import GemmaConfig, GemmaForCausalLM

    stored = write_gguf(tmp_path / "m.gguf", "gemma", tied=True)
    config = GemmaConfig(
        vocab_size=40,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in GemmaForCausalLM(config).state_dict().items()}
    del shapes["lm_head.weight"]
    with GgufReader(tmp_path / "m.gguf") as reader:
        assert {info.name: info.shape for info in reader.names()} == shapes
        assert np.array_equal(reader.read("model.norm.weight").numpy(), stored["output_norm.weight"] - 1)
        norm = reader.read("model.layers.1.post_attention_layernorm.weight").numpy()
        assert np.array_equal(norm, stored["blk.1.ffn_norm.weight"] - 1)
        query = reader.read("model.layers.0.self_attn.q_proj.weight").numpy()
        assert np.array_equal(query, stored["blk.0.attn_q.weight"])


def test_llama_biases_are_unpermuted_like_their_rows(tmp_path: Path) -> None:
    """Row r of the matrix and element r of the bias belong to the same output, before and after."""
    bias = np.arange(KV_HEADS * HEAD_DIM, dtype=np.float32)
    matrix = np.repeat(bias[:, None], HIDDEN, axis=1)
    write_gguf(tmp_path / "m.gguf", extra_tensors={"blk.0.attn_k.weight": matrix, "blk.0.attn_k.bias": bias})
    with GgufReader(tmp_path / "m.gguf") as reader:
        ours = reader.read("model.layers.0.self_attn.k_proj.bias")
        assert torch.equal(reader.read("model.layers.0.self_attn.k_proj.weight")[:, 0], ours)
        # the file has the pairs (0, 8), (1, 9), ... of a head of 16 next to each other
        assert ours[:HEAD_DIM].tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15]
        assert torch.equal(reader.read("model.layers.0.self_attn.k_proj.bias", (slice(3, 20),)), ours[3:20])


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight", "model.norm.weight"]
)
def test_slices_equal_slices_of_the_whole(tmp_path: Path, name: str) -> None:
    write_gguf(tmp_path / "m.gguf")
    with GgufReader(tmp_path / "m.gguf") as reader:
        whole = reader.read(name)
        for start, stop in [(0, 0), (0, 1), (7, 40), (15, 17), (16, 32), (63, 64), (0, 64)]:
            assert torch.equal(reader.read(name, (slice(start, stop),)), whole[start:stop])
            if whole.dim() == 2:
                assert torch.equal(reader.read(name, (slice(start, stop), slice(2, 30))), whole[start:stop, 2:30])
        for bad in [(slice(0, 65),), (slice(5, 3),), (slice(0, 4, 2),), (slice(None),) * 3]:
            with pytest.raises(IndexError, match="model"):
                reader.read(name, bad)
        with pytest.raises(KeyError):
            reader.read("model.layers.7.mlp.up_proj.weight")


def test_packed_rows_decode_to_the_same_values(smollm2_gguf: Path) -> None:
    with GgufReader(smollm2_gguf) as reader:
        for name in ("model.layers.3.self_attn.q_proj.weight", "model.layers.3.mlp.up_proj.weight"):
            packed = reader.read_packed(name, 100, 300)
            assert packed.shape == (200, 576 // 32 * 20)
            assert torch.equal(decode_rows(packed, reader.stored_type(name)), reader.read(name)[100:300])
        with pytest.raises(ValueError, match="no matrix"):
            reader.read_packed("model.norm.weight")


def test_quantized_tensors_of_different_types_in_one_file(tmp_path: Path) -> None:
    import gguf

    random = np.random.default_rng(5)
    types = [GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q5_1, GGMLQuantizationType.Q8_0, GGMLQuantizationType.BF16]
    writer = gguf.GGUFWriter(tmp_path / "mixed.gguf", "qwen2")
    writer.add_uint32("qwen2.attention.head_count", 4)
    expected = {}
    for layer, quantization in enumerate(types):
        packed = quantize(random.standard_normal((96, 64), dtype=np.float32), quantization)
        writer.add_tensor(f"blk.{layer}.ffn_up.weight", packed, raw_dtype=quantization)
        expected[f"model.layers.{layer}.mlp.up_proj.weight"] = dequantize(packed, quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GgufReader(tmp_path / "mixed.gguf") as reader:
        for name, values in expected.items():
            assert np.array_equal(reader.read(name).numpy(), values)
            assert np.array_equal(reader.read(name, (slice(9, 50), slice(31, 64))).numpy(), values[9:50, 31:])


def _refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        GgufReader(path)
    return str(caught.value)


def test_what_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, extra_tensors={"blk.0.attn_sinks.weight": np.zeros(4, np.float32)})
    assert "tensor 'blk.0.attn_sinks.weight': the architecture 'llama' has no such tensor" in _refusal(path)
    write_gguf(path, extra_tensors={"output_norm.scale": np.zeros(1, np.float32)})
    assert "tensor 'output_norm.scale': the architecture 'llama' has no such tensor" in _refusal(path)
    write_gguf(path, "gemma2", keys={"expert_count": 8})
    assert "mixture of 8 experts" in _refusal(path)
    write_gguf(path, keys={"attention.head_count_kv": 3})
    assert "tensor 'blk.0.attn_k.weight': has 32 rows, which 3 heads" in _refusal(path)
    path.write_bytes(path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0lamma", 1))
    message = _refusal(path)
    assert "architecture 'lamma'" in message
    assert all(architecture in message for architecture in ARCHITECTURES)
