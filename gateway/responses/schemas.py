"""The body of /v1/responses (https://platform.openai.com/docs/api-reference/responses/create)."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, WithJsonSchema, model_validator

from gateway.schemas import (
    MAX_LOGPROBS,
    MAX_TOOLS,
    DecodingFields,
    PositiveCount,
    RequestModel,
    SchemaField,
    StopField,
)

InputField = Annotated[
    Any,
    Field(description="A text, or a list of items: messages, function calls and their outputs, reasoning."),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}),
]
ResponseToolChoiceField = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": ["auto", "none", "required"]},
                {
                    "type": "object",
                    "properties": {"type": {"const": "function"}, "name": {"type": "string"}},
                    "required": ["type", "name"],
                },
                {"type": "null"},
            ]
        }
    ),
]
LOGPROBS = "message.output_text.logprobs"
# What `include` may ask for. All but the logprobs are parts of items that no answer here has, or are sent anyway.
INCLUDABLE = (
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    LOGPROBS,
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
)


class ResponseTool(RequestModel):
    # Tools of other types run on OpenAI's own servers.
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Reasoning(RequestModel):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: str | None = Field(None, description="Taken, and without effect: reasoning is sent as it is.")


class TextFormat(RequestModel):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    # `schema` is a method of pydantic's base class.
    json_schema: SchemaField = Field(None, alias="schema")
    strict: bool | None = None


class TextConfig(RequestModel):
    format: TextFormat | None = None


class ResponsesBody(DecodingFields):
    model: str | None = Field(None, description="One of the ids of /v1/models; the served model if left out.")
    input: InputField = None
    instructions: str | None = Field(None, description="System message of this response alone.")
    previous_response_id: str | None = Field(None, description="A stored response whose conversation goes on.")
    max_output_tokens: PositiveCount | None = None
    stream: bool | None = None
    store: bool | None = Field(None, description="Keep the response, so that it can be fetched and continued; true.")
    background: bool | None = Field(None, description="Generate whether the client waits or not; needs store.")
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ResponseToolChoiceField = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    metadata: dict[str, str] | None = None
    truncation: Literal["auto", "disabled"] | None = None

    # Beyond OpenAI's, like most of DecodingFields: as in the chat route.
    stop: StopField = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        extra = self.model_extra or {}
        if extra.get("prompt") is not None:
            raise ValueError("prompt: stored prompts are not supported; send input and instructions")
        if extra.get("conversation") is not None:
            raise ValueError("conversation: not supported; use previous_response_id")
        for index, name in enumerate(self.include or ()):
            if name not in INCLUDABLE:
                raise ValueError(f"include[{index}]: must be one of {', '.join(INCLUDABLE)}")
        if self.input is None and self.previous_response_id is None:
            raise ValueError("input: needed: a string, or a list of items")
        if self.background and self.store is False:
            raise ValueError("background: needs store to be true")
        return self

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)
