"""What each API calls the fields of a gRPC request: the one table by which the control plane's errors name them.

A table's key is a path in a gRPC request, its value what the API's body calls it. `[]` stands for an index, which is
kept where the value has one as well; what follows the path is kept, unless the key ends with `*`. The longest key that
fits counts. Fields of the sections `sampling`, `stop` and `output` that no key fits are called the same in every body,
without the section.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

from stepwire.v1 import inference_pb2

Names = Mapping[str, str]

_SECTIONS = ("sampling", "stop", "output")
_SHARED: Names = {
    "timeout": "x-request-timeout",
    "stop.include_stop_string": "include_stop_str_in_output",
    "output.omit_reasoning": "include_reasoning",
    "output.prompt_token_ids": "return_token_ids",
    "output.token_ids": "return_token_ids",
    "output.special_tokens": "skip_special_tokens",
    "no_special_tokens": "add_special_tokens",
}
COMPLETION: Names = {
    **_SHARED,
    "text": "prompt",
    "token_ids": "prompt",
    "token_ids.ids": "prompt",
    "output.prompt_text": "echo",
}
CHAT: Names = {
    **_SHARED,
    "stop.max_tokens": "max_completion_tokens",
    "output.logprobs": "top_logprobs",
    "chat": "messages",
    "chat.messages": "messages",
    "chat.messages[].tool_calls[].name": "messages[].tool_calls[].function.name",
    "chat.messages[].tool_calls[].arguments": "messages[].tool_calls[].function.arguments",
    "chat.continue_final_message": "continue_final_message",
    "chat.no_generation_prompt": "add_generation_prompt",
    "chat.tools": "tools",
    "chat.tool_choice": "tool_choice",
    "chat.parallel_tool_calls": "parallel_tool_calls",
    "chat.reasoning_effort": "reasoning_effort",
    "chat.template_arguments": "chat_template_kwargs",
}
# Messages of these are made of more than one field of the body, or of several items: their numbers say nothing there.
RESPONSE: Names = {
    **CHAT,
    "stop.max_tokens": "max_output_tokens",
    "chat": "input",
    "chat.messages": "input",
    "chat.messages[]*": "input",
    "chat.tools[].function": "tools[]",
    "chat.reasoning_effort": "reasoning.effort",
    "structured_output": "text.format",
    "structured_output.json_schema": "text.format.schema",
}
MESSAGE: Names = {
    **CHAT,
    "stop.max_tokens": "max_tokens",
    "stop.stop": "stop_sequences",
    "chat.messages[]*": "messages",
    # A last message of the assistant's asks for it.
    "chat.continue_final_message": "messages",
    "chat.tools[].function": "tools[]",
    "chat.tools[].function.parameters": "tools[].input_schema",
    "chat.parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    "chat.reasoning_effort": "output_config.effort",
    "structured_output": "output_config.format",
    "structured_output.json_schema": "output_config.format.schema",
}
TOKENIZE: Names = {**CHAT, "text": "prompt"}
# What a format is called in the body of the chat that was made of another body, longest first.
_MADE_FORMAT: Names = {
    "response_format.json_schema.schema": "structured_output.json_schema",
    "response_format.json_schema": "structured_output",
    "response_format": "structured_output",
}
DETOKENIZE: Names = {"token_ids": "tokens"}
EMBEDDINGS: Names = {"inputs": "input", "inputs[].text": "input[]", "inputs[].token_ids.ids": "input[]"}
EMBEDDING: Names = {"inputs": "input", "inputs[]": "input", "inputs[].text": "input", "inputs[].token_ids.ids": "input"}
RERANK: Names = {"pairs": "documents", "pairs[].first": "query", "pairs[].second": "documents[]"}
SCORE: Names = {"pairs": "text_2", "pairs[].first": "text_1", "pairs[].second": "text_2[]"}


def field_name(path: str, names: Names) -> str:
    """What the API of `names` calls the field at a path of a gRPC request."""
    for source in sorted(names, key=len, reverse=True):
        found = _pattern(source).match(path)
        if found is not None:
            target = names[source]
            for index in found.groups():
                target = target.replace("[]", f"[{index}]", 1)
            return target + path[found.end() :]
    section, _, name = path.partition(".")
    return name if section in _SECTIONS and name else path


def in_text(text: str, names: Names) -> str:
    """A text of the control plane's, with the fields that it speaks of called by their names."""
    return _paths().sub(lambda found: field_name(found[0], names), text)


def of_made_chat(param: str, names: Names) -> str:
    """What a body calls a field of the chat's body that was made of it."""
    for made, source in _MADE_FORMAT.items():
        if source in names and (param + ".").startswith(made + "."):
            return names[source] + param[len(made) :]
    first = re.split(r"[.\[]", param, maxsplit=1)[0]
    for source, target in CHAT.items():
        if target == first and source != "chat":
            return field_name(source + param[len(first) :], names)
    return param


@functools.lru_cache(maxsize=1024)
def _pattern(source: str) -> re.Pattern[str]:
    path = re.escape(source.removesuffix("*")).replace(re.escape("[]"), r"\[(\w+)\]")
    return re.compile(path + (".*" if source.endswith("*") else r"(?=[.\[]|$)"))


@functools.cache
def _paths() -> re.Pattern[str]:
    """Any path of two parts or more: a single word might as well be only a word."""
    sections = inference_pb2.GenerateRequest.DESCRIPTOR.fields
    paths = (
        f"{section.name}.{field.name}"
        for section in sections
        if section.message_type
        for field in section.message_type.fields
    )
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, paths))})\b(?:\.\w+|\[\w+\])*")
