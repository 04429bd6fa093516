"""Ports for processes that tests start."""

from __future__ import annotations

import socket
from collections import deque

# As many as may be on their way to the processes that will listen on them.
_held: deque[socket.socket] = deque(maxlen=200)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody else is given until whoever it is for has had time to listen on it.

    A socket that is bound and does not listen holds it: the kernel then gives it neither to a connection nor to another
    one who asks for any port, and still lets a server (which sets SO_REUSEADDR, as servers do) listen on it.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # For gateways that share a port.
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    holder.bind(("127.0.0.1", 0))
    if len(_held) == _held.maxlen:
        _held.popleft().close()
    _held.append(holder)
    return int(holder.getsockname()[1])
