"""A conversation to one prompt text, by the model's own jinja template."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jinja2

from control_plane.frontend.errors import RequestRefused, Violation
from control_plane.frontend.model_files import ModelFilesError
from control_plane.frontend.template_sandbox import ChatTemplateEnvironment, TemplateRefusal
from control_plane.frontend.template_traits import find_traits

Message = dict[str, Any]

RENDER_TIME_LIMIT_S = 2.0
MAX_TEMPLATE_CHARS = 2**20


class ChatTemplate:
    """One compiled template. `render` may run in any thread, several at a time."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], *, time_limit_s: float = RENDER_TIME_LIMIT_S
    ) -> None:
        """Compile the template.

        Raises:
            ModelFilesError: it is not valid jinja.
        """
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ModelFilesError(
                f"the chat template has {len(source)} characters; at most {MAX_TEMPLATE_CHARS} are read."
            )
        try:
            self._environment = ChatTemplateEnvironment()
            self._template = self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelFilesError(
                f"the chat template is not valid jinja, line {error.lineno}: {error.message}. "
                "Correct it, or give another with --chat-template FILE."
            ) from error
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._time_limit_s = time_limit_s
        # What stands for no tools; some templates iterate over them unasked.
        self._no_tools: list[Any] | None = None
        self._content_as_parts = False
        if self._attempt([{"role": "user", "content": "x"}], None) is None:
            self._no_tools = []
        self._content_as_parts = self._wants_parts()
        self.traits = find_traits(self._attempt)

    def _attempt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> str | None:
        try:
            return self._run(messages, MAX_TEMPLATE_CHARS, add_generation_prompt=True, tools=tools)
        except RequestRefused:
            return None

    def render(
        self,
        messages: Sequence[Message],
        *,
        max_chars: int,
        continue_final_message: bool = False,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text, special tokens included as text.

        It ends where the assistant's answer begins; with `continue_final_message` it ends with the last message's text.
        `content` of a message is one string; texts that came in several parts were joined before. `arguments` are
        further variables of the template, which cannot take the place of its own.

        Raises:
            RequestRefused: INVALID_ARGUMENT, with the template's own message where it refused the conversation.
        """
        mark = ""
        if continue_final_message:
            if not messages or messages[-1]["role"] != "assistant":
                raise _refused(
                    "chat.continue_final_message", "the last message must be the assistant's to be continued"
                )
            # The blank tells whether the template trims the message's end.
            mark = f"\ue000{secrets.token_hex(8)}\ue001"
            last = messages[-1]
            messages = [*messages[:-1], {**last, "content": f"{last['content'] or ''}{mark} "}]
        add_generation_prompt = add_generation_prompt and not continue_final_message
        text = self._run(
            messages, max_chars, add_generation_prompt=add_generation_prompt, tools=tools, arguments=arguments or {}
        )
        if not mark:
            return text
        end = text.rfind(mark)
        if end < 0:
            raise _refused(
                "chat.continue_final_message",
                "the model's chat template does not show the last message as it was given",
            )
        keeps_blanks = text.startswith(" ", end + len(mark))
        return text[:end] if keeps_blanks else text[:end].rstrip()

    def _run(
        self,
        messages: Sequence[Message],
        max_chars: int,
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        arguments: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        if self._content_as_parts:
            # Where there is nothing but calls, nothing stands for the content.
            messages = [
                message if message["content"] is None else {**message, "content": _as_parts(message["content"])}
                for message in messages
            ]
        own = {
            "messages": [dict(message) for message in messages],
            "tools": tools or self._no_tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._special_tokens,
        }
        parts: list[str] = []
        num_chars = 0
        try:
            with self._environment.time_limit(self._time_limit_s):
                for part in self._template.generate({**arguments, **own}):
                    parts.append(part)
                    num_chars += len(part)
                    if num_chars > max_chars:
                        raise _refused(
                            "chat.messages",
                            f"the rendered conversation has more than {max_chars} characters: too long for the context",
                            reason="context_length_exceeded",
                        )
        except TemplateRefusal as error:
            raise _refused("chat.messages", f"the model's chat template refuses this conversation: {error}") from error
        except RequestRefused:
            raise
        except Exception as error:  # whatever a template does wrong, only this request ends
            raise _refused(
                "chat.messages", f"the model's chat template failed on this conversation: {error}"
            ) from error
        return "".join(parts)

    def _wants_parts(self) -> bool:
        """Templates of multimodal models iterate over a message's content and show nothing of a plain string."""
        probe = "stepwire" + secrets.token_hex(4)
        messages: list[Message] = [{"role": "user", "content": probe}]

        def shows(as_parts: bool) -> bool:
            self._content_as_parts = as_parts
            try:
                return probe in self._run(messages, MAX_TEMPLATE_CHARS, add_generation_prompt=True)
            except RequestRefused:
                return False

        return not shows(as_parts=False) and shows(as_parts=True)


def _as_parts(content: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}]


def _refused(field: str, description: str, reason: str = "invalid_request") -> RequestRefused:
    return RequestRefused.invalid(Violation(field, description), reason=reason)
