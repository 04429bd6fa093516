"""What a chat template wants of its messages, found by rendering small conversations with it.

Templates disagree where clients do not: whether an assistant's turn that only called has no content or an empty one,
whether a call's arguments are an object or its text, how long a call's id is, where tools are listed, whether there are
system messages. Each is tried in the order in which most templates have it.
"""

from __future__ import annotations

import itertools
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

Message = dict[str, Any]
# (messages, tools) -> the prompt; None where the template fails.
Try = Callable[[Sequence[Message], Sequence[Mapping[str, Any]] | None], str | None]

NUM_SHORT_ID_CHARS = 9
# How much of what stands before a result is looked at.
_NUM_FRAMING_CHARS = 12


class ToolsPlace(Enum):
    ARGUMENT = "argument"
    # Their JSON text in the system message's `tools` (Phi-4 mini).
    SYSTEM_MESSAGE = "system_message"
    NOWHERE = "nowhere"


class CallIds(Enum):
    """What a template takes for the id of a call."""

    ANY = "any"
    # Nine letters and digits (Mistral).
    SHORT = "short"
    # `functions.NAME:NUMBER`, which is all that it shows of the name (Kimi K2).
    NAMED = "named"


@dataclass(frozen=True, slots=True)
class TemplateTraits:
    # Of an assistant's message that is nothing but calls.
    no_content: str | None = None
    arguments_as_text: bool = False
    call_ids: CallIds = CallIds.ANY
    tools: ToolsPlace = ToolsPlace.ARGUMENT
    takes_system: bool = True
    # Whether an assistant's calls are rendered at all.
    shows_calls: bool = True
    # Results belong to the message that called, as its `tool_responses` (Gemma 4 as it was released).
    results_with_calls: bool = False
    # A message has one call, and its result comes before the next one (Llama 3, GPT-OSS).
    single_calls: bool = False
    # A message that calls has a text or reasoning, not both (GPT-OSS).
    text_or_reasoning: bool = False


def find_traits(attempt: Try) -> TemplateTraits:
    nonce = "q" + secrets.token_hex(6)
    user: Message = {"role": "user", "content": "x"}
    tool = {"type": "function", "function": {"name": nonce, "description": "x", "parameters": _parameters("a")}}
    tools = ToolsPlace.NOWHERE
    if nonce in (attempt([user], [tool]) or ""):
        tools = ToolsPlace.ARGUMENT
    elif nonce in (attempt([{"role": "system", "content": "x", "tools": json.dumps([tool])}, user], None) or ""):
        tools = ToolsPlace.SYSTEM_MESSAGE
    takes_system = nonce in (attempt([{"role": "system", "content": nonce}, user], None) or "")
    of_calls = _of_calls(attempt, nonce)
    if of_calls is None:
        return TemplateTraits("", False, CallIds.ANY, tools, takes_system, shows_calls=False)
    return TemplateTraits(
        *of_calls,
        tools,
        takes_system,
        results_with_calls=_has_results_with_calls(attempt, nonce),
        single_calls=_has_single_calls(attempt, nonce, *of_calls),
        text_or_reasoning=_has_text_or_reasoning(attempt, nonce, *of_calls),
    )


def _has_single_calls(attempt: Try, nonce: str, no_content: str | None, as_text: bool, kind: CallIds) -> bool:
    """Whether two calls of one message do not come out, and the same calls one after another do."""
    calls = [_example_call(f"n{number}{nonce}", number, as_text, kind) for number in range(2)]
    results: list[Message] = [
        {"role": "tool", "tool_call_id": call["id"], "name": call["function"]["name"], "content": f"r{number}{nonce}"}
        for number, call in enumerate(calls)
    ]
    asked: Message = {"role": "user", "content": "x"}
    called: list[Message] = [{"role": "assistant", "content": no_content, "tool_calls": [call]} for call in calls]
    together = attempt([asked, {**called[0], "tool_calls": calls}, *results], None) or ""
    apart = attempt([asked, called[0], results[0], called[1], results[1]], None) or ""
    parts = [f"{part}{number}{nonce}" for part in "nr" for number in range(2)]
    return all(part in apart for part in parts) and not all(part in together for part in parts)


def _has_text_or_reasoning(attempt: Try, nonce: str, no_content: str | None, as_text: bool, kind: CallIds) -> bool:
    """Whether the template fails with both, and with one of them does not."""
    asked: Message = {"role": "user", "content": "x"}
    called: Message = {
        "role": "assistant",
        "content": f"t{nonce}",
        "tool_calls": [_example_call(f"n{nonce}", 0, as_text, kind)],
    }
    reasoned = {**called, **reasoning_of(f"h{nonce}")}
    alone = attempt([asked, {**reasoned, "content": no_content}], None)
    return alone is not None and attempt([asked, called], None) is not None and attempt([asked, reasoned], None) is None


def _example_call(name: str, number: int, as_text: bool, kind: CallIds) -> dict[str, Any]:
    ids = {
        CallIds.ANY: f"call_0123456789abcde{number}",
        CallIds.SHORT: f"abcdef01{number}",
        CallIds.NAMED: f"functions.{name}:{number}",
    }
    return {"id": ids[kind], "type": "function", "function": {"name": name, "arguments": "{}" if as_text else {}}}


def reasoning_of(text: str) -> Message:
    """What an assistant thought, under the names that templates know."""
    return dict.fromkeys(("reasoning", "reasoning_content", "thinking"), text)


def _has_results_with_calls(attempt: Try, nonce: str) -> bool:
    """Whether a result looks otherwise as a part of the message that called than as a message: then that is meant."""
    name, result = f"n{nonce}", f"r{nonce}"
    call = {"id": "call_0", "type": "function", "function": {"name": name, "arguments": {}}}
    asked = {"role": "user", "content": "x"}
    called: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
    within = attempt([asked, {**called, "tool_responses": [{"name": name, "response": result}]}], None) or ""
    apart = attempt([asked, called, {"role": "tool", "tool_call_id": "call_0", "name": name, "content": result}], None)
    before, found, _ = within.partition(result)
    is_whole_message_shown = "tool_responses" in within
    return bool(found) and not is_whole_message_shown and before[-_NUM_FRAMING_CHARS:] not in (apart or "")


def _of_calls(attempt: Try, nonce: str) -> tuple[str | None, bool, CallIds] | None:
    """(no_content, arguments_as_text, call_ids) with which calls come out right; None: nothing helps."""
    key, value = f"k{nonce}", f"v{nonce}"
    examples = {
        CallIds.ANY: "call_0123456789abcdef",
        CallIds.SHORT: "abcdef012",
        CallIds.NAMED: f"functions.n{nonce}:0",
    }
    for (kind, call_id), as_text, no_content in itertools.product(examples.items(), (False, True), (None, "")):
        arguments: Any = json.dumps({key: value}) if as_text else {key: value}
        function = {"name": f"n{nonce}", "arguments": arguments}
        text = attempt(
            [
                {"role": "user", "content": "x"},
                {
                    "role": "assistant",
                    "content": no_content,
                    "tool_calls": [{"id": call_id, "type": "function", "function": function}],
                },
                {"role": "tool", "tool_call_id": call_id, "name": f"n{nonce}", "content": f"r{nonce}"},
            ],
            [{"type": "function", "function": {"name": "x", "description": "x", "parameters": _parameters("a")}}],
        )
        if text is None or any(part not in text for part in (f"n{nonce}", key, value, f"r{nonce}")):
            continue
        # Python's own spelling of an object or of nothing, or a text within a text: not what the model has learnt.
        if f"'{key}'" in text or f'\\"{key}' in text or (no_content is None and "None" in text):
            continue
        return no_content, as_text, kind
    return None


def _parameters(key: str) -> dict[str, Any]:
    return {"type": "object", "properties": {key: {"type": "string", "description": "x"}}, "required": []}
