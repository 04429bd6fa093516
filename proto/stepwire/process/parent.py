"""No process outlives the one that started it, when it was asked not to."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time

import structlog

logger = structlog.get_logger(__name__)

# prctl(2)
_PR_SET_PDEATHSIG = 1
_POLL_S = 0.5
# A process that has been told to end may still finish what it is doing.
_LIMIT_S = 15.0


def end_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """This signal as soon as the parent is gone, however it went; SIGKILL's equivalent if that does not help.

    The kernel signals at once (Linux), and a thread watches as well: the kernel's promise is tied to the *thread* that
    started this process, and is void across a change of user.
    """
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)
    threading.Thread(target=_watch, args=(parent, number), name="parent", daemon=True).start()


def _watch(parent: int, number: signal.Signals) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    logger.warning("the process that started this one is gone: this one ends too", parent=parent)
    os.kill(os.getpid(), number)
    time.sleep(_LIMIT_S)
    os._exit(1)
