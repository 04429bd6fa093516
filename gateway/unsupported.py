"""Known fields that this server does not serve yet: refused by name, unless their value asks for nothing.

Ignoring them would answer something else than what was asked. Fields that change nothing about the answer (`user`,
`metadata`, `store`, `service_tier` ...) are ignored, and so are fields that nobody knows, unless the server was told to
refuse those (`known_fields.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import orjson
import structlog

from gateway.errors import ApiError

_log = structlog.get_logger(__name__)

# Field -> values that ask for nothing; null always does.
_BOTH: Mapping[str, tuple[Any, ...]] = {
    "guided_whitespace_pattern": (),
    "length_penalty": (1, 1.0),
    "logprob_token_ids": ([],),
    "logits_processors": ([],),
    "repetition_detection": (),
    "return_prompt_text": (False,),
    "return_tokens_as_token_ids": (False,),
    # Of a body; `structured_outputs` has one.
    "structural_tag": (),
    "thinking_token_budget": (),
    "truncation_side": ("left",),
    "use_beam_search": (False,),
}
# A chat has it at its top, a response in `text`.
_VERBOSITY: Mapping[str, tuple[Any, ...]] = {"verbosity": ("medium",)}
_CHAT: Mapping[str, tuple[Any, ...]] = {
    **_BOTH,
    **_VERBOSITY,
    # A template writes them itself.
    "add_special_tokens": (False,),
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "documents": ([],),
    "function_call": ("none",),
    "functions": ([],),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "web_search_options": (),
}
_COMPLETION: Mapping[str, tuple[Any, ...]] = {
    **_BOTH,
    "prompt_embeds": (),
}
# What a chat has, and these routes have under another name or not at all.
_NO_CHAT: Mapping[str, tuple[Any, ...]] = {
    **_BOTH,
    "best_of": (1,),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "logprobs": (False,),
    "max_completion_tokens": (),
    "n": (1,),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
}
_RESPONSE: Mapping[str, tuple[Any, ...]] = {
    **_NO_CHAT,
    "context_management": ([],),
    "enable_response_messages": (False,),
    "max_tokens": (),
    "messages": (),
    "mm_processor_kwargs": ({},),
    "moderation": (),
    "previous_input_messages": ([],),
    "reasoning_effort": (),
}
_ANTHROPIC_MESSAGE: Mapping[str, tuple[Any, ...]] = {
    **_NO_CHAT,
    "container": (),
    "max_output_tokens": (),
    "mcp_servers": ([],),
    "reasoning_effort": (),
    "stop": ([],),
    "top_logprobs": (0,),
}
_POOLING: Mapping[str, tuple[Any, ...]] = {
    "activation": (True,),
    "add_special_tokens": (True,),
    "chat_template": (),
    "embed_dtype": ("float32",),
    "endianness": ("native", "little"),
    "instruction": (),
    "messages": (),
    "mm_processor_kwargs": ({},),
    "normalize": (True,),
    "softmax": (True,),
    "truncation_side": ("right",),
    "use_activation": (True,),
}
_MESSAGE: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": (),
}
# A request that only warms the cache wants no text.
_CACHE_OPTIONS: Mapping[str, tuple[Any, ...]] = {"prewarm": (False,)}
# Without effect on the text of an answer: not worth a line in the log.
_HARMLESS = frozenset(
    {
        "metadata",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "spaces_between_special_tokens",
        "store",
        "user",
    }
)

# Of a body, beside those that are served.
CHAT_FIELDS = _HARMLESS | frozenset(_CHAT)
COMPLETION_FIELDS = _HARMLESS | frozenset(_COMPLETION)
POOLING_FIELDS = frozenset(_POOLING)
# Names of other APIs' fields (`max_tokens`, `messages`) are refused as well, but a response has no such fields.
RESPONSE_FIELDS = frozenset(_BOTH)


def check_chat_fields(extra: Mapping[str, Any] | None) -> None:
    """Raise `ApiError` for an unsupported field of a chat body."""
    _check(extra, _CHAT, "")
    _check_cache_options(extra)


def check_completion_fields(extra: Mapping[str, Any] | None) -> None:
    """Raise `ApiError` for an unsupported field of a completions body."""
    _check(extra, _COMPLETION, "")


def check_response_fields(extra: Mapping[str, Any] | None, text_extra: Mapping[str, Any] | None) -> None:
    """Raise `ApiError` for an unsupported field of a body of /v1/responses, or of its `text`."""
    _check(extra, _RESPONSE, "")
    _check_cache_options(extra)
    _check(text_extra, _VERBOSITY, "text.")


def check_anthropic_fields(extra: Mapping[str, Any] | None) -> None:
    """Raise `ApiError` for an unsupported field of a body of /v1/messages."""
    _check(extra, _ANTHROPIC_MESSAGE, "")


def check_pooling_fields(extra: Mapping[str, Any] | None) -> None:
    """Raise `ApiError` for an unsupported field of an embeddings, rerank or score body."""
    _check(extra, _POOLING, "")


def check_message_fields(index: int, extra: Mapping[str, Any] | None) -> None:
    """Raise `ApiError` for an unsupported field of a chat message."""
    _check(extra, _MESSAGE, f"messages[{index}].")


def _check_cache_options(extra: Mapping[str, Any] | None) -> None:
    options = (extra or {}).get("prompt_cache_options")
    if isinstance(options, Mapping):
        _check(
            {name: options[name] for name in _CACHE_OPTIONS if name in options}, _CACHE_OPTIONS, "prompt_cache_options."
        )


def _check(extra: Mapping[str, Any] | None, table: Mapping[str, tuple[Any, ...]], prefix: str) -> None:
    if not extra:
        return
    for name, value in extra.items():
        if name in table and value is not None and not _asks_for_nothing(value, table[name]):
            param = prefix + name
            raise ApiError(
                400,
                f"{param}: not supported by this server yet; leave it out{_alternatives(table[name])}.",
                param=param,
                code="unsupported_parameter",
            )
    ignored = sorted(_unknown(extra, table))
    if ignored:
        _log.debug("fields ignored", fields=[prefix + name for name in ignored])


def _asks_for_nothing(value: Any, harmless: Collection[Any]) -> bool:
    # `False == 0 == 0.0`: a value counts only if it has the type that the table names.
    return any(type(value) is type(other) and value == other for other in harmless)


def _alternatives(harmless: Collection[Any]) -> str:
    words = [orjson.dumps(value).decode() for value in harmless if value not in ("", [], {})]
    return f" or send {words[0]}" if words else ""


def _unknown(extra: Mapping[str, Any], table: Mapping[str, tuple[Any, ...]]) -> Iterator[str]:
    return (name for name in extra if name not in table and name not in _HARMLESS)
