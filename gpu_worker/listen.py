"""Where the worker listens: HOST:PORT or a unix socket, made free of what an ended process left behind."""

from __future__ import annotations

import errno
import os
import socket
import stat
from dataclasses import dataclass, field
from pathlib import Path

# sockaddr_un.sun_path has 108 bytes, the last one is 0.
_MAX_UNIX_PATH_BYTES = 107


class ListenError(Exception):
    """The address cannot be listened on; the message says what to do."""


@dataclass(frozen=True, slots=True)
class ListenAddress:
    """A unix socket's path, or a host and a port (0: any free one)."""

    path: Path | None = None
    host: str = ""
    port: int = 0
    flag: str = field(default="--listen", compare=False)
    """The setting that it comes from: what messages begin with."""

    @classmethod
    def parse(cls, text: str, flag: str = "--listen") -> ListenAddress:
        """Read unix:/PATH, unix:///PATH, HOST:PORT or [IPV6]:PORT. Raises `ListenError`."""
        if text.startswith("unix:"):
            path = text.removeprefix("unix:")
            path = path.removeprefix("//") if path.startswith("///") else path
            if not path or path.startswith("//"):
                raise ListenError(f"{flag} {text!r} names no socket file: write unix:/PATH")
            if len(os.fsencode(path)) > _MAX_UNIX_PATH_BYTES:
                raise ListenError(
                    f"{flag}: the socket's path has {len(os.fsencode(path))} bytes and the system allows"
                    f" {_MAX_UNIX_PATH_BYTES}: choose a shorter one than {path}"
                )
            return cls(path=Path(path), flag=flag)
        host, colon, port = text.rpartition(":")
        if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
            raise ListenError(f"{flag} {text!r} is neither HOST:PORT (port 0 to 65535) nor unix:/PATH")
        if ":" in host and not (host.startswith("[") and host.endswith("]")):
            raise ListenError(f"{flag} {text!r}: write an IPv6 address in brackets, [::1]:50061")
        return cls(host=host, port=int(port), flag=flag)

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.path is not None else f"{self.host}:{self.port}"

    def claim(self) -> None:
        """Check that nobody else listens here, and remove the file of a socket that nobody listens on any more.

        gRPC would not say it: it replaces the socket file of a living server, and reports a used port in several lines.
        Raises `ListenError`.
        """
        if self.path is not None:
            _claim_path(self.path, self.flag)
        elif self.port:
            _check_port_is_free(self.host.strip("[]"), self.port, self.flag)


def _claim_path(path: Path, flag: str) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise ListenError(f"{flag}: the directory {path.parent} does not exist: create it first") from None
        return
    except OSError as error:
        raise ListenError(f"{flag}: cannot look at {path}: {error.strerror}") from error
    if not stat.S_ISSOCK(mode):
        raise ListenError(f"{flag}: {path} exists and is not a socket: choose another path or remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            raise ListenError(
                f"{flag}: {path} is a socket that cannot be asked whether it is in use: {error}"
            ) from error
    raise ListenError(f"{flag}: {path} is in use by another process: end it, or choose another path")


def _check_port_is_free(host: str, port: int, flag: str) -> None:
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ListenError(f"{flag}: the host {host!r} is unknown: {error.strerror}") from error
    for family, kind, protocol, _, address in addresses:
        with socket.socket(family, kind, protocol) as probe:
            # As gRPC does: connections of an ended server that are still being closed are no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    message = f"port {port} on {host} is in use by another process: end it, or choose another port"
                else:
                    message = f"cannot listen on {host}:{port}: {error.strerror}"
                raise ListenError(f"{flag}: {message}") from error
