"""Bodies of OpenAI's requests, with the extra fields that vLLM's users send.

Types are strict (a number in quotes is not a number). Ranges that the control plane checks are not repeated here: only
what the gRPC messages cannot carry, and OpenAI's own rules between fields. Fields that are not declared are kept in
`model_extra`: `unsupported.py` says which of them are refused, the rest is ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

UInt32 = Annotated[int, Field(ge=0, le=2**32 - 1)]
Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
PositiveCount = Annotated[int, Field(ge=1, le=2**32 - 1)]

MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 20
MAX_TOOLS = 256

_STRING_OR_STRINGS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}
_OBJECT_OR_STRING = {"anyOf": [{"type": "object"}, {"type": "string"}, {"type": "null"}]}

# Checked by hand in convert.py, where a wrong element can be named better than a union of types names it.
StopField = Annotated[
    Any,
    Field(description=f"Up to {MAX_STOP_STRINGS} strings; the text ends before the first match."),
    WithJsonSchema(_STRING_OR_STRINGS),
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
# A JSON Schema, or its text.
SchemaField = Annotated[Any, WithJsonSchema(_OBJECT_OR_STRING)]
ToolChoiceField = Annotated[
    Any,
    Field(description="`auto`, `none`, `required`, or a function by name; auto where there are tools."),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": ["auto", "none", "required"]},
                {
                    "type": "object",
                    "properties": {
                        "type": {"const": "function"},
                        "function": {
                            "type": "object",
                            "properties": {"name": {"type": "string"}},
                            "required": ["name"],
                        },
                    },
                    "required": ["type", "function"],
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


class JsonSchemaFormat(RequestModel):
    name: str | None = None
    description: str | None = None
    # `schema` is a method of pydantic's base class.
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(RequestModel):
    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(RequestModel):
    """vLLM's field: exactly one of the first six."""

    json_: SchemaField = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: SchemaField = None
    disable_any_whitespace: bool | None = None


class FunctionDefinition(RequestModel):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON Schema of the arguments.")
    strict: bool | None = Field(None, description="false: do not hold the arguments to the schema under `auto`.")


class ToolDefinition(RequestModel):
    type: Literal["function"]
    function: FunctionDefinition


class DecodingFields(RequestModel):
    """How tokens are drawn and where a text ends: the same on every route that generates."""

    temperature: Finite | None = Field(None, description="0 is greedy; 0 to 2.")
    top_p: Finite | None = Field(None, description="In (0, 1].")
    seed: Int64 | None = None
    presence_penalty: Finite | None = Field(None, description="-2 to 2.")
    frequency_penalty: Finite | None = Field(None, description="-2 to 2.")
    logit_bias: dict[str, Finite] | None = Field(
        None, max_length=1024, description="Token id (as a string) to a value in -100 to 100."
    )
    top_k: Annotated[int, Field(ge=-1, le=2**32 - 1)] | None = Field(None, description="0 or -1 keeps all.")
    min_p: Finite | None = Field(None, description="0 to 1.")
    repetition_penalty: Finite | None = Field(None, description="Above 0; 1 is none.")
    min_tokens: UInt32 | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[UInt32] | None = Field(None, max_length=1024)
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    allowed_token_ids: list[UInt32] | None = Field(None, max_length=16384)
    bad_words: list[str] | None = Field(None, max_length=256, description="Words that cannot be generated.")
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = Field(
        None, description="Keep only the prompt's last so many tokens; -1: what the context has room for."
    )
    structured_outputs: StructuredOutputs | None = Field(
        None, description="What the text must look like: json, regex, choice, grammar or structural_tag."
    )
    priority: Int32 | None = Field(
        None,
        description="Lower runs first where the server orders by priority; from 1000000 on: after everything else.",
    )
    cache_salt: str | None = Field(None, description="Share cached prefixes only with requests of the same salt.")

    @model_validator(mode="after")
    def _check_truncation(self) -> Self:
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens: must be at least 1, or -1 for what the context has room for")
        return self


class GenerationBody(DecodingFields):
    """What chat and text completions share."""

    model: str | None = Field(None, description="One of the ids of /v1/models; the served model if left out.")
    n: PositiveCount | None = Field(None, description="Continuations of each prompt; 1 if left out.")
    stop: StopField = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = Field(
        None, description="What the text must look like: any JSON object, or JSON by a schema."
    )

    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = Field(
        None, description="Logprobs of the prompt's tokens, with this many alternatives; not with stream."
    )
    guided_json: SchemaField = Field(None, description="Older name of structured_outputs.json.")
    guided_regex: str | None = Field(None, description="Older name of structured_outputs.regex.")
    guided_choice: list[str] | None = Field(None, description="Older name of structured_outputs.choice.")
    guided_grammar: str | None = Field(None, description="Older name of structured_outputs.grammar.")
    return_token_ids: bool | None = None

    @model_validator(mode="after")
    def _check_shared(self) -> Self:
        if "stream_options" in self.model_fields_set and self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed when stream is true")
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs: not allowed when stream is true")
        return self


class FunctionCall(RequestModel):
    name: str
    # A JSON object as text; some clients send the object itself.
    arguments: SchemaField = None


class MessageToolCall(RequestModel):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(RequestModel):
    role: Annotated[str, Field(min_length=1)]
    content: ContentField = None
    refusal: str | None = Field(None, description="What an assistant's earlier turn said instead of content.")
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = Field(None, description="What an assistant's earlier turn thought.")
    reasoning_content: str | None = Field(None, description="Another name of reasoning.")


class ChatCompletionBody(GenerationBody):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    max_completion_tokens: PositiveCount | None = Field(None, description="The rest of the context if left out.")
    max_tokens: PositiveCount | None = Field(None, description="Older name of max_completion_tokens.")
    tools: Annotated[list[ToolDefinition], Field(min_length=1, max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoiceField = None
    parallel_tool_calls: bool | None = Field(None, description="Whether one answer may hold several calls.")
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    include_reasoning: bool | None = Field(None, description="false leaves reasoning out of the answer.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Further variables of the chat template.")
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    echo: bool | None = Field(None, description="Put the message that is continued in front of the answer.")

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: only allowed when logprobs is true")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message: cannot be true together with add_generation_prompt")
        return self


class CompletionBody(GenerationBody):
    prompt: PromptField = None
    suffix: str | None = Field(None, description="Text after the completion, for models that know how to fill in.")
    max_tokens: UInt32 | None = Field(None, description="16 if left out; 0 only with echo or prompt_logprobs.")
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = Field(None, description="Put the prompt in front of the text.")
    add_special_tokens: bool | None = Field(None, description="Those that the tokenizer begins a text with; true.")
    best_of: PositiveCount | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of: not supported; leave it out or set it to n")
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise ValueError("max_tokens: must be at least 1, or 0 together with echo or prompt_logprobs")
        if self.echo and self.suffix:
            raise ValueError("echo: cannot be true together with suffix")
        return self


class TokenizeBody(RequestModel):
    model: str | None = None
    prompt: str | None = Field(None, description="A text; give this or messages.")
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: Annotated[list[ToolDefinition], Field(min_length=1, max_length=MAX_TOOLS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = Field(None, description="Of a prompt; true if left out.")
    return_token_strs: bool | None = Field(None, description="Send each token's text besides its id.")

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.prompt is not None and self.messages is not None:
            raise ValueError("prompt: cannot be given together with messages")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message: cannot be true together with add_generation_prompt")
        return self


class DetokenizeBody(RequestModel):
    model: str | None = None
    tokens: list[UInt32]
