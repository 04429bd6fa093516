"""Protobuf messages over a pipe between two processes of one node: a length of four bytes, then the message."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from typing import TypeVar

from google.protobuf.message import Message

_LENGTH = struct.Struct("<I")

MessageType = TypeVar("MessageType", bound=Message)


class ChannelClosed(Exception):
    """The other side is gone."""


class Channel:
    """One end of the pipe. One thread reads; any thread writes."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._write_lock = threading.Lock()

    def send(self, data: bytes) -> None:
        """Raises `ChannelClosed`."""
        try:
            with self._write_lock:
                self._socket.sendall(_LENGTH.pack(len(data)) + data)
        except OSError as error:
            raise ChannelClosed(str(error)) from error

    def receive(self, kind: type[MessageType]) -> MessageType:
        """The next message. Raises `ChannelClosed`."""
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        return kind.FromString(self._read(length))

    def _read(self, num_bytes: int) -> bytes:
        parts = bytearray()
        while len(parts) < num_bytes:
            try:
                part = self._socket.recv(num_bytes - len(parts))
            except OSError as error:
                raise ChannelClosed(str(error)) from error
            if not part:
                raise ChannelClosed("the other process has closed the pipe")
            parts += part
        return bytes(parts)

    def close(self) -> None:
        # Wakes a thread that reads, which closing alone would not.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
