"""What clients of other servers of this kind send and meet besides the main road; each found by walking it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.system.conftest import Stack, wait_until

CHAT = "/v1/chat/completions"
ASKED: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def http(stack: Stack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stack.url, timeout=60) as client:
        yield client


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert isinstance(error["message"], str) and isinstance(error["type"], str) and {"param", "code"} <= set(error)
    return error


def test_models_have_what_vllms_clients_read(http: httpx.Client) -> None:
    listed = http.get("/v1/models").json()
    assert listed["object"] == "list" and [model["id"] for model in listed["data"]] == ["tiny", "alias/tiny"]
    for model in listed["data"]:
        assert {"root", "parent", "max_model_len", "owned_by", "created"} <= set(model)
        assert model["object"] == "model" and isinstance(model["created"], int)
        assert http.get(f"/v1/models/{model['id']}").json() == model
    assert http.get("/v1/models/alias%2Ftiny").json()["id"] == "alias/tiny"
    assert error_of(http.get("/v1/models/no/such"), 404)["code"] == "model_not_found"


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_more_than_the_context_holds_names_both_numbers(http: httpx.Client, field: str) -> None:
    error = error_of(http.post(CHAT, json={"messages": ASKED, field: 5000}), 400)
    assert error["code"] == "context_length_exceeded" and error["param"] == field
    assert "5000" in error["message"] and "4096" in error["message"]


def test_usage_in_every_chunk_needs_usage(http: httpx.Client) -> None:
    options = {"include_usage": False, "continuous_usage_stats": True}
    for path, body in ((CHAT, {"messages": ASKED}), ("/v1/completions", {"prompt": "Hello"})):
        answer = http.post(path, json={**body, "max_tokens": 4, "stream": True, "stream_options": options})
        events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        assert events and not any(event.get("usage") for event in events)


def test_alternatives_of_none_need_no_logprobs(http: httpx.Client) -> None:
    """Some clients send a 0 always."""
    answer = http.post(CHAT, json={"messages": ASKED, "max_tokens": 2, "top_logprobs": 0, "logprobs": False})
    assert answer.status_code == 200 and answer.json()["choices"][0]["logprobs"] is None
    assert error_of(http.post(CHAT, json={"messages": ASKED, "top_logprobs": 1}), 400)["param"] == "top_logprobs"


def test_wrong_tokens_are_named_as_they_were_sent(http: httpx.Client) -> None:
    assert error_of(http.post("/detokenize", json={"tokens": [1, 99999]}), 400)["param"] == "tokens[1]"


def test_a_batch_of_a_file_that_is_not_there(http: httpx.Client) -> None:
    body = {"input_file_id": "file-none", "endpoint": CHAT, "completion_window": "24h"}
    error = error_of(http.post("/v1/batches", json=body), 404)
    assert (error["param"], error["code"]) == ("input_file_id", "file_not_found")


def test_routes_of_other_servers_are_there(http: httpx.Client) -> None:
    """This model cannot rank; that it says so shows that somebody listens."""
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        error = error_of(http.post(path, json={"query": "x", "documents": ["y"]}), 400)
        assert error["code"] == "model_cannot_embed", path
    for path in ("/score", "/v1/score"):
        assert error_of(http.post(path, json={"text_1": "x", "text_2": "y"}), 400)["code"] == "model_cannot_embed"


def test_load_counts_what_is_being_answered(http: httpx.Client, stack: Stack) -> None:
    """A request whose body has not come yet is one, for as long as it is waited for."""
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
    )

    def load() -> int:
        return int(http.get("/load").json()["server_load"])

    wait_until(lambda: load() == 0, 30)
    with socket.create_connection(("127.0.0.1", stack.port), timeout=30) as raw:
        raw.sendall(head)
        wait_until(lambda: load() == 1, 30)
    wait_until(lambda: load() == 0, 30)


def test_the_page_says_what_is_answered(http: httpx.Client) -> None:
    """No status that the framework alone would give; every error in the shape that its route has."""
    page = http.get("/openapi.json").json()
    schemas = page["components"]["schemas"]
    assert "HTTPValidationError" not in schemas and "ValidationError" not in schemas
    for path, operations in page["paths"].items():
        for method, operation in operations.items():
            assert "422" not in operation["responses"], (method, path)
            if "requestBody" in operation:
                assert {"400", "401", "413", "415"} <= set(operation["responses"]), (method, path)
            kind = "MessageErrorAnswer" if path.startswith("/v1/messages") else "ErrorAnswer"
            for status, response in operation["responses"].items():
                if status >= "400":
                    schema = response["content"]["application/json"]["schema"]
                    assert schema == {"$ref": f"#/components/schemas/{kind}"}, (method, path, status)


def test_statuses_are_the_sdks_exceptions(stack: Stack) -> None:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="any", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="nobody", messages=ASKED)
        assert missing.value.code == "model_not_found" and missing.value.request_id
        with pytest.raises(openai.BadRequestError) as wrong:
            client.chat.completions.create(model="tiny", messages=[])
        assert wrong.value.param == "messages" and wrong.value.type == "invalid_request_error"
        with pytest.raises(openai.NotFoundError):
            client.responses.create(model="tiny", input="x", previous_response_id="resp_none")
        answer = client.chat.completions.with_raw_response.create(
            model="tiny", messages=ASKED, max_tokens=1, extra_headers={"x-request-id": "from-a-test"}
        )
        assert answer.request_id == "from-a-test"
