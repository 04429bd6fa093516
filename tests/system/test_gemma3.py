"""Gemma 3 270M, a base model with sliding windows, from its GGUF file in parts to what a client reads."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import openai
import pytest
import torch
from tokenizers import Tokenizer

from gpu_worker.loading.checkpoint import open_checkpoint
from tests.conftest import REPOSITORY_ROOT

from .launched import Launched

pytestmark = pytest.mark.slow

LONG_PROMPT_TOKENS = 1076  # more than twice the window of 512
NUM_GENERATED = 32
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@pytest.fixture(scope="module")
def tokenizer(gemma3_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(gemma3_dir / "tokenizer.json"))


@pytest.fixture(scope="module")
def long_prompt(tokenizer: Tokenizer) -> list[int]:
    """Real text, cut in the middle of a sentence."""
    text = (REPOSITORY_ROOT / "LICENSE").read_text()
    return list(tokenizer.encode(text).ids[:LONG_PROMPT_TOKENS])


@pytest.fixture(scope="module")
def reference(gemma3_dir: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(gemma3_dir, dtype=torch.float32, attn_implementation="eager")


@pytest.fixture(scope="module")
def client(gemma3_dir: Path) -> Iterator[openai.OpenAI]:
    flags = ("--dtype=float32", "--served-model-name=gemma", "--cpu-kv-cache-gib=0.5", "--max-model-len=2048")
    with (
        Launched(gemma3_dir, *flags) as launched,
        openai.OpenAI(base_url=launched.base_url, api_key="none", max_retries=0, timeout=170) as client,
    ):
        # A base model: no chat is proposed.
        assert f"curl {launched.base_url}/completions" in launched.read()
        yield client


def _greedy(model: Any, token_ids: list[int]) -> list[int]:
    with torch.inference_mode():
        output = model.generate(torch.tensor([token_ids]), do_sample=False, max_new_tokens=NUM_GENERATED)
    return output[0, len(token_ids) :].tolist()


def test_every_tensor_is_the_gguf_packages_value(gemma3_dir: Path) -> None:
    """Names, norms without the 1 that the file adds, and values, by the reference implementation of the format."""
    reader = gguf.GGUFReader(gemma3_dir.parent / f"{gemma3_dir.name}.gguf")
    whole = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    with open_checkpoint(gemma3_dir) as prepared:
        assert len(list(prepared.names())) == len(reader.tensors) == 236
        for tensor in reader.tensors:
            pieces = tensor.name.split(".")
            name = whole.get(pieces[0]) or f"model.layers.{pieces[1]}.{LAYER_NAMES[pieces[2]]}"
            # In few long rows, which the package decodes faster than many short ones.
            blocks = np.ascontiguousarray(tensor.data).reshape(16, -1)
            values = gguf.quants.dequantize(blocks, tensor.tensor_type).reshape(tuple(reversed(tensor.shape.tolist())))
            expected = torch.from_numpy(np.array(values)) - (1 if pieces[-2].endswith("norm") else 0)
            assert torch.equal(prepared.read(f"{name}.weight"), expected.to(torch.bfloat16)), tensor.name


def test_it_completes_text(client: openai.OpenAI) -> None:
    answers = {
        prompt: client.completions.create(model="gemma", prompt=prompt, temperature=0, max_tokens=12).choices[0].text
        for prompt in ("The three primary colours are", "The capital of France is Paris. The capital of Italy is")
    }
    assert "red, yellow and blue" in answers["The three primary colours are"]
    assert "Rome" in answers["The capital of France is Paris. The capital of Italy is"]


def test_a_prompt_beyond_the_window_goes_on_as_in_transformers(
    client: openai.OpenAI, tokenizer: Tokenizer, reference: Any, long_prompt: list[int]
) -> None:
    expected = _greedy(reference, long_prompt)
    answer = client.completions.create(
        model="gemma",
        prompt=long_prompt,
        temperature=0,
        max_tokens=NUM_GENERATED,
        extra_body={"return_token_ids": True},
    )
    assert answer.usage and answer.usage.prompt_tokens == LONG_PROMPT_TOKENS
    choice = answer.choices[0].model_dump()
    assert choice["token_ids"] == expected
    assert choice["text"] == tokenizer.decode(expected)


def test_the_prompt_tells_a_window_from_none(gemma3_dir: Path, reference: Any, long_prompt: list[int]) -> None:
    """What the test above compares would be another text if the window were not there."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(reference.config)
    assert config.sliding_window == json.loads((gemma3_dir / "config.json").read_text())["sliding_window"] == 512
    config.sliding_window = 4 * LONG_PROMPT_TOKENS
    without = AutoModelForCausalLM.from_pretrained(
        gemma3_dir, config=config, dtype=torch.float32, attn_implementation="eager"
    )
    assert _greedy(without, long_prompt)[:4] != _greedy(reference, long_prompt)[:4]
