"""Fields of a body that somebody's API knows: OpenAI's (Anthropic's, Cohere's), vLLM's extensions, and our own.

Where the server refuses unknown fields (`--unknown-fields reject`), a field that is in none of them is taken for a
slip of the pen. Known ones that this server does not serve are `unsupported.py`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from gateway.errors import ApiError
from gateway.messages.schemas import CountTokensBody, MessagesBody
from gateway.pooling_schemas import EmbeddingsBody, RerankBody, ScoreBody
from gateway.responses.schemas import ResponsesBody
from gateway.schemas import ChatCompletionBody, CompletionBody, DetokenizeBody, TokenizeBody
from gateway.unsupported import CHAT_FIELDS, COMPLETION_FIELDS, POOLING_FIELDS, RESPONSE_FIELDS

UNKNOWN_PARAMETER = "unknown_parameter"

# vLLM's, without effect here.
_VLLM = frozenset(
    {
        "ec_transfer_params",
        "guided_decoding_backend",
        "kv_transfer_params",
        "media_io_kwargs",
        "session_id",
        "stream_interval",
        "vllm_xargs",
    }
)
_VLLM_POOLING = POOLING_FIELDS | {"cache_salt", "chat_template_kwargs", "request_id", "user"}
_ANTHROPIC = frozenset(
    {
        "cache_control",
        "container",
        "context_management",
        "diagnostics",
        "inference_geo",
        "mcp_servers",
        "metadata",
        "service_tier",
        "speed",
        "user_profile_id",
        "workspace_id",
    }
)
# Body -> names besides its own fields. Bodies that are not here take none.
_BESIDES: Mapping[type[BaseModel], frozenset[str]] = {
    ChatCompletionBody: CHAT_FIELDS | _VLLM,
    CompletionBody: COMPLETION_FIELDS | _VLLM,
    ResponsesBody: RESPONSE_FIELDS
    | _VLLM
    | {
        "access_programs",
        "background_options",
        "context_management",
        "conversation",
        "enable_response_messages",
        "image",
        "max_tool_calls",
        "mm_processor_kwargs",
        "moderation",
        "previous_input_messages",
        "prompt",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "stream_options",
        "user",
    },
    EmbeddingsBody: _VLLM_POOLING,
    RerankBody: _VLLM_POOLING | {"max_chunks_per_doc", "max_tokens_per_doc", "overlap_tokens", "rank_fields"},
    ScoreBody: _VLLM_POOLING,
    MessagesBody: _ANTHROPIC,
    CountTokensBody: _ANTHROPIC,
    TokenizeBody: frozenset({"chat_template", "media_io_kwargs", "mm_processor_kwargs", "request_id"}),
    DetokenizeBody: frozenset({"request_id"}),
}


def refuse_unknown_fields(body: BaseModel) -> None:
    """Raise `ApiError` for a field at the top of a body that nobody's API knows."""
    extra: Mapping[str, Any] = body.model_extra or {}
    if not extra:
        return
    known = _BESIDES.get(type(body), frozenset())
    unknown = [name for name in extra if name not in known]
    if unknown:
        name = unknown[0][:200]
        raise ApiError(400, f"Unrecognized request argument supplied: {name}", param=name, code=UNKNOWN_PARAMETER)
