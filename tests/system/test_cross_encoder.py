"""A cross encoder behind /v1/score and /v1/rerank: real processes, a small random BERT with MiniLM's tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from .launched import Launched

pytestmark = pytest.mark.slow

QUERY = "How many people live in Berlin?"
DOCUMENTS = ["Berlin has 3.7 million inhabitants.", "New York is in the north-east.", "Berlin is a city.", "?"]


@pytest.fixture(scope="module")
def cross_encoder(minilm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """The directory, transformers' tokenizer and its model."""
    from transformers import AutoTokenizer
    from transformers.models.bert import BertConfig, BertForSequenceClassification

    directory = tmp_path_factory.mktemp("cross-encoder")
    torch.manual_seed(8)
    config = BertConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=96,
        num_labels=1,
        initializer_range=0.3,
    )
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(minilm_dir / name, directory / name)
    return directory, AutoTokenizer.from_pretrained(directory), model


@pytest.fixture(scope="module")
def client(cross_encoder: tuple[Path, Any, Any]) -> Iterator[httpx.Client]:
    with (
        Launched(cross_encoder[0], "--dtype=float32", "--served-model-name=judge") as launched,
        httpx.Client(base_url=launched.base_url, timeout=120) as client,
    ):
        assert f"curl {launched.base_url}/score" in launched.read()
        yield client


@pytest.fixture(scope="module")
def expected(cross_encoder: tuple[Path, Any, Any]) -> np.ndarray:
    _, tokenizer, model = cross_encoder
    scores = []
    for document in DOCUMENTS:
        with torch.inference_mode():
            scores.append(model(**tokenizer(QUERY, document, return_tensors="pt")).logits[0, 0].sigmoid().item())
    assert max(scores) - min(scores) > 0.05, "the model rates everything alike"
    return np.array(scores)


def test_scores_are_the_models_own(client: httpx.Client, cross_encoder: Any, expected: np.ndarray) -> None:
    answer = client.post("/score", json={"text_1": QUERY, "text_2": DOCUMENTS}).json()
    np.testing.assert_allclose([each["score"] for each in answer["data"]], expected, atol=1e-4)
    tokenizer = cross_encoder[1]
    assert answer["usage"]["prompt_tokens"] == sum(len(tokenizer(QUERY, text)["input_ids"]) for text in DOCUMENTS)


def test_rerank_orders_by_them(client: httpx.Client, expected: np.ndarray) -> None:
    answer = client.post("/rerank", json={"model": "judge", "query": QUERY, "documents": DOCUMENTS}).json()
    assert [each["index"] for each in answer["results"]] == np.argsort(-expected).tolist()


def test_it_computes_no_embeddings_and_no_text(client: httpx.Client) -> None:
    refused = client.post("/embeddings", json={"input": "x"}).json()["error"]
    assert refused["code"] == "model_cannot_embed" and "rates pairs" in refused["message"]
    chat = client.post("/completions", json={"model": "judge", "prompt": "x"}).json()["error"]
    assert chat["code"] == "model_cannot_generate"
    too_long = client.post("/score", json={"text_1": QUERY, "text_2": "word " * 200}).json()["error"]
    assert too_long["code"] == "context_length_exceeded" and too_long["param"].startswith("text_2")
