"""What GPT-OSS may say under a grammar: messages of channels (harmony), as Lark rules.

After `<|start|>assistant`: a header with a channel and perhaps a recipient, `<|message|>`, a body, a mark that ends it.
Calls are told by their recipient, `to=functions.NAME`, before or after the channel. All marks are special tokens, which
text never matches: so where a body ends is never in doubt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from control_plane.frontend.grammar import quoted

_MARKS = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|constrain|>")

# From a mark to its token in Lark; empty where the tokenizer does not have it.
Special = Callable[[str], str]


def can_be_told(special: Special, prompt_end: str) -> bool:
    """Whether the tokenizer has all the marks, and the prompt ends where a message's header begins."""
    return prompt_end.rstrip().endswith("<|start|>assistant") and all(map(special, _MARKS))


def thought_rules(special: Special) -> str:
    """Rule `thought`: a message of a channel that is not the answer's, and the opening of the next message."""
    channel, message, start, end, _ = map(special, _MARKS)
    return (
        f'thought: {channel} ASIDE {message} BODY {end} {start} "assistant"\n'
        "ASIDE: /analysis|commentary/\n"
        "BODY: /(.|\\n)*/"
    )


def final_rule(special: Special) -> str:
    """Rule `final`: the answer's header."""
    channel, message, _, _, constrain = map(special, _MARKS)
    return f'final: {channel} "final" (" "? {constrain} "json")? {message}'


def conversation(special: Special, tools: Sequence[tuple[int, str, str]]) -> str:
    """Messages, and one that calls a function. tools: (index, name, its arguments as a part of a rule)."""
    channel, message, start, end, constrain = map(special, _MARKS)
    lines = [
        f'start: (other {end} {start} "assistant")* (other | call)',
        f"other: HEADER {channel} HEADER ({constrain} HEADER)? {message} BODY",
        # A header without a recipient.
        "HEADER: /[^=]*/",
        "BODY: /(.|\\n)*/",
        "call: " + " | ".join(f"call_{index}" for index, _, _ in tools),
    ]
    for index, name, arguments in tools:
        before, after = quoted(f" to=functions.{name}"), quoted(f"commentary to=functions.{name}")
        lines += [
            f'call_{index}: ({before} {channel} "commentary" | {channel} {after}) form {message} args_{index}',
            f"args_{index}: {arguments}",
        ]
    lines.append(f'form: (" "? {constrain} "json" | " json")?')
    return "\n".join(lines)
