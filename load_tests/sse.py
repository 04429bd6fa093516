"""Server-sent events, as far as OpenAI's streams use them: the `data` of each event."""

from __future__ import annotations


class SseParser:
    """Takes bytes as they come off the socket, cut anywhere, and gives whole events' data.

    Follows the WHATWG's event stream format for the field that matters here: lines end in LF, CRLF or CR, an event ends
    at an empty line, several data lines are joined by LF, comments and other fields are skipped.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of every event that this chunk completes."""
        data = self._rest + chunk if self._rest else chunk
        if b"\r" in data:
            # A CR at the very end may be half of a CRLF: it waits for what follows.
            self._rest = b"\r" if data.endswith(b"\r") else b""
            data = data.removesuffix(b"\r").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        else:
            self._rest = b""
        *events, rest = data.split(b"\n\n")
        self._rest = rest + self._rest
        found = []
        for event in events:
            # Nearly every event is one line.
            if event.startswith(b"data:") and b"\n" not in event:
                found.append(event[6:] if event[5:6] == b" " else event[5:])
                continue
            lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
            if lines:
                found.append(b"\n".join(lines))
        return found
