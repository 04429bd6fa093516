"""/v1/embeddings, /v1/rerank and /v1/score against real processes: all-MiniLM-L6-v2 and the official client."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import openai
import pytest
import torch
from stepwire.v1 import inference_pb2, inference_pb2_grpc

from .conftest import MINILM_NAME as MODEL
from .launched import Launched, wait_until
from .test_commands import run

SENTENCES = [
    "A man is eating food.",
    "Someone has a meal.",
    "The stock market fell sharply today.",
    "Water",
    "El zorro marrón salta sobre el perro perezoso. 狐狸 🦊",
    "The quick brown fox jumps over the lazy dog. " * 30,
]


@pytest.fixture
def served(minilm_server: Launched) -> Launched:
    return minilm_server


@pytest.fixture
def client(served: Launched) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.base_url, api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture
def http(served: Launched) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.base_url, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(minilm_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm_dir)


@pytest.fixture(scope="module")
def expected(minilm_dir: Path, tokenizer: Any) -> np.ndarray:
    """Mean of the last hidden states, of length 1: what Sentence Transformers does with this model's modules."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(minilm_dir, dtype=torch.float32).eval()
    vectors = []
    for sentence in SENTENCES:
        with torch.inference_mode():
            states = model(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0]
        vectors.append(torch.nn.functional.normalize(states.mean(0), dim=-1).numpy())
    return np.stack(vectors)


def test_vectors_equal_transformers(client: openai.OpenAI, tokenizer: Any, expected: np.ndarray) -> None:
    # The client asks for base64 by itself, and decodes it.
    answer = client.embeddings.create(model=MODEL, input=SENTENCES)
    assert [each.index for each in answer.data] == list(range(len(SENTENCES)))
    np.testing.assert_allclose([each.embedding for each in answer.data], expected, atol=1e-4)
    num_tokens = sum(len(tokenizer(sentence)["input_ids"]) for sentence in SENTENCES)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (num_tokens, num_tokens)
    assert answer.model == MODEL


def test_start_up_says_what_to_try(served: Launched) -> None:
    assert f"curl {served.base_url}/embeddings" in served.read()


def test_every_form_of_input_and_output(client: openai.OpenAI, tokenizer: Any, expected: np.ndarray) -> None:
    ids = [tokenizer(sentence)["input_ids"] for sentence in SENTENCES]
    for given, rows in ((SENTENCES[0], [0]), (ids[1], [1]), ([ids[2], ids[3]], [2, 3]), (SENTENCES[4:5], [4])):
        answer = client.embeddings.create(model=MODEL, input=given, encoding_format="float")
        np.testing.assert_allclose([each.embedding for each in answer.data], expected[rows], atol=1e-4)
    packed = client.embeddings.with_raw_response.create(model=MODEL, input=SENTENCES[0], encoding_format="base64")
    data = packed.http_response.json()["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(data), "<f4"), expected[0], atol=1e-4)


def test_a_batch_of_embeddings(client: openai.OpenAI, expected: np.ndarray) -> None:
    url = "/v1/embeddings"
    bodies: list[dict[str, Any]] = [{"input": text, "model": MODEL} for text in SENTENCES[:3]] + [{"input": ""}]
    lines = [
        {"custom_id": str(number), "method": "POST", "url": url, "body": body} for number, body in enumerate(bodies)
    ]
    content = "\n".join(map(json.dumps, lines)).encode()
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint=url, completion_window="24h")
    wait_until(lambda: client.batches.retrieve(batch.id).status == "completed", 60)
    batch = client.batches.retrieve(batch.id)
    assert batch.request_counts is not None and batch.output_file_id is not None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (3, 1)
    for line in client.files.content(batch.output_file_id).text.splitlines():
        result = json.loads(line)
        vector = result["response"]["body"]["data"][0]["embedding"]
        np.testing.assert_allclose(vector, expected[int(result["custom_id"])], atol=1e-4)


def test_fewer_dimensions_are_a_unit_vector_again(client: openai.OpenAI, expected: np.ndarray) -> None:
    answer = client.embeddings.create(model=MODEL, input=SENTENCES[:2], dimensions=64)
    cut = expected[:2, :64]
    cut = cut / np.linalg.norm(cut, axis=1, keepdims=True)
    np.testing.assert_allclose([each.embedding for each in answer.data], cut, atol=1e-4)


def test_a_long_list_comes_back_in_order(served: Launched) -> None:
    texts = [f"number {number}" for number in range(600)]

    async def both() -> list[list[list[float]]]:
        async with openai.AsyncOpenAI(base_url=served.base_url, api_key="none", max_retries=0, timeout=120) as client:
            answers = await asyncio.gather(
                client.embeddings.create(model=MODEL, input=texts),
                *(client.embeddings.create(model=MODEL, input=text) for text in texts[::97]),
            )
            return [[each.embedding for each in answer.data] for answer in answers]

    together, *alone = asyncio.run(both())
    assert len(together) == len(texts)
    np.testing.assert_allclose(together[::97], [vectors[0] for vectors in alone], atol=1e-5)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["fine", ""]}, "input[1]"),
        ({"input": ["fine", 3]}, "input[1]"),
        ({"input": [[1, 99_999_999]]}, "input[0][1]"),
        ({"input": "x", "dimensions": 385}, "dimensions"),
        ({"input": "x", "dimensions": 0}, "dimensions"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "x", "truncate_prompt_tokens": 513}, "truncate_prompt_tokens"),
        ({"input": "word " * 600}, "input"),
        ({"input": ["fine", "word " * 600]}, "input[1]"),
        ({"input": ["x"] * 2049}, "input"),
    ],
)
def test_wrong_input_is_named(http: httpx.Client, body: dict[str, Any], param: str) -> None:
    refused = http.post("/embeddings", json=body)
    error = refused.json()["error"]
    assert refused.status_code == 400 and error["param"] == param, error
    assert http.post("/embeddings", json={"model": "nobody", "input": "x"}).status_code == 404


def test_what_is_too_long_is_cut_if_asked_for(http: httpx.Client, tokenizer: Any) -> None:
    long = "word " * 600
    assert http.post("/embeddings", json={"input": long}).json()["error"]["code"] == "context_length_exceeded"
    for wanted, num_tokens in ((-1, 512), (16, 16)):
        answer = http.post("/embeddings", json={"input": long, "truncate_prompt_tokens": wanted}).json()
        assert answer["usage"]["prompt_tokens"] == num_tokens
        # The end mark stays, as where Sentence Transformers cuts.
        ids = tokenizer(long, truncation=True, max_length=num_tokens)["input_ids"]
        same = http.post("/embeddings", json={"input": ids}).json()
        np.testing.assert_allclose(answer["data"][0]["embedding"], same["data"][0]["embedding"], atol=1e-5)


def test_rerank_and_score_are_cosines(http: httpx.Client, expected: np.ndarray) -> None:
    cosines = expected[0] @ expected[1:4].T
    answer = http.post("/rerank", json={"query": SENTENCES[0], "documents": SENTENCES[1:4]}).json()
    by_index = {each["index"]: each["relevance_score"] for each in answer["results"]}
    np.testing.assert_allclose([by_index[index] for index in range(3)], cosines, atol=1e-4)
    assert [each["relevance_score"] for each in answer["results"]] == sorted(by_index.values(), reverse=True)
    assert answer["results"][0]["document"]["text"] == SENTENCES[1]
    best = http.post(
        "/rerank",
        json={
            "query": SENTENCES[0],
            "documents": [{"text": text} for text in SENTENCES[1:4]],
            "top_n": 1,
            "return_documents": False,
        },
    ).json()
    assert best["results"] == [{"index": 0, "relevance_score": pytest.approx(cosines[0], abs=1e-4)}]
    scores = http.post("/score", json={"text_1": SENTENCES[0], "text_2": SENTENCES[1:4]}).json()
    np.testing.assert_allclose([each["score"] for each in scores["data"]], cosines, atol=1e-4)
    assert http.post("/score", json={"text_1": ["a", "b"], "text_2": ["c"]}).json()["error"]["param"] == "text_2"
    assert http.post("/rerank", json={"query": "a", "documents": []}).json()["error"]["param"] == "documents"
    assert http.post("/rerank", json={"query": "", "documents": ["b"]}).json()["error"]["param"] == "query"
    # What would give other numbers is refused, and not left out.
    for path, body, field in (
        ("/embeddings", {"input": "a"}, "normalize"),
        ("/score", {"text_1": "a", "text_2": "b"}, "use_activation"),
    ):
        assert http.post(path, json={**body, field: False}).json()["error"]["param"] == field
        assert http.post(path, json={**body, field: True}).status_code == 200


def test_a_file_of_requests_of_every_kind(served: Launched, tmp_path: Path) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "/v1/embeddings": {"input": "a"},
        "/v1/rerank": {"query": "a", "documents": ["b", "c"]},
        "/v1/score": {"text_1": "a", "text_2": "b"},
    }
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"custom_id": url, "method": "POST", "url": url, "body": body} for url, body in bodies.items()]
    source.write_text("\n".join(map(json.dumps, lines)))
    done = run("run-batch", str(source), str(target), "--url", served.base_url)
    assert done.returncode == 0, done.stderr
    results = {each["custom_id"]: each["response"] for each in map(json.loads, target.read_text().splitlines())}
    assert results.keys() == bodies.keys()
    assert {each["status_code"] for each in results.values()} == {200}
    assert len(results["/v1/rerank"]["body"]["results"]) == 2


def test_it_generates_nothing(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=MODEL, prompt="hello", max_tokens=4)
    assert refused.value.code == "model_cannot_generate"


def test_the_same_over_grpc(served: Launched, expected: np.ndarray) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{served.grpc_port}") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        [model] = stub.ListModels(inference_pb2.ListModelsRequest()).models
        assert (model.embedding_dimensions, model.pools_only, model.has_pair_scores) == (384, True, False)
        answer = stub.Embed(inference_pb2.EmbedRequest(inputs=[inference_pb2.PooledInput(text=SENTENCES[0])]))
        np.testing.assert_allclose(answer.embeddings[0].values, expected[0], atol=1e-4)
        with pytest.raises(grpc.RpcError) as refused:
            stub.Embed(inference_pb2.EmbedRequest())
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.slow
def test_requests_survive_the_death_of_the_worker(served: Launched, expected: np.ndarray) -> None:
    async def run() -> list[list[float]]:
        async with openai.AsyncOpenAI(base_url=served.base_url, api_key="none", max_retries=0, timeout=120) as client:
            asking = asyncio.create_task(client.embeddings.create(model=MODEL, input=SENTENCES * 80))
            await asyncio.sleep(0.3)
            served.child("gpu_worker").kill()
            return [each.embedding for each in (await asking).data]

    losses = served.metric("stepwire_worker_losses_total")
    np.testing.assert_allclose(asyncio.run(run()), np.tile(expected, (80, 1)), atol=1e-4)
    assert served.metric("stepwire_worker_losses_total") == losses + 1
