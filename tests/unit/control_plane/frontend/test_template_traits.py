"""Conversations with tools come out right whatever a template wants of its messages.

The templates are cut down to what their families do differently; each says in which models it is found.
"""

from __future__ import annotations

import json

import pytest
from stepwire.v1 import inference_pb2 as pb

from control_plane.frontend.chat_template import ChatTemplate
from control_plane.frontend.conversation import read_conversation
from control_plane.frontend.parsers.registry import OutputFormat
from control_plane.frontend.template_traits import CallIds, ToolsPlace

_TURN = "<|im_start|>{{ message.role }}\n"
_CALLS = (
    "{% for call in message.tool_calls or [] %}<tool_call>"
    "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}</tool_call>{% endfor %}"
)
_LISTED = "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}"


def looped(body: str) -> str:
    return "{% for message in messages %}" + body + "{% endfor %}"


TEMPLATES = {
    # Qwen3, QwQ, GPT-OSS: what an assistant said is searched, and must be a text.
    "content is searched": _LISTED
    + looped(_TURN + "{% if '</think>' in message.content %}{% endif %}{{ message.content }}" + _CALLS),
    # DeepSeek V3: a turn without content is one of calls.
    "no content is a call": _LISTED
    + looped(
        "{{ message.content if message.content is not none else '' }}{% if message.content is none %}"
        + _CALLS
        + "{% endif %}"
    ),
    # DeepSeek V3.1: arguments are put beside text.
    "arguments are text": _LISTED
    + looped(
        "{{ message.content or '' }}{% for call in message.tool_calls or [] %}"
        "<sep>{{ call.function.name + ' ' + call.function.arguments }}<end>{% endfor %}"
    ),
    # Mistral 7B to Small 3.2.
    "ids have nine letters": _LISTED
    + looped(
        "{{ message.content or '' }}{% for call in message.tool_calls or [] %}{% if call.id | length != 9 %}"
        "{{ raise_exception('ids have nine letters') }}{% endif %}{{ call.id }}{% endfor %}"
        + _CALLS
        + "{% if message.role == 'tool' and message.tool_call_id | length != 9 %}"
        "{{ raise_exception('nine') }}{% endif %}"
        "{{ message.tool_call_id | default('') }}"
    ),
    # Kimi K2: a call's name is shown as a part of its id alone.
    "ids have names": _LISTED
    + looped(
        "{{ message.content or '' }}{% for call in message.tool_calls or [] %}"
        "<|tool_call_begin|>{{ call.id }}<|tool_call_argument_begin|>{% if call.function.arguments is string %}"
        "{{ call.function.arguments }}{% else %}{{ call.function.arguments | tojson }}{% endif %}{% endfor %}"
        "{% if message.role == 'tool' %}## Return of {{ message.tool_call_id }}{% endif %}"
    ),
    # Phi-4 mini: tools are the system message's.
    "tools in the system message": looped(
        "<|{{ message.role }}|>{{ message.content }}"
        "{% if message.tools is defined %}<|tool|>{{ message.tools }}<|/tool|>{% endif %}" + _CALLS
    ),
    # Granite 3.3, LFM2: calls are not shown.
    "calls are not shown": _LISTED + looped(_TURN + "{{ message.content }}"),
    # Gemma 2: turns alternate, and none is the system's.
    "no tools and no system": looped(
        "{% if message.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "<start_of_turn>{{ message.role }}\n{{ message.content }}"
    ),
    # Hermes 2 Pro and 3: tools are gone through whether there are any or not.
    "tools without asking": "{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    + looped("{{ message.content or '' }}" + _CALLS),
    # Llama 3.1 to 3.3: more than one call is refused.
    "one call a message": _LISTED
    + looped(
        _TURN + "{% if message.tool_calls %}{% if message.tool_calls | length != 1 %}"
        "{{ raise_exception('one call at once') }}{% endif %}{% endif %}" + _CALLS + "{{ message.content or '' }}"
    ),
    # GPT-OSS: the first call is shown alone, and a result is that of the last one shown.
    "the first call alone": _LISTED
    + "{% set last = namespace(name=none) %}"
    + looped(
        "{% if message.tool_calls %}{% if message.content and message.thinking %}"
        "{{ raise_exception('content or thinking') }}{% endif %}"
        "<|channel|>analysis<|message|>{{ message.content or message.thinking or '' }}"
        "{% set call = message.tool_calls[0].function %}{% set last.name = call.name %}"
        "to=functions.{{ call.name }}<|message|>{{ call.arguments | tojson }}"
        "{% elif message.role == 'tool' %}functions.{{ last.name }} says {{ message.content }}"
        "{% else %}{{ message.content }}{% endif %}"
    ),
    # Llama 3.2 Vision, Gemma 3: content in parts.
    "content in parts": _LISTED + looped("{% for part in message.content or [] %}{{ part.text }}{% endfor %}" + _CALLS),
}
# Gemma 4 as it was released: a result as a message of its own would be a turn of nobody's.
_GEMMA4_CALLS = (
    "{% for call in message.tool_calls or [] %}<|tool_call>call:{{ call.function.name }}"
    "{{ call.function.arguments | tojson }}<tool_call|>{% endfor %}"
)
_GEMMA4_RESULT = '<|tool_response>response:%s{value:<|"|>{{ %s }}<|"|>}<tool_response|>'
GEMMA4 = _LISTED + looped(
    "<|turn>{{ 'model' if message.role == 'assistant' else message.role }}\n" + _GEMMA4_CALLS + "{{ message.content }}"
    "{% for result in message.tool_responses or [] %}"
    + _GEMMA4_RESULT % ("{{ result.name }}", "result.response")
    + "{% endfor %}<turn|>\n"
)
# Later templates of it write both.
LATER_GEMMA4 = _LISTED + looped(
    "{% if message.role == 'tool' %}"
    + _GEMMA4_RESULT % ("{{ message.name }}", "message.content")
    + "{% else %}<|turn>{{ message.role }}\n"
    + _GEMMA4_CALLS
    + "{{ message.content }}{% for result in message.tool_responses or [] %}"
    + _GEMMA4_RESULT % ("{{ result.name }}", "result.response")
    + "{% endfor %}{% endif %}"
)
TEMPLATES |= {"results with calls": GEMMA4, "results with calls or apart": LATER_GEMMA4}
SCHEMA = '{"type": "object", "properties": {"city": {"type": "string"}}}'
IDS = ("call_0123456789abcdef", "call_fedcba9876543210")


def conversation() -> pb.ChatInput:
    calls = [
        pb.ToolCall(id=call_id, name="weather", arguments=json.dumps({"city": city}))
        for call_id, city in zip(IDS, ("Rome", "Oslo"), strict=True)
    ]
    results = [
        pb.ChatMessage(role="tool", tool_call_id=call_id, content=[pb.ContentPart(text=text)])
        for call_id, text in zip(IDS, ("warm", "cold"), strict=True)
    ]
    asked = pb.ChatMessage(role="user", content=[pb.ContentPart(text="Where is it warm?")])
    tool = pb.Tool(function=pb.FunctionTool(name="weather", description="of a city", parameters=SCHEMA))
    return pb.ChatInput(messages=[asked, pb.ChatMessage(role="assistant", tool_calls=calls), *results], tools=[tool])


def rendered(source: str, chat: pb.ChatInput) -> str:
    template = ChatTemplate(source, {})
    shows_tools = template.traits.tools is not ToolsPlace.NOWHERE
    syntax = OutputFormat.choose(source, "auto", "auto", shows_tools=shows_tools).syntax
    read = read_conversation(chat, template, syntax)
    return template.render(read.messages, max_chars=10_000, tools=read.tools, arguments=read.arguments)


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
def test_tools_calls_and_results_are_shown(source: str) -> None:
    text = rendered(source, conversation())
    for shown in ("Where is it warm?", "weather", "of a city", "Rome", "Oslo", "warm", "cold"):
        assert shown in text, shown
    assert '{"city": "Rome"}' in text and "None" not in text and "{'" not in text
    plain = pb.ChatInput(messages=[pb.ChatMessage(role="user", content=[pb.ContentPart(text="Hi")])])
    assert "Hi" in rendered(source, plain) and "tool" not in rendered(source, plain)


def test_ids_are_shortened_alike_wherever_they_stand() -> None:
    text = rendered(TEMPLATES["ids have nine letters"], conversation())
    ids = ChatTemplate(TEMPLATES["ids have nine letters"], {})
    assert ids.traits.call_ids is CallIds.SHORT
    assert not any(call_id in text for call_id in IDS)
    chat = conversation()
    for message in chat.messages:
        message.tool_call_id = message.tool_call_id.replace(IDS[0], "abc123DEF")
        for call in message.tool_calls:
            call.id = call.id.replace(IDS[0], "abc123DEF")
    assert rendered(TEMPLATES["ids have nine letters"], chat).count("abc123DEF") == 2


def test_calls_are_numbered_where_ids_have_names() -> None:
    source = TEMPLATES["ids have names"]
    assert ChatTemplate(source, {}).traits.call_ids is CallIds.NAMED
    chat = conversation()
    # A client that begins anew with every turn.
    again = [pb.ChatMessage.FromString(each.SerializeToString()) for each in chat.messages[1:3]]
    again[0].tool_calls[0].name = "forecast"
    chat.messages.extend(again)
    text = rendered(source, chat)
    for number, name in enumerate(["weather", "weather", "forecast"]):
        assert text.count(f"<|tool_call_begin|>functions.{name}:{number}<|tool_call_argument_begin|>") == 1
        assert text.count(f"## Return of functions.{name}:{number}") == 1
    assert not any(call_id in text for call_id in IDS)


def test_results_stand_where_the_model_has_learnt_to_read_them() -> None:
    assert ChatTemplate(GEMMA4, {}).traits.results_with_calls
    for source in TEMPLATES.values():
        assert ChatTemplate(source, {}).traits.results_with_calls == (source == GEMMA4)
    shown = "".join(
        f'<|tool_response>response:weather{{value:<|"|>{result}<|"|>}}<tool_response|>' for result in ("warm", "cold")
    )
    for source in (GEMMA4, LATER_GEMMA4):
        text = rendered(source, conversation())
        assert shown in text and "<|turn>tool" not in text
    assert not ChatTemplate(looped("{{ message | tojson }}"), {}).traits.results_with_calls


SINGLE = ("one call a message", "the first call alone")


def test_calls_that_must_stand_alone_come_each_before_its_result() -> None:
    for name, source in TEMPLATES.items():
        assert ChatTemplate(source, {}).traits.single_calls == (name in SINGLE), name
    chat = conversation()
    chat.messages[1].tool_calls[1].name = "forecast"
    # Results in another order than the calls, and a turn after them.
    chat.messages[2].tool_call_id, chat.messages[3].tool_call_id = IDS[1], IDS[0]
    chat.messages.append(pb.ChatMessage(role="user", content=[pb.ContentPart(text="So?")]))
    for name in SINGLE:
        text = rendered(TEMPLATES[name], chat)
        places = [text.index(part) for part in ('{"city": "Rome"}', "cold", '{"city": "Oslo"}', "warm", "So?")]
        # The first `warm` is the question's.
        places[3] = text.rindex("warm")
        assert places == sorted(places), name
    assert "functions.weather says cold" in text and "functions.forecast says warm" in text


def test_a_call_has_a_text_or_reasoning_where_the_template_takes_but_one() -> None:
    for name, source in TEMPLATES.items():
        assert ChatTemplate(source, {}).traits.text_or_reasoning == (name == "the first call alone"), name
    chat = conversation()
    chat.messages[1].reasoning = "I must look."
    chat.messages[1].content.add(text="Looking.")
    text = rendered(TEMPLATES["the first call alone"], chat)
    assert "<|channel|>analysis<|message|>I must look.\nLooking.to=functions.weather" in text


def test_no_effort_is_a_thinking_budget_of_nothing() -> None:
    """Seed-OSS' template then closes the thoughts itself."""
    end = "{% if thinking_budget == 0 %}<seed:think>\n</seed:think>{% endif %}"
    source = looped("{{ message.content }}") + end
    chat = pb.ChatInput(
        messages=[pb.ChatMessage(role="user", content=[pb.ContentPart(text="Hi")])],
        reasoning_effort=pb.REASONING_EFFORT_NONE,
    )
    assert rendered(source, chat).endswith("</seed:think>")
    chat.template_arguments["thinking_budget"] = 512
    assert rendered(source, chat) == "Hi"


def test_the_model_is_asked_for_the_calls_that_are_read() -> None:
    """Gemma's own form for Gemma, Hermes' for a model of which nothing is known; that is what the parser is then."""
    gemma, other = TEMPLATES["no tools and no system"], looped("{{ message.content }}")
    assert '{"name": "<function-name>", "parameters": <args-json-object>}' in rendered(gemma, conversation())
    assert "<tool_call>" not in rendered(gemma, conversation())
    assert '<tool_call>\n{"name": "<function-name>", "arguments": <args-json-object>}\n</tool_call>' in rendered(
        other, conversation()
    )
    llama3 = looped("<|start_header_id|>{{ message.content }}")
    assert OutputFormat.choose(llama3, "auto", "auto", shows_tools=False).tool_parser == "hermes"
    assert OutputFormat.choose(llama3, "auto", "auto").tool_parser == "llama3_json"
    assert OutputFormat.choose(llama3, "mistral", "auto", shows_tools=False).tool_parser == "mistral"


@pytest.mark.parametrize(
    ("mark", "tool_parser", "reasoning_parser"),
    [
        ("<|channel|>analysis", "openai", "openai_gptoss"),
        ("<tool_call>\n<function=a>", "qwen3_coder", ""),
        ("<tool_call></tool_call><think></think>", "hermes", "qwen3"),
        ("[TOOL_CALLS][THINK]", "mistral", "mistral"),
        ("<｜tool▁calls▁begin｜>```json<｜Assistant｜></think>", "deepseek_v3", "deepseek_r1"),
        ("<｜tool▁calls▁begin｜><｜Assistant｜></think>", "deepseek_v31", "deepseek_v3"),
        ("<｜DSML｜function_calls></think>", "deepseek_v32", "qwen3"),
        ("<｜DSML｜tool_calls></think>", "deepseek_v4", "qwen3"),
        ("{{ dsml + 'tool_calls>' }}{% set dsml = '｜DSML｜' %}", "deepseek_v4", ""),
        ("<tool_calls></think><answer><|extra_0|>", "hunyuan_a13b", "hunyuan_a13b"),
        ("<tool_call></think><answer>", "hermes", "qwen3"),
        ("<tool_call>{name}<arg_key></think>", "glm45", "qwen3"),
        ("<|tool_calls_section_begin|>", "kimi_k2", ""),
        ("<minimax:tool_call><think></think>", "minimax_m2", "qwen3"),
        ("<seed:tool_call><function=a><seed:think>", "seed_oss", "seed_oss"),
        ("<|tool_call>call:<|channel>thought", "gemma4", "gemma4"),
        ("<tool_calls>[]</tool_calls>", "hunyuan_a13b", ""),
        ("<|header_start|>", "llama4_pythonic", ""),
        ("<|tool|><|/tool|>", "phi4_mini_json", ""),
        ("<|tool_call|> Here is my thought process:", "granite", "granite"),
        ("<|tool_call|> <think></think> thought process", "granite", "qwen3"),
        ("<|start_header_id|><|python_tag|>", "llama3_json", ""),
        ("<start_of_turn>", "gemma3", ""),
        ("", "hermes", ""),
    ],
)
def test_formats_are_told_by_the_marks_in_the_template(mark: str, tool_parser: str, reasoning_parser: str) -> None:
    assert OutputFormat.choose(mark, "auto", "auto") == OutputFormat(tool_parser, reasoning_parser)
