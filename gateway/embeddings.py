"""OpenAI's embeddings bodies to EmbedRequests, and their answers: pure functions."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
from stepwire.v1 import inference_pb2

from gateway.convert import read_prompts
from gateway.field_names import EMBEDDING, EMBEDDINGS, Names
from gateway.pooling_schemas import EmbeddingsBody
from gateway.unsupported import check_pooling_fields


def embed_request(body: EmbeddingsBody, request_id: str) -> tuple[inference_pb2.EmbedRequest, Names]:
    """The call, and what its fields are called in the body. Raises `ApiError` naming a wrong element."""
    check_pooling_fields(body.model_extra)
    inputs = read_prompts(body.input, "input")
    call = inference_pb2.EmbedRequest(model=body.model or "", priority=body.priority or 0, request_id=request_id)
    for each in inputs:
        if isinstance(each, str):
            call.inputs.add(text=each)
        else:
            call.inputs.add().token_ids.ids.extend(each)
    if body.dimensions is not None:
        call.dimensions = body.dimensions
    if body.truncate_prompt_tokens is not None:
        call.truncate_prompt_tokens = body.truncate_prompt_tokens
    is_list = isinstance(body.input, list) and isinstance(body.input[0], str | list)
    return call, EMBEDDINGS if is_list else EMBEDDING


def embeddings_answer(answer: inference_pb2.EmbedResponse, body: EmbeddingsBody) -> bytes:
    is_base64 = body.encoding_format == "base64"
    # By hand: a pydantic model of a thousand numbers costs more than computing them.
    content = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": _encoded(each.values, is_base64)}
            for index, each in enumerate(answer.embeddings)
        ],
        "model": answer.model,
        "usage": {"prompt_tokens": answer.num_prompt_tokens, "total_tokens": answer.num_prompt_tokens},
    }
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def _encoded(values: Sequence[float], is_base64: bool) -> Any:
    vector = np.array(values, dtype="<f4")  # [dimensions]
    return base64.b64encode(vector.tobytes()).decode() if is_base64 else vector
