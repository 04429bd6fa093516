"""Anthropic's Messages body (https://docs.anthropic.com/en/api/messages)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema

from gateway.schemas import MAX_STOP_STRINGS, MAX_TOOLS, DecodingFields, PositiveCount, RequestModel

# A string, or a list of blocks; checked in convert.py, which can name what is wrong better than a union of types.
BlocksField = Annotated[
    Any,
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}),
]


class InputMessage(RequestModel):
    role: Literal["user", "assistant", "system"]
    content: BlocksField


class MessageTool(RequestModel):
    # Tools of other types run on Anthropic's own servers.
    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class MessageToolChoice(RequestModel):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(RequestModel):
    type: Literal["enabled", "adaptive", "disabled"]
    display: Literal["summarized", "omitted"] | None = Field(
        None, description="omitted leaves the thinking out of the answer."
    )
    budget_tokens: int | None = Field(None, description="Taken, and without effect: max_tokens bounds an answer.")


class OutputFormat(RequestModel):
    type: Literal["json_schema"]
    # `schema` is a method of pydantic's base class.
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(RequestModel):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = Field(None, description="What the text must look like: JSON by a schema.")


class CountTokensBody(RequestModel):
    model: str | None = Field(None, description="One of the ids of /v1/models; the served model if left out.")
    messages: Annotated[list[InputMessage], Field(min_length=1)]
    system: BlocksField = None
    tools: Annotated[list[MessageTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: MessageToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = Field(None, description="Older name of output_config.format.")


class MessagesBody(CountTokensBody, DecodingFields):
    max_tokens: PositiveCount
    stream: bool | None = None
    stop_sequences: Annotated[list[str], Field(max_length=MAX_STOP_STRINGS)] | None = None

    # Beyond Anthropic's, like most of DecodingFields: as in the chat route.
    chat_template_kwargs: dict[str, Any] | None = None
