"""What a prompt's ids must fit: the model's vocabulary, its context, and the size of an answer."""

from __future__ import annotations

import numpy as np
from stepwire.v1 import inference_pb2 as pb

from control_plane.core.request import TokenIdArray
from control_plane.frontend.errors import RequestRefused, Violation
from control_plane.frontend.request_fields import StopFields

CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
# Of a prompt's tokens and their alternatives together: they travel in one message.
MAX_PROMPT_LOGPROBS = 2**20


def check_num_prompt_logprobs(num_prompt_tokens: int, num_top: int | None) -> None:
    if num_top is not None and num_prompt_tokens * (num_top + 1) > MAX_PROMPT_LOGPROBS:
        raise RequestRefused.invalid(
            Violation(
                "output.prompt_logprobs",
                f"{num_prompt_tokens} prompt tokens with {num_top + 1} logprobs each are more than the "
                f"{MAX_PROMPT_LOGPROBS} that one answer holds: ask for fewer, or shorten the prompt",
            )
        )


def truncated(ids: TokenIdArray, request: pb.GenerateRequest, max_model_len: int) -> TokenIdArray:
    """The prompt's last tokens, if only they are wanted."""
    if not request.HasField("truncate_prompt_tokens"):
        return ids
    wanted = request.truncate_prompt_tokens
    if wanted > max_model_len:
        raise RequestRefused.invalid(
            Violation("truncate_prompt_tokens", f"is {wanted}, but this model's context holds {max_model_len} tokens")
        )
    if wanted == -1:
        room = max(request.stop.max_tokens if request.stop.HasField("max_tokens") else 1, request.stop.min_tokens, 1)
        wanted = max(1, max_model_len - room)
    return ids[-wanted:]


def check_vocabulary(field: str, ids: TokenIdArray, vocab_size: int) -> None:
    """Name the first id that the model does not have."""
    if not len(ids) or int(ids.max()) < vocab_size:
        return
    index = int(np.argmax(ids >= vocab_size))
    raise RequestRefused.invalid(
        Violation(f"{field}[{index}]", f"token id {ids[index]} is out of vocabulary: ids are below {vocab_size}")
        if field.endswith("ids")
        else Violation(
            field,
            f"the tokenizer gives token id {ids[index]}, but the worker's model has ids below {vocab_size}: "
            "the control plane and the worker were started with different models",
        )
    )


def max_tokens_of(num_prompt_tokens: int, stop: StopFields, max_model_len: int, input_field: str) -> int:
    """What the request asked for, or what the context leaves."""
    if num_prompt_tokens >= max_model_len:
        raise _too_long(
            input_field,
            f"the prompt has {num_prompt_tokens} tokens, but this model's context holds {max_model_len}, "
            "of which at least 1 must be left to generate",
        )
    left = max_model_len - num_prompt_tokens
    asked = max(stop.max_tokens or 0, stop.min_tokens)
    if asked > left:
        raise _too_long(
            "stop.min_tokens" if stop.max_tokens is None else "stop.max_tokens",
            f"{num_prompt_tokens} prompt tokens and {asked} tokens to generate make {num_prompt_tokens + asked}, "
            f"but this model's context holds {max_model_len}: shorten the prompt or ask for at most {left}",
        )
    return left if stop.max_tokens is None else stop.max_tokens


def _too_long(field: str, description: str) -> RequestRefused:
    return RequestRefused.invalid(Violation(field, description), reason=CONTEXT_LENGTH_EXCEEDED)
