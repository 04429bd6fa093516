"""What keeps a worker from starting, without torch."""

from __future__ import annotations


class LoadError(Exception):
    """Something that a person can put right: the message says how, and start-up prints it without a traceback."""
