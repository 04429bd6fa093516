"""`stepwire chat` and `stepwire complete`: text on a terminal, as it comes."""

from __future__ import annotations

import contextlib
import re
import readline
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from gateway.commands.server_client import CommandError, ServerClient

HISTORY_LINES = 1000
# All but the tabulator and the line break: escape sequences begin with one of them.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_HELP = "/new starts over, /system TEXT sets the system message, /undo takes the last turn back, /quit or Ctrl-D ends"


class Conversation:
    """Messages so far; every turn sends all of them."""

    def __init__(
        self, client: ServerClient, parameters: Mapping[str, Any], console: Console, system: str | None
    ) -> None:
        self._client = client
        self._parameters = parameters
        self._console = console
        self.system = system
        self.messages: list[dict[str, str]] = []

    def say(self, text: str) -> str:
        """One turn, printed as it comes; what was said. Raises `CommandError`: then the turn is not kept."""
        asked = {"role": "user", "content": text}
        head = [{"role": "system", "content": self.system}] if self.system else []
        body = {**self._parameters, "messages": [*head, *self.messages, asked]}
        answer: list[str] = []
        is_thinking = False
        try:
            for chunk in self._client.stream("/v1/chat/completions", body):
                for choice in chunk["choices"]:
                    delta = choice["delta"]
                    if thought := delta.get("reasoning"):
                        is_thinking = True
                        self._write(thought, style="dim")
                    if piece := delta.get("content"):
                        if is_thinking:
                            self._write("\n")
                            is_thinking = False
                        answer.append(piece)
                        self._write(piece)
        except KeyboardInterrupt:
            # What has come is kept, as it was read.
            self._write(" (stopped)", style="dim")
        self._write("\n")
        self.messages += [asked, {"role": "assistant", "content": "".join(answer)}]
        return "".join(answer)

    def _write(self, text: str, style: str | None = None) -> None:
        _show(self._console, text, style)

    def interact(self, history_file: Path | None) -> None:
        """Read and answer lines until the end of input."""
        _load_history(history_file)
        self._console.print(_HELP, style="dim")
        try:
            while True:
                try:
                    line = input("> ").strip()
                except (EOFError, KeyboardInterrupt):
                    self._console.print()
                    return
                if line in ("/quit", "/exit"):
                    return
                if line:
                    self._take(line)
        finally:
            _save_history(history_file)

    def _take(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word == "/new":
            self.messages.clear()
        elif word == "/undo":
            del self.messages[-2:]
        elif word == "/system":
            self.system = rest.strip() or None
        elif word.startswith("/"):
            self._console.print(_HELP, style="dim")
        else:
            try:
                self.say(line)
            except CommandError as error:
                self._console.print(str(error), style="red", markup=False)


def complete(client: ServerClient, body: Mapping[str, Any], console: Console) -> None:
    """One completion, printed as it comes."""
    for chunk in client.stream("/v1/completions", body):
        for choice in chunk["choices"]:
            _show(console, choice["text"])
    console.print()


def _show(console: Console, text: str, style: str | None = None) -> None:
    """Text as it comes; what would steer the terminal is not sent to it."""
    harmless = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
    console.print(harmless, end="", style=style, markup=False, highlight=False, soft_wrap=True)


def _load_history(file: Path | None) -> None:
    if file is not None:
        with contextlib.suppress(OSError):
            readline.read_history_file(file)
        readline.set_history_length(HISTORY_LINES)


def _save_history(file: Path | None) -> None:
    if file is not None:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)
