"""Embeddings and scores through the runner against transformers' hidden states, pooled by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.bert import BertConfig
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.qwen3 import Qwen3Config
from transformers.models.xlm_roberta import XLMRobertaConfig

from gpu_worker.config import WorkerSettings
from gpu_worker.model_spec import ModelConfigError
from gpu_worker.runner import TorchRunner
from gpu_worker.runner_api import PoolingKind, RowFaultCode, RowPooling, StepResult
from tests.unit.gpu_worker.models.tiny_checkpoints import BASE, Tiny, save_tiny
from tests.unit.gpu_worker.step_builder import Run, row_add, step

TEXTS = [list(range(5, 5 + length)) for length in (1, 9, 30, 9)]
BERT = {"num_attention_heads": 4, "max_position_embeddings": 64, "type_vocab_size": 2}


def load(directory: Path, **changes: Any) -> TorchRunner:
    values: dict[str, Any] = {"device": "cpu", "dtype": "float32", "cpu_kv_cache_gib": 0.01, "num_threads": 1}
    return TorchRunner.load(WorkerSettings(model=directory, **(values | changes)))


def embed(
    runner: TorchRunner,
    texts: Sequence[Sequence[int]],
    *,
    piece: int | None = None,
    second_starts: Sequence[int] | None = None,
) -> np.ndarray:
    """All texts side by side, in pieces of `piece` tokens: [num_texts, dimensions]."""
    block_size = runner.describe().block_size
    next_block = runner.describe().first_block_id
    adds, sizes = [], [len(text) for text in texts]
    for row, text in enumerate(texts):
        blocks = list(range(next_block, next_block + -(-len(text) // block_size)))
        next_block += len(blocks)
        pooling = RowPooling(second_starts[row] if second_starts else 0)
        adds.append(replace(row_add(row, text, blocks), pooling=pooling))
    done = [0] * len(texts)
    vectors: dict[int, np.ndarray] = {}
    step_id = 0
    while any(row_done < size for row_done, size in zip(done, sizes, strict=True)):
        runs = []
        for row, size in enumerate(sizes):
            count = min(piece or size, size - done[row])
            if count:
                runs.append(Run(row, done[row], count, samples=done[row] + count == size))
                done[row] += count
        step_id += 1
        result = run(runner, step(step_id, runs, adds=adds if step_id == 1 else []))
        assert not result.faults and not len(result.rows)
        if result.pooled_rows is not None and result.pooled_values is not None:
            assert result.pooled_rows.tolist() == [entry.row for entry in runs if entry.samples]
            vectors.update(zip(result.pooled_rows.tolist(), result.pooled_values, strict=True))
    runner.reset()
    return np.stack([vectors[row] for row in range(len(texts))])


def run(runner: TorchRunner, batch: Any) -> StepResult:
    def no_mask() -> Any:
        raise AssertionError("no mask is awaited")

    return runner.execute(batch, no_mask).result()


def states_of(model: Any, text: Sequence[int], **inputs: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([text]), **inputs).last_hidden_state[0]


def pooled(states: torch.Tensor, method: str) -> torch.Tensor:
    return {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[method]


def save(model: Any, directory: Path) -> Any:
    """Constants made to matter, as in `save_model`."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or parameter.std() == 0:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.eval().save_pretrained(directory)
    return model


def write_modules(directory: Path, *modules: tuple[str, str]) -> None:
    entries = [{"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"}]
    for kind, path in modules:
        entries.append({"idx": len(entries), "path": path, "type": f"sentence_transformers.models.{kind}"})
        (directory / path).mkdir(exist_ok=True)
    (directory / "modules.json").write_text(json.dumps(entries))


def write_pooling(directory: Path, **modes: bool) -> None:
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 60} | modes))


@pytest.mark.parametrize("method", ["last", "mean", "cls"])
@pytest.mark.parametrize("piece", [None, 4])
def test_a_decoder_pools_whatever_its_prompt_is_cut_into(method: str, piece: int | None, tmp_path: Path) -> None:
    reference = save_tiny("qwen3", tmp_path)
    runner = load(tmp_path, task="embed", pooling=method)
    facts = runner.describe().pooling
    assert facts is not None and (facts.kind, facts.dimensions, facts.only) == (PoolingKind.EMBEDDING, 60, True)
    expected = torch.stack([pooled(states_of(reference.model, text), method) for text in TEXTS])
    expected = torch.nn.functional.normalize(expected, dim=-1)
    np.testing.assert_allclose(embed(runner, TEXTS, piece=piece), expected, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [Qwen3Config(**BASE, head_dim=18), MistralConfig(**BASE, sliding_window=None, head_dim=16)],
    ids=["qwen3", "mistral"],
)
def test_a_trunk_without_head_embeds_by_itself(config: Any, tmp_path: Path) -> None:
    """`Qwen3Model` and the like: names without `model.`, no lm_head."""
    torch.manual_seed(1)
    reference = save(AutoModel.from_config(config), tmp_path)
    expected = torch.stack([states_of(reference, text)[-1] for text in TEXTS])
    # Code that the repository carries for other servers is not needed, and not run.
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"auto_map": {"AutoModel": "own.Own"}}))
    got = embed(load(tmp_path), TEXTS)
    np.testing.assert_allclose(got, torch.nn.functional.normalize(expected, dim=-1), atol=1e-5)
    with pytest.raises(ModelConfigError, match="no output head"):
        load(tmp_path, task="generate")


@pytest.mark.parametrize("tied", [True, False])
def test_a_trunk_that_calls_itself_a_causal_model_embeds(tied: bool, tmp_path: Path) -> None:
    """Qwen3-Embedding: a trunk's names, no lm_head, and the architecture of a model that has one."""
    torch.manual_seed(1)
    config = Qwen3Config(**(BASE | {"tie_word_embeddings": tied}), head_dim=18)
    reference = save(AutoModel.from_config(config), tmp_path)
    expected = torch.stack([states_of(reference, text)[-1] for text in TEXTS])
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"architectures": ["Qwen3ForCausalLM"]}))
    write_modules(tmp_path, ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
    write_pooling(tmp_path, pooling_mode_lasttoken=True)
    got = embed(load(tmp_path), TEXTS)
    np.testing.assert_allclose(got, torch.nn.functional.normalize(expected, dim=-1), atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_an_encoder_sees_the_whole_text(family: str, tmp_path: Path) -> None:
    config_class = BertConfig if family == "bert" else XLMRobertaConfig
    pad = {} if family == "bert" else {"pad_token_id": 1, "bos_token_id": 0}
    torch.manual_seed(1)
    reference = save(AutoModel.from_config(config_class(**(BASE | BERT | pad))), tmp_path)
    runner = load(tmp_path, pooling="mean")
    facts = runner.describe()
    assert facts.pooling is not None and facts.pooling.whole_prompts
    assert facts.block_bytes == 0 and facts.max_num_batched_tokens >= facts.max_model_len
    assert facts.max_model_len == (64 if family == "bert" else 62)
    expected = torch.stack([states_of(reference, text).mean(0) for text in TEXTS])
    np.testing.assert_allclose(embed(runner, TEXTS), torch.nn.functional.normalize(expected, dim=-1), atol=1e-5)


def test_an_encoders_prompt_in_pieces_is_that_rows_fault(tmp_path: Path) -> None:
    save(AutoModel.from_config(BertConfig(**(BASE | BERT))), tmp_path)
    runner = load(tmp_path)
    add = replace(row_add(0, TEXTS[1], [1]), pooling=RowPooling())
    result = run(runner, step(1, [Run(0, 0, 4, samples=False)], adds=[add]))
    assert [(fault.row, fault.code) for fault in result.faults] == [(0, RowFaultCode.UNSUPPORTED)]


def test_rows_that_ask_for_what_is_not_served_fail_alone(tmp_path: Path) -> None:
    save_tiny("qwen3", tmp_path)
    generating, embedding = load(tmp_path), load(tmp_path, task="embed")
    assert generating.describe().pooling is None
    for runner, pooling in ((generating, RowPooling()), (embedding, None)):
        add = replace(row_add(0, TEXTS[1], [1]), pooling=pooling)
        result = run(runner, step(1, [Run(0, 0, 9)], adds=[add]))
        assert next(fault.code for fault in result.faults if fault.row == 0) == RowFaultCode.UNSUPPORTED


def test_dense_and_normalize_modules(tmp_path: Path) -> None:
    reference = save_tiny("qwen3", tmp_path)
    write_modules(tmp_path, ("Pooling", "1_Pooling"), ("Dense", "2_Dense"), ("Normalize", "3_Normalize"))
    write_pooling(tmp_path, pooling_mode_mean_tokens=True, pooling_mode_cls_token=False)
    weight, bias = torch.randn(7, 60), torch.randn(7)
    fields = {"in_features": 60, "out_features": 7, "bias": True}
    (tmp_path / "2_Dense" / "config.json").write_text(
        json.dumps(fields | {"activation_function": "torch.nn.modules.activation.Tanh"})
    )
    save_file({"linear.weight": weight, "linear.bias": bias}, tmp_path / "2_Dense" / "model.safetensors")
    runner = load(tmp_path)  # the modules say what it is for
    expected = torch.stack([states_of(reference.model, text).mean(0) for text in TEXTS]) @ weight.T + bias
    expected = torch.nn.functional.normalize(expected.tanh(), dim=-1)
    np.testing.assert_allclose(embed(runner, TEXTS, piece=7), expected, atol=1e-5)
    write_modules(tmp_path, ("Pooling", "1_Pooling"))
    expected = torch.stack([states_of(reference.model, text).mean(0) for text in TEXTS])
    np.testing.assert_allclose(embed(load(tmp_path), TEXTS), expected, atol=1e-4)


def test_modules_that_are_not_known_are_refused_by_name(tmp_path: Path) -> None:
    save_tiny("qwen3", tmp_path)
    write_modules(tmp_path, ("Pooling", "1_Pooling"))
    write_pooling(tmp_path, pooling_mode_max_tokens=True)
    with pytest.raises(ModelConfigError, match="pools by pooling_mode_max_tokens"):
        load(tmp_path)
    write_pooling(tmp_path, pooling_mode_mean_tokens=True, pooling_mode_cls_token=True)
    with pytest.raises(ModelConfigError, match="pools by pooling_mode_mean_tokens, pooling_mode_cls_token"):
        load(tmp_path)
    write_modules(tmp_path, ("CNN", "1_CNN"))
    with pytest.raises(ModelConfigError, match="'CNN'"):
        load(tmp_path, task="embed")
    write_modules(tmp_path, ("Pooling", "../elsewhere"))
    with pytest.raises(ModelConfigError, match="leads out"):
        load(tmp_path)


@pytest.mark.parametrize("activation", ["Sigmoid", "Identity"])
@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "llama"])
def test_a_head_with_one_label_scores_pairs(kind: str, activation: str, tmp_path: Path) -> None:
    configs: dict[str, Tiny] = {
        "bert": Tiny(BertConfig, BERT),
        "xlm-roberta": Tiny(XLMRobertaConfig, BERT | {"pad_token_id": 1, "bos_token_id": 0, "type_vocab_size": 1}),
        "llama": Tiny(LlamaConfig, {"pad_token_id": 0}),
    }
    tiny = configs[kind]
    torch.manual_seed(1)
    config = tiny.config_class(**(BASE | tiny.fields), num_labels=1)
    reference = save(AutoModelForSequenceClassification.from_config(config), tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["sentence_transformers"] = {"activation_fn": f"torch.nn.modules.activation.{activation}"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    runner = load(tmp_path)
    facts = runner.describe().pooling
    assert facts is not None and (facts.kind, facts.dimensions) == (PoolingKind.SCORE, 1)
    second_starts = [0, 4, 11, 7]
    expected = []
    for text, second_start in zip(TEXTS, second_starts, strict=True):
        segments = [int(0 < second_start <= position) for position in range(len(text))]
        inputs = {"token_type_ids": torch.tensor([segments])} if kind == "bert" else {}
        with torch.inference_mode():
            expected.append(reference(torch.tensor([text]), **inputs).logits[0])
    scores = torch.stack(expected)
    got = embed(runner, TEXTS, second_starts=second_starts)
    np.testing.assert_allclose(got, scores.sigmoid() if activation == "Sigmoid" else scores, atol=1e-5)


def test_a_classifier_of_several_labels_is_refused(tmp_path: Path) -> None:
    config = BertConfig(**(BASE | BERT), num_labels=3)
    save(AutoModelForSequenceClassification.from_config(config), tmp_path)
    with pytest.raises(ModelConfigError, match="has 3 labels, and scores need a head with one"):
        load(tmp_path)


def test_all_minilm_as_published(minilm_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm_dir)
    reference = AutoModel.from_pretrained(minilm_dir, dtype=torch.float32).eval()
    sentences = ["A man is eating food.", "Water", "The quick brown fox jumps over the lazy dog. " * 20]
    texts = [tokenizer(sentence)["input_ids"] for sentence in sentences]
    expected = torch.stack([states_of(reference, text).mean(0) for text in texts])
    got = embed(load(minilm_dir), texts)
    np.testing.assert_allclose(got, torch.nn.functional.normalize(expected, dim=-1), atol=1e-5)
