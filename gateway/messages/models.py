"""The served models in Anthropic's shape, for its clients (https://docs.anthropic.com/en/api/models-list)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import orjson
from stepwire.v1 import inference_pb2


def model_info(model: inference_pb2.Model) -> bytes:
    return orjson.dumps(_info(model))


def model_page(models: Sequence[inference_pb2.Model]) -> bytes:
    """All of them: there is no second page."""
    data = [_info(model) for model in models]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return orjson.dumps({"data": data, "has_more": False, **ends})


def _info(model: inference_pb2.Model) -> dict[str, Any]:
    created = datetime.fromtimestamp(model.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    limits = {"max_input_tokens": model.max_model_len, "max_tokens": model.max_model_len}
    names = {"type": "model", "id": model.id, "display_name": model.id}
    return {**names, "created_at": created, "lifecycle": "active", **limits}
