from __future__ import annotations

import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from control_plane.frontend.chat_template import ChatTemplate
from control_plane.frontend.errors import RequestRefused
from control_plane.frontend.model_files import ModelFilesError

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

ALTERNATING = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}[INST] {{ message['content'] | trim }} [/INST]
{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}
{% endfor %}"""

TOOLS = """{% if tools is not none %}{{ tools | tojson }}{% endif %}{% for message in messages %}
{% if message.name is defined %}{{ message.name }}: {% endif %}
{%- if message.content is string %}{{ {'text': message.content, 'é<&>': [1, none, true]} | tojson(indent=2) }}
{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}
{% if loop.last %}{% break %}{% endif %}{% endfor %}
{% generation %}{{ messages[-1]['content'] }}{% endgeneration %}
{% set ns = namespace(found=false) %}{% for message in messages %}{% set ns.found = true %}{% endfor %}{{ ns.found }}"""

MESSAGES = [
    {"role": "user", "content": " What is <b>2 & 2</b>? "},
    {"role": "assistant", "content": "Four, “naturally”. "},
    {"role": "user", "content": "東京 🙂"},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("source", [CHATML, ALTERNATING, TOOLS], ids=["chatml", "alternating", "tools"])
@pytest.mark.parametrize("num_messages", [1, 3])
def test_renders_as_transformers_does(source: str, num_messages: int) -> None:
    messages = MESSAGES[:num_messages]
    [expected], _ = render_jinja_template([messages], chat_template=source, add_generation_prompt=True, **SPECIAL)
    assert ChatTemplate(source, SPECIAL).render(messages, max_chars=10_000) == expected


@pytest.mark.parametrize("source", [CHATML, ALTERNATING], ids=["chatml", "alternating"])
@pytest.mark.parametrize("last", ["The answer is", "The answer is ", "A < B"])
def test_continues_the_last_message_as_transformers_does(source: str, last: str) -> None:
    messages = [MESSAGES[0], {"role": "assistant", "content": last}]
    [expected], _ = render_jinja_template([messages], chat_template=source, continue_final_message=True, **SPECIAL)
    text = ChatTemplate(source, SPECIAL).render(messages, max_chars=10_000, continue_final_message=True)
    assert text == expected
    assert text.endswith(last)


def test_a_template_that_trims_the_last_message_continues_without_its_blanks() -> None:
    source = "{% for message in messages %}{{ message.content | trim }}|{% endfor %}"
    messages = [{"role": "assistant", "content": "so "}]
    assert ChatTemplate(source, {}).render(messages, max_chars=100, continue_final_message=True) == "so"


def test_only_the_assistants_last_message_can_be_continued() -> None:
    with pytest.raises(RequestRefused, match="assistant"):
        ChatTemplate(CHATML, {}).render(MESSAGES, max_chars=1000, continue_final_message=True)


def test_the_templates_own_refusal_reaches_the_client() -> None:
    with pytest.raises(RequestRefused, match="roles must alternate") as refused:
        ChatTemplate(ALTERNATING, SPECIAL).render([MESSAGES[1]], max_chars=1000)
    assert refused.value.code == "INVALID_ARGUMENT"
    assert refused.value.violations[0].field == "chat.messages"


def test_a_template_that_fails_ends_the_request_only() -> None:
    template = ChatTemplate("{{ messages[5].content.no.such }}", {})
    with pytest.raises(RequestRefused) as refused:
        template.render(MESSAGES, max_chars=1000)
    assert refused.value.code == "INVALID_ARGUMENT"


def test_a_template_that_is_not_jinja_stops_the_start() -> None:
    with pytest.raises(ModelFilesError, match="line 2"):
        ChatTemplate("a\n{% for %}", {})


def test_content_in_parts_where_the_template_iterates_over_it() -> None:
    source = (
        "{% for message in messages %}{% for part in message.content %}"
        "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    )
    assert ChatTemplate(source, {}).render([{"role": "user", "content": "hello"}], max_chars=100) == "hello"


def test_messages_stay_as_they_were() -> None:
    messages = [{"role": "user", "content": "a"}]
    with pytest.raises(RequestRefused):
        ChatTemplate("{% set _ = messages.append(1) %}", {}).render(messages, max_chars=100)
    assert messages == [{"role": "user", "content": "a"}]


def test_output_has_a_limit() -> None:
    with pytest.raises(RequestRefused, match="more than 50 characters") as refused:
        ChatTemplate(CHATML, {}).render([{"role": "user", "content": "x" * 51}], max_chars=50)
    assert refused.value.reason == "context_length_exceeded"


def doubling(statement: str) -> str:
    return "{% set ns = namespace(s='xxxx') %}{% for i in range(60) %}" + statement + "{% endfor %}"


NESTED_LOOPS = "{% for b in range(90000) %}{% for c in range(90000) %}BODY{% endfor %}{% endfor %}"

BOMBS = {
    "endless loops": NESTED_LOOPS.replace("BODY", "{% set d = c %}"),
    "endless silent macro": "{% macro m() %}" + NESTED_LOOPS.replace("BODY", "") + "{% endmacro %}{{ m() }}",
    "endless loops that let nothing pass": NESTED_LOOPS.replace("(90000) %}BODY", "(90000) if c < 0 %}"),
    "endless calls": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(90) }}",
    "many large statements": "{% set a = 'x' * 16000000 %}" * 1000,
    "many large values in one output": "{% macro m() %}"
    + "{{ ('x' * 16000000)[:1] }}" * 1000
    + "{% endmacro %}{{ m() }}",
    "much output": NESTED_LOOPS.replace("BODY", "xxxxxxxxxxxxxxxx"),
    "repeated text": "{{ 'x' * 10000000000 }}",
    "repeated list": "{{ [1, 2] * 10000000000 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "doubling ~": doubling("{% set ns.s = ns.s ~ ns.s %}"),
    "doubling +": doubling("{% set ns.s = ns.s + ns.s %}"),
    "doubling block": doubling("{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}"),
    "doubling %": doubling("{% set ns.s = '%s%s' % (ns.s, ns.s) %}"),
    "format filter": doubling("{% set ns.s = '%s%s'|format(ns.s, ns.s) %}"),
    "format method": doubling("{% set ns.s = '{0}{0}'.format(ns.s) %}"),
    "replace": doubling("{% set ns.s = ns.s.replace('x', ns.s) %}"),
    "replace filter": doubling("{% set ns.s = ns.s|replace('x', 'xxxx') %}"),
    "join": doubling("{% set ns.s = [ns.s, ns.s]|join %}"),
    "join method": doubling("{% set ns.s = ns.s.join(['', '', '', '']) %}"),
    "width": "{{ '%1000000000d' % 1 }}",
    "star width": "{{ '%*d' % (1000000000, 1) }}",
    "format width": "{{ '{:>1000000000}'.format(1) }}",
    "format map": "{{ '{a:>1000000000}'.format_map({'a': 1}) }}",
    "argument width": "{{ '{:>{}}'.format(1, 1000000000) }}",
    "ljust": "{{ 'x'.ljust(1000000000) }}",
    "center": "{{ 'x'|center(1000000000) }}",
    "indent": "{{ 'x\n'|indent(1000000000) }}",
    "batch": "{{ [1]|batch(1000000000, 0)|list }}",
    "large range": "{{ range(1000000000)|list }}",
    "json indent": "{{ [1]|tojson(indent=1000000000) }}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_ends_with_an_error(name: str) -> None:
    started = time.monotonic()
    template = ChatTemplate("{% if messages[0].content == 'go' %}" + BOMBS[name] + "{% endif %}", {}, time_limit_s=0.3)
    with pytest.raises(RequestRefused) as refused:
        template.render([{"role": "user", "content": "go"}], max_chars=1_000_000)
    assert refused.value.code == "INVALID_ARGUMENT"
    assert time.monotonic() - started < 120, "it must end at all"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ self._TemplateReference__context }}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_nothing_outside_the_conversation_is_reachable(source: str) -> None:
    try:
        text = ChatTemplate(source, {}).render([{"role": "user", "content": "x"}], max_chars=10_000)
    except RequestRefused:
        return
    assert text == ""
