"""What the control plane says of a gRPC request names the fields of the body that the client sent."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.rpc import code_pb2
from pydantic import BaseModel
from stepwire.v1 import inference_pb2

from gateway import field_names
from gateway.convert import GenerationPlan, plan_chat, plan_completion
from gateway.errors import ApiError, from_request_error
from gateway.field_names import Names, field_name, in_text
from gateway.messages.convert import chat_body as chat_of_message
from gateway.messages.convert import names_of
from gateway.messages.schemas import MessagesBody
from gateway.responses.convert import chat_body as chat_of_response
from gateway.responses.convert import input_items
from gateway.responses.schemas import ResponsesBody
from gateway.schemas import ChatCompletionBody, CompletionBody

ASKED = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> GenerationPlan:
    return plan_chat(ChatCompletionBody.model_validate({"messages": ASKED, **fields}), "id")


def completion(**fields: Any) -> GenerationPlan:
    return plan_completion(CompletionBody.model_validate({"prompt": "hi", **fields}), "id", 8)


def response(**fields: Any) -> GenerationPlan:
    body = ResponsesBody.model_validate({"input": "hi", **fields})
    return plan_chat(chat_of_response(body, input_items(body)), "id", field_names.RESPONSE)


def message(**fields: Any) -> GenerationPlan:
    body = MessagesBody.model_validate({"messages": ASKED, "max_tokens": 8, **fields})
    return plan_chat(chat_of_message(body), "id", names_of(body))


SCHEMA = {"type": "object"}


@pytest.mark.parametrize(
    ("plan", "path", "param"),
    [
        (chat(), "stop.max_tokens", "max_completion_tokens"),
        (chat(max_completion_tokens=5), "stop.max_tokens", "max_completion_tokens"),
        (chat(max_tokens=5), "stop.max_tokens", "max_tokens"),
        (chat(max_tokens=5, response_format={"type": "json_object"}), "stop.max_tokens", "max_tokens"),
        (chat(max_tokens=5, max_completion_tokens=4), "stop.max_tokens", "max_completion_tokens"),
        (completion(), "stop.max_tokens", "max_tokens"),
        (response(), "stop.max_tokens", "max_output_tokens"),
        (message(), "stop.max_tokens", "max_tokens"),
        (chat(), "stop.stop[1]", "stop[1]"),
        (completion(), "stop.stop[1]", "stop[1]"),
        (response(), "stop.stop[1]", "stop[1]"),
        (message(), "stop.stop[1]", "stop_sequences[1]"),
        (chat(), "chat.messages[3].content[1]", "messages[3].content[1]"),
        (chat(), "chat.messages[1].tool_calls[2].name", "messages[1].tool_calls[2].function.name"),
        # Instructions and earlier turns are messages as well: a number would be another item's.
        (response(), "chat.messages[3].content[1]", "input"),
        (response(), "chat.messages", "input"),
        (message(), "chat.messages[3].role", "messages"),
        (chat(), "chat", "messages"),
        (response(), "chat", "input"),
        (message(), "chat", "messages"),
        (chat(), "chat.tools[1].function.parameters", "tools[1].function.parameters"),
        (response(), "chat.tools[1].function.parameters", "tools[1].parameters"),
        (message(), "chat.tools[1].function.parameters", "tools[1].input_schema"),
        (message(), "chat.tools[11].function.name", "tools[11].name"),
        (chat(), "chat.reasoning_effort", "reasoning_effort"),
        (response(), "chat.reasoning_effort", "reasoning.effort"),
        (message(), "chat.reasoning_effort", "output_config.effort"),
        (message(), "chat.parallel_tool_calls", "tool_choice.disable_parallel_tool_use"),
        (chat(), "output.logprobs", "top_logprobs"),
        (completion(), "output.logprobs", "logprobs"),
        (completion(echo=True, logprobs=1), "output.prompt_logprobs", "logprobs"),
        (completion(echo=True, logprobs=1, prompt_logprobs=2), "output.prompt_logprobs", "prompt_logprobs"),
        (completion(), "output.prompt_text", "echo"),
        (completion(), "text", "prompt"),
        (completion(), "token_ids.ids[4]", "prompt[4]"),
        (
            chat(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}),
            "structured_output.json_schema",
            "response_format.json_schema.schema",
        ),
        (
            response(text={"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}),
            "structured_output.json_schema",
            "text.format.schema",
        ),
        (
            response(text={"format": {"type": "json_object"}}),
            "structured_output.json_object",
            "text.format.json_object",
        ),
        (
            message(output_config={"format": {"type": "json_schema", "schema": SCHEMA}}),
            "structured_output.json_schema",
            "output_config.format.schema",
        ),
        (
            message(output_format={"type": "json_schema", "schema": SCHEMA}),
            "structured_output.json_schema",
            "output_format.schema",
        ),
        *(
            (plan(structured_outputs={"regex": "a"}), "structured_output.regex", "structured_outputs.regex")
            for plan in (chat, completion, response, message)
        ),
        *(
            (plan(structured_outputs={"json": SCHEMA}), "structured_output.json_schema", "structured_outputs.json")
            for plan in (chat, completion, response, message)
        ),
        *(
            (plan(), f"{section}.{name}", own)
            for plan in (chat, completion, response, message)
            for section, name, own in (
                ("sampling", "logit_bias[50]", "logit_bias[50]"),
                ("sampling", "bad_words[2]", "bad_words[2]"),
                ("stop", "stop_token_ids[0]", "stop_token_ids[0]"),
                ("stop", "include_stop_string", "include_stop_str_in_output"),
                ("output", "special_tokens", "skip_special_tokens"),
            )
        ),
    ],
)
def test_each_api_calls_fields_by_its_own_names(plan: GenerationPlan, path: str, param: str) -> None:
    assert field_name(path, plan.names) == param


@pytest.mark.parametrize(
    ("names", "path", "param"),
    [
        (field_names.TOKENIZE, "text", "prompt"),
        (field_names.TOKENIZE, "chat.messages[1].role", "messages[1].role"),
        (field_names.DETOKENIZE, "token_ids[3]", "tokens[3]"),
        (field_names.EMBEDDINGS, "inputs[3].text", "input[3]"),
        (field_names.EMBEDDINGS, "inputs[3].token_ids.ids[7]", "input[3][7]"),
        (field_names.EMBEDDINGS, "inputs", "input"),
        (field_names.EMBEDDING, "inputs[0].text", "input"),
        (field_names.EMBEDDING, "inputs[0].token_ids.ids[7]", "input[7]"),
        (field_names.RERANK, "pairs[2]", "documents[2]"),
        (field_names.RERANK, "pairs[2].first", "query"),
        (field_names.RERANK, "pairs[2].second", "documents[2]"),
        (field_names.SCORE, "pairs[2].first", "text_1"),
        (field_names.SCORE, "pairs[2].second", "text_2[2]"),
    ],
)
def test_other_calls_have_names_of_their_own(names: Names, path: str, param: str) -> None:
    assert field_name(path, names) == param


def test_texts_name_fields_as_well() -> None:
    error = inference_pb2.RequestError(code=code_pb2.INVALID_ARGUMENT)
    error.violations.add(field="stop.min_tokens", description="is 5, more than stop.max_tokens, which is 3.")
    for plan, name in (
        (chat(), "max_completion_tokens"),
        (completion(), "max_tokens"),
        (response(), "max_output_tokens"),
        (message(), "max_tokens"),
    ):
        assert from_request_error(error, plan.names).message == f"min_tokens: is 5, more than {name}, which is 3."
    said = "a non-stop.max_tokenspace, chat.tools[2].function.name and sampling.nothing; stop here."
    expected = "a non-stop.max_tokenspace, tools[2].name and sampling.nothing; stop here."
    assert in_text(said, field_names.RESPONSE) == expected


# What a GenerateRequest has, and these bodies do not say by a field of their own.
NOT_ASKED = {
    "request_id",
    "text",
    "token_ids",
    "chat",
    "suffix",
    "no_special_tokens",
    "structured_output",
    "n",
    "output",
}


def leaves() -> list[str]:
    paths = []
    for field in inference_pb2.GenerateRequest.DESCRIPTOR.fields:
        below: list[FieldDescriptor] = list(field.message_type.fields) if field.message_type is not None else []
        paths += [f"{field.name}.{each.name}" for each in below] if below else [field.name]
    return paths


@pytest.mark.parametrize(
    ("plan", "body"),
    [
        (chat(), ChatCompletionBody),
        (completion(), CompletionBody),
        (response(), ResponsesBody),
        (message(), MessagesBody),
    ],
)
def test_every_field_of_a_request_has_a_name_in_the_body(plan: GenerationPlan, body: type[BaseModel]) -> None:
    paths = [path for path in leaves() if path.partition(".")[0] not in NOT_ASKED]
    assert len(paths) > 20
    for path in paths:
        name = field_name(path, plan.names).partition(".")[0].partition("[")[0]
        assert name in body.model_fields, path


@pytest.mark.parametrize(
    ("ask", "param"),
    [
        (lambda: response(input=[{"role": "", "content": "x"}]), "input"),
        (lambda: response(tools=[{"type": "function", "name": "f"}], tool_choice={"type": "function"}), "tool_choice"),
        (
            lambda: message(
                messages=[{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}],
                stop_sequences=["a"],
                structured_outputs={"structural_tag": "{"},
            ),
            "structured_outputs.structural_tag",
        ),
        (lambda: response(tool_choice="none of these", tools=[{"type": "function", "name": "f"}]), "tool_choice"),
        (lambda: response(stop=[1]), "stop[0]"),
        (lambda: response(text={"format": {"type": "json_schema", "name": "a", "schema": []}}), "text.format.schema"),
    ],
)
def test_what_is_found_in_the_chat_that_a_body_was_made_is_said_of_the_body(ask: Any, param: str) -> None:
    with pytest.raises(ApiError) as refused:
        ask()
    assert refused.value.param == param and refused.value.message.startswith(param)
