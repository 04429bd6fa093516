from __future__ import annotations

from typing import Any

import pytest
from anthropic.types.message_count_tokens_params import MessageCountTokensParams
from anthropic.types.message_create_params import MessageCreateParamsBase
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams
from openai.types.embedding_create_params import EmbeddingCreateParams
from openai.types.responses.response_create_params import ResponseCreateParamsBase
from pydantic import BaseModel

from gateway.errors import ApiError
from gateway.known_fields import refuse_unknown_fields
from gateway.messages.schemas import CountTokensBody, MessagesBody
from gateway.pooling_schemas import EmbeddingsBody, RerankBody, ScoreBody
from gateway.responses.schemas import ResponsesBody
from gateway.schemas import ChatCompletionBody, CompletionBody, DetokenizeBody, TokenizeBody

CLIENTS: list[tuple[type[BaseModel], Any]] = [
    (ChatCompletionBody, ChatParams),
    (CompletionBody, CompletionParams),
    (ResponsesBody, ResponseCreateParamsBase),
    (EmbeddingsBody, EmbeddingCreateParams),
    (MessagesBody, MessageCreateParamsBase),
    (CountTokensBody, MessageCountTokensParams),
]


@pytest.mark.parametrize(("schema", "params"), CLIENTS, ids=lambda each: each.__name__)
def test_whatever_the_official_clients_send_is_known(schema: type[BaseModel], params: Any) -> None:
    names = {*params.__annotations__} | ({"stream"} & {*schema.model_fields})
    assert len(names) > 4
    body = schema.model_construct(None, **dict.fromkeys(names, "x"))
    refuse_unknown_fields(body)


@pytest.mark.parametrize(
    ("schema", "name"),
    [
        (ChatCompletionBody, "top_k"),
        (ChatCompletionBody, "guided_regex"),
        (ChatCompletionBody, "vllm_xargs"),
        (ChatCompletionBody, "chat_template"),
        (CompletionBody, "return_tokens_as_token_ids"),
        (CompletionBody, "prompt_embeds"),
        (EmbeddingsBody, "normalize"),
        (RerankBody, "max_tokens_per_doc"),
        (ScoreBody, "softmax"),
        (MessagesBody, "top_k"),
        (TokenizeBody, "mm_processor_kwargs"),
        (DetokenizeBody, "request_id"),
    ],
    ids=str,
)
def test_extensions_are_known_and_slips_are_not(schema: type[BaseModel], name: str) -> None:
    refuse_unknown_fields(schema.model_construct(None, **{name: 1}))
    with pytest.raises(ApiError) as raised:
        refuse_unknown_fields(schema.model_construct(None, **{name: 1, f"{name}_": None, "zzz": 2}))
    error = raised.value
    assert (error.status, error.type, error.param, error.code) == (
        400,
        "invalid_request_error",
        f"{name}_",
        "unknown_parameter",
    )
    assert error.message == f"Unrecognized request argument supplied: {name}_"
