"""/tokenize, /detokenize, /load, /version against the real stack."""

from __future__ import annotations

import httpx
import pytest
from tokenizers import Tokenizer

from tests.system.conftest import LIMIT_S, MAX_MODEL_LEN, Stack, wait_until


@pytest.fixture
def client(stack: Stack) -> httpx.Client:
    return httpx.Client(base_url=stack.url, timeout=120)


def test_text_goes_to_ids_and_back(client: httpx.Client, stack: Stack) -> None:
    tokenizer = Tokenizer.from_file(str(stack.model / "tokenizer.json"))
    text = "The capital of France. 日本語 😀"
    answer = client.post("/tokenize", json={"model": "tiny", "prompt": text, "return_token_strs": True}).json()
    assert answer["tokens"] == tokenizer.encode(text).ids
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), MAX_MODEL_LEN)
    assert len(answer["token_strs"]) == answer["count"]
    assert answer["token_strs"][0] and text.startswith(answer["token_strs"][0])
    assert client.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}
    assert client.post("/tokenize", json={"prompt": text}).json()["token_strs"] is None


def test_a_conversation_is_tokenized_as_it_is_served(client: httpx.Client) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    ids = client.post("/tokenize", json={"messages": messages}).json()["tokens"]
    text = client.post("/detokenize", json={"tokens": ids}).json()["prompt"]
    assert "Hello" in text
    usage = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1}).json()["usage"]
    assert usage["prompt_tokens"] == len(ids)


@pytest.mark.parametrize(
    "path, body, status, param",
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, 400, "prompt"),
        ("/tokenize", {"prompt": 3}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "nobody"}, 404, "model"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": ["a"]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": [10**6]}, 400, None),
        ("/detokenize", {}, 400, "tokens"),
    ],
)
def test_wrong_bodies_are_named(
    client: httpx.Client, path: str, body: dict[str, object], status: int, param: str | None
) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    if param is not None:
        assert answer.json()["error"]["param"] == param


def test_load_counts_requests_and_version_is_ours(client: httpx.Client, stack: Stack) -> None:
    import stepwire

    # A request may be over for its client before it is for the gateway.
    wait_until(lambda: client.get("/load").json() == {"server_load": 0}, LIMIT_S, stack.logs)
    body = {"prompt": [5, 6], "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()  # dropping it would close the connection
        next(lines)
        with stack.paused():
            assert client.get("/load").json() == {"server_load": 1}
    stack.wait_idle()
    assert client.get("/version").json() == {"version": stepwire.__version__}
    listed = client.get("/v1/models").json()["data"]
    for model in listed:
        assert client.get(f"/v1/models/{model['id']}").json() == model


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": "hello"}),
        ("/v1/rerank", {"query": "hello", "documents": ["you", "world"]}),
        ("/v1/score", {"text_1": "hello", "text_2": "you"}),
    ],
)
def test_a_model_that_generates_says_that_it_cannot_embed(
    client: httpx.Client, path: str, body: dict[str, object]
) -> None:
    refused = client.post(path, json={"model": "tiny", **body})
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "model_cannot_embed"
    assert client.post(path, json={"model": "nobody", **body}).status_code == 404
