"""Bodies and answers of /v1/embeddings (OpenAI's), /v1/rerank (Jina's and Cohere's) and /v1/score (vLLM's)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema

from gateway.answers import AnswerModel
from gateway.schemas import Int32, PositiveCount, PromptField, RequestModel

_TEXT_OR_TEXTS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_DOCUMENT = {
    "anyOf": [
        {"type": "string"},
        {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
    ]
}
# Checked by hand, where a wrong element can be named better than a union of types names it.
TextsField = Annotated[Any, Field(description="A text, or a list of them."), WithJsonSchema(_TEXT_OR_TEXTS)]
DocumentsField = Annotated[
    Any,
    Field(description="Texts, or objects with a `text`."),
    WithJsonSchema({"type": "array", "items": _DOCUMENT}),
]
TruncateField = Annotated[
    Int32 | None,
    Field(description="Keep only the first so many tokens of each input; -1: what the model's context holds."),
]


class EmbeddingsBody(RequestModel):
    input: PromptField
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64: the vector as little-endian float32."
    )
    dimensions: PositiveCount | None = Field(None, description="Keep the first so many numbers of each vector.")
    user: str | None = None
    truncate_prompt_tokens: TruncateField = None
    priority: Int32 | None = None


class RerankBody(RequestModel):
    query: str
    documents: DocumentsField
    model: str | None = None
    top_n: PositiveCount | None = Field(None, description="Only the best so many; all if unset.")
    return_documents: bool | None = Field(None, description="Send the documents' texts along; true if unset.")
    truncate_prompt_tokens: TruncateField = None
    priority: Int32 | None = None


class ScoreBody(RequestModel):
    text_1: TextsField
    text_2: TextsField
    model: str | None = None
    truncate_prompt_tokens: TruncateField = None
    priority: Int32 | None = None


class PoolingUsage(AnswerModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingObject(AnswerModel):
    object: Literal["embedding"] = "embedding"
    index: int
    # base64 of little-endian float32 where that was asked for.
    embedding: list[float] | str


class EmbeddingsAnswer(AnswerModel):
    object: Literal["list"] = "list"
    data: list[EmbeddingObject]
    model: str
    usage: PoolingUsage


class RerankDocument(AnswerModel):
    text: str


class RerankResult(AnswerModel):
    index: int
    relevance_score: float
    document: RerankDocument | None = None


class RerankAnswer(AnswerModel):
    id: str
    model: str
    usage: PoolingUsage
    # The best first.
    results: list[RerankResult]


class ScoreObject(AnswerModel):
    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreAnswer(AnswerModel):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[ScoreObject]
    usage: PoolingUsage
