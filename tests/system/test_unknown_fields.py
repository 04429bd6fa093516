"""`--unknown-fields reject`, by the official clients."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from openai import AsyncOpenAI

from tests.system.conftest import Stack

ASKED: Any = [{"role": "user", "content": "Hello"}]
SLIP = {"temprature": 0}


@pytest.fixture(scope="module")
def strict(tiny_model: Path) -> Any:
    with Stack(tiny_model, gateway_flags=["--unknown-fields", "reject"]) as running:
        yield running


@pytest.fixture
async def client(strict: Stack) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{strict.url}/v1", api_key="none", max_retries=0) as made:
        yield made


async def test_a_slip_of_the_pen_is_named(client: AsyncOpenAI) -> None:
    calls = (
        client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=2, extra_body=SLIP),
        client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=2, stream=True, extra_body=SLIP),
        client.completions.create(model="tiny", prompt="Hello", max_tokens=2, extra_body=SLIP),
        client.responses.create(model="tiny", input="Hello", max_output_tokens=2, extra_body=SLIP),
        client.embeddings.create(model="tiny", input="Hello", extra_body=SLIP),
    )
    for call in calls:
        with pytest.raises(openai.BadRequestError) as raised:
            await call
        error = raised.value
        assert (error.type, error.param, error.code) == ("invalid_request_error", "temprature", "unknown_parameter")
        assert error.body["message"] == "Unrecognized request argument supplied: temprature"  # type: ignore[index]


async def test_known_fields_pass_with_and_without_effect(client: AsyncOpenAI) -> None:
    extra = {"top_k": 5, "ignore_eos": True, "vllm_xargs": {"a": 1}, "request_id": "mine"}
    answer = await client.chat.completions.create(
        model="tiny", messages=ASKED, max_tokens=2, user="u", metadata={"a": "b"}, store=False, extra_body=extra
    )
    assert answer.usage is not None and answer.usage.completion_tokens == 2
    # Known, and not served: refused as ever.
    with pytest.raises(openai.BadRequestError) as raised:
        await client.chat.completions.create(
            model="tiny", messages=ASKED, max_tokens=2, extra_body={"chat_template": "{{ 1 }}"}
        )
    assert raised.value.code == "unsupported_parameter"
    # Only the body's own fields are looked at.
    messages: Any = [{**ASKED[0], "mood": "good"}]
    assert (await client.chat.completions.create(model="tiny", messages=messages, max_tokens=2)).choices


async def test_messages_answers_in_its_own_shape(strict: Stack) -> None:
    async with anthropic.AsyncAnthropic(base_url=strict.url, api_key="none", max_retries=0) as client:
        with pytest.raises(anthropic.BadRequestError) as raised:
            await client.messages.create(model="tiny", messages=ASKED, max_tokens=2, extra_body=SLIP)
        assert raised.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]
        assert "temprature" in raised.value.message
        assert (await client.messages.create(model="tiny", messages=ASKED, max_tokens=2, service_tier="auto")).content


async def test_a_line_of_a_batch_is_read_as_strictly(client: AsyncOpenAI) -> None:
    body = {"messages": ASKED, "max_tokens": 2}
    lines = [
        {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": {**body, **extra}}
        for name, extra in (("good", {}), ("bad", SLIP))
    ]
    data = "\n".join(map(json.dumps, lines)).encode()
    file = await client.files.create(file=("lines.jsonl", data), purpose="batch")
    batch = await client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    while batch.status not in ("completed", "failed"):
        batch = await client.batches.retrieve(batch.id)
    assert batch.request_counts is not None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 1)
    failed = json.loads((await client.files.content(batch.error_file_id or "")).text)
    assert failed["custom_id"] == "bad"
    assert failed["response"]["body"]["error"]["code"] == "unknown_parameter"


@pytest.mark.parametrize("verbosity, is_served", [("medium", True), (None, True), ("low", False), ("high", False)])
async def test_a_chat_and_a_response_have_one_rule_for_verbosity(
    client: AsyncOpenAI, verbosity: Any, is_served: bool
) -> None:
    """It would change the answer, and no model here knows it."""
    calls = {
        "verbosity": client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=2, verbosity=verbosity),
        "text.verbosity": client.responses.create(
            model="tiny", input="Hello", max_output_tokens=2, text={"verbosity": verbosity}
        ),
    }
    for param, call in calls.items():
        if is_served:
            assert (await call).usage is not None
            continue
        with pytest.raises(openai.BadRequestError) as raised:
            await call
        assert (raised.value.param, raised.value.code) == (param, "unsupported_parameter")
        assert param in raised.value.message


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"moderation": {"model": "m"}}, "moderation", "unsupported_parameter"),
        ({"context_management": [{"type": "compaction"}]}, "context_management", "unsupported_parameter"),
        ({"prompt_cache_options": {"prewarm": True}}, "prompt_cache_options.prewarm", "unsupported_parameter"),
        ({"previous_input_messages": ASKED}, "previous_input_messages", "unsupported_parameter"),
        ({"enable_response_messages": True}, "enable_response_messages", "unsupported_parameter"),
        ({"thinking_token_budget": 5}, "thinking_token_budget", "unsupported_parameter"),
        ({"include": ["message.output_text.logprob"]}, "include[0]", None),
    ],
    ids=lambda each: str(each) if isinstance(each, str) else None,
)
async def test_what_a_response_would_answer_otherwise_for_is_named(
    client: AsyncOpenAI, fields: dict[str, Any], param: str, code: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        await client.responses.create(model="tiny", input="Hello", max_output_tokens=2, extra_body=fields)
    assert (raised.value.param, raised.value.code) == (param, code)


async def test_what_changes_no_text_of_a_response_passes(client: AsyncOpenAI) -> None:
    made = await client.responses.create(
        model="tiny",
        input="Hello",
        max_output_tokens=2,
        include=["reasoning.encrypted_content", "file_search_call.results"],
        max_tool_calls=3,
        prompt_cache_options={"mode": "implicit", "prewarm": False},
        stream_options={"include_obfuscation": False},
        context_management=None,
    )
    assert made.usage is not None and made.usage.output_tokens == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"mcp_servers": [{"type": "url", "url": "http://localhost/", "name": "n"}]},
        {"container": "c"},
    ],
    ids=str,
)
async def test_tools_and_containers_of_somebody_elses_servers(stack: Stack, fields: dict[str, Any]) -> None:
    """Without them the answer would be another one."""
    async with anthropic.AsyncAnthropic(base_url=stack.url, api_key="none", max_retries=0) as client:
        with pytest.raises(anthropic.BadRequestError) as raised:
            await client.messages.create(model="tiny", messages=ASKED, max_tokens=2, extra_body=fields)
        assert next(iter(fields)) in raised.value.message
