"""Bodies of OpenAI's requests, with the extra fields that vLLM's users send.

Types are strict (a number in quotes is not a number). Ranges that the control plane checks are not repeated here: only
what the gRPC messages cannot carry, and OpenAI's own rules between fields. Fields that are not declared are kept in
`model_extra`: `unsupported.py` says which of them are refused, the rest is ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

UInt32 = Annotated[int, Field(ge=0, le=2**32 - 1)]
Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
PositiveCount = Annotated[int, Field(ge=1, le=2**32 - 1)]

MAX_STOP_STRINGS = 4
MAX_LOGPROBS = 20

# Checked by hand in convert.py, where a wrong element can be named better than a union of types names it.
StopField = Annotated[
    Any,
    Field(description=f"Up to {MAX_STOP_STRINGS} strings; the text ends before the first match."),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}),
]
PromptField = Annotated[
    Any,
    Field(description="A text, token ids, or a list of either."),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "integer", "minimum": 0}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer", "minimum": 0}}},
            ]
        }
    ),
]
ContentField = Annotated[
    Any,
    Field(description="A text, or a list of parts of type `text`."),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        "required": ["type", "text"],
                    },
                },
                {"type": "null"},
            ]
        }
    ),
]


class RequestModel(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True, protected_namespaces=())


class StreamOptions(RequestModel):
    include_usage: bool | None = Field(None, description="Send one more chunk with the usage before [DONE].")
    continuous_usage_stats: bool | None = Field(
        None, description="Send the usage so far in every chunk; needs include_usage."
    )


class GenerationBody(RequestModel):
    """What chat and text completions share."""

    model: str | None = Field(None, description="One of the ids of /v1/models; the served model if left out.")
    temperature: Finite | None = Field(None, description="0 is greedy; 0 to 2.")
    top_p: Finite | None = Field(None, description="In (0, 1].")
    n: PositiveCount | None = Field(None, description="Continuations of each prompt; 1 if left out.")
    stop: StopField = None
    seed: Int64 | None = None
    presence_penalty: Finite | None = Field(None, description="-2 to 2.")
    frequency_penalty: Finite | None = Field(None, description="-2 to 2.")
    logit_bias: dict[str, Finite] | None = Field(
        None, max_length=1024, description="Token id (as a string) to a value in -100 to 100."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    top_k: Annotated[int, Field(ge=-1, le=2**32 - 1)] | None = Field(None, description="0 or -1 keeps all.")
    min_p: Finite | None = Field(None, description="0 to 1.")
    repetition_penalty: Finite | None = Field(None, description="Above 0; 1 is none.")
    min_tokens: UInt32 | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[UInt32] | None = Field(None, max_length=1024)
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    allowed_token_ids: list[UInt32] | None = Field(None, max_length=16384)
    priority: Int32 | None = Field(None, description="Lower runs first.")
    cache_salt: str | None = Field(None, description="Share cached prefixes only with requests of the same salt.")
    return_token_ids: bool | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if "stream_options" in self.model_fields_set and self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed when stream is true")
        return self


class ChatMessage(RequestModel):
    role: Annotated[str, Field(min_length=1)]
    content: ContentField = None
    name: str | None = None


class ChatCompletionBody(GenerationBody):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    max_completion_tokens: PositiveCount | None = Field(None, description="The rest of the context if left out.")
    max_tokens: PositiveCount | None = Field(None, description="Older name of max_completion_tokens.")
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only allowed when logprobs is true")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message: cannot be true together with add_generation_prompt")
        if self.add_generation_prompt is False and not self.continue_final_message:
            raise ValueError("add_generation_prompt: false is only supported together with continue_final_message")
        return self


class CompletionBody(GenerationBody):
    prompt: PromptField = None
    max_tokens: PositiveCount | None = Field(None, description="16 if left out.")
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = Field(None, description="Put the prompt in front of the text.")
    best_of: PositiveCount | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.echo and self.logprobs is not None:
            raise ValueError("logprobs: not supported together with echo yet; leave one of them out")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of: not supported; leave it out or set it to n")
        return self
