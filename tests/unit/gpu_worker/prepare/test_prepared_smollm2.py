"""The default model, prepared from its real GGUF file: every tensor twice over, and what it answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from gpu_worker.loading.checkpoint import StrictReader, open_checkpoint

HEADS = {"attn_q": 9, "attn_k": 3}
LEAVES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@pytest.fixture(scope="module")
def prepared(smollm2_dir: Path) -> Iterator[Any]:
    with open_checkpoint(smollm2_dir) as checkpoint:
        yield checkpoint


@pytest.fixture(scope="module")
def transformers_gguf_model(smollm2_gguf_reader: gguf.GGUFReader, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The second opinion: transformers' own loader, on a copy without the vocabulary, which takes it seconds."""
    from transformers import AutoModelForCausalLM, GgufConfig

    file = tmp_path_factory.mktemp("slim") / "slim.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    for name, field in smollm2_gguf_reader.fields.items():
        if name.startswith("llama."):
            writer.add_key_value(name, field.contents(), field.types[0])
    for tensor in smollm2_gguf_reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )


def _reference_name(gguf_name: str) -> str:
    if gguf_name.startswith("blk."):
        _, layer, leaf, kind = gguf_name.split(".")
        return f"model.layers.{layer}.{LEAVES[leaf]}.{kind}"
    return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[gguf_name]


def test_every_tensor_is_the_gguf_packages_value_rounded_to_bf16(
    prepared: Any, smollm2_gguf_reader: gguf.GGUFReader
) -> None:
    tensors = smollm2_gguf_reader.tensors
    assert len(tensors) == 272
    assert {info.name for info in prepared.names()} == {_reference_name(tensor.name) for tensor in tensors}
    for tensor in tensors:
        # few long rows and not many short ones, which the package decodes sixteen at a time
        raw = np.ascontiguousarray(tensor.data).reshape(16, -1)
        values = gguf.quants.dequantize(raw, tensor.tensor_type).reshape(tuple(reversed(tensor.shape.tolist())))
        leaf = tensor.name.split(".")[-2]
        if leaf in HEADS:
            rows, columns = values.shape
            pairs = values.reshape(HEADS[leaf], rows // HEADS[leaf] // 2, 2, columns)
            values = np.swapaxes(pairs, 1, 2).reshape(rows, columns)
        expected = torch.from_numpy(np.array(values)).to(torch.bfloat16)
        assert torch.equal(prepared.read(_reference_name(tensor.name)), expected), tensor.name


# The package that defines the format says the same of every value, in every run.
@pytest.mark.slow
def test_every_tensor_is_what_transformers_makes_of_the_file(prepared: Any, transformers_gguf_model: Any) -> None:
    reference = transformers_gguf_model.state_dict()
    assert {info.name for info in prepared.names()} == set(reference) - {"lm_head.weight"}
    for info in prepared.names():
        assert torch.equal(prepared.read(info.name), reference[info.name].to(torch.bfloat16)), info.name


def test_it_is_complete_for_the_class_its_config_names(smollm2_dir: Path, prepared: Any) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(smollm2_dir)
    assert config.rope_parameters["rope_theta"] == 100_000
    assert config.tie_word_embeddings
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == "LlamaForCausalLM"
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    with StrictReader(prepared, expected, tied_head=True) as reader:
        for name in expected:
            reader.read(name, (slice(0, 1),))


def test_it_says_paris(smollm2_dir: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, do_sample=False, max_new_tokens=24)[0, prompt["input_ids"].shape[1] :]
    answer = tokenizer.decode(output, skip_special_tokens=True)
    assert "Paris" in answer
    assert output[-1] == 2  # <|im_end|>: the generation config ends the answer


def test_transformers_reads_the_prepared_tokenizer_as_it_is(smollm2_dir: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(smollm2_dir)
    ours = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))
    text = "<|im_start|>user\n12345 été<|im_end|>"
    assert theirs.encode(text) == ours.encode(text).ids
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 2)
    assert theirs.decode(ours.encode(text).ids) == text


def test_the_files_beside_the_weights(smollm2_dir: Path) -> None:
    generation = json.loads((smollm2_dir / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "pad_token_id": 2, "eos_token_id": 2}
    assert json.loads((smollm2_dir / "tokenizer_config.json").read_text())["chat_template"]
