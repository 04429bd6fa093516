"""W3C trace context (https://www.w3.org/TR/trace-context/): a caller's trace in our log lines, and passed on.

No process here records spans of its own, and so none makes new ids: the caller's header goes on as it came.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import structlog

HEADER = "traceparent"
# version - trace id - parent id - flags; a later version may add fields behind these.
_FORMAT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-[\x21-\x7e]{0,128})?")
_ABSENT = ""

_current: ContextVar[str] = ContextVar("traceparent", default=_ABSENT)


def current_traceparent() -> str:
    """The header of the request that is being served; empty if it has none."""
    return _current.get()


def trace_ids(traceparent: str) -> tuple[str, str] | None:
    """(trace id, parent id) of a header; None if it is not one, and is to be ignored."""
    found = _FORMAT.fullmatch(traceparent)
    if found is None:
        return None
    version, trace_id, parent_id, more = found.groups()
    if version == "ff" or (version == "00" and more is not None) or not int(trace_id, 16) or not int(parent_id, 16):
        return None
    return trace_id, parent_id


@contextmanager
def traced(traceparent: str) -> Iterator[None]:
    """Serve a request under its caller's trace: log lines have `trace_id` and `parent_span_id`."""
    ids = trace_ids(traceparent) if traceparent else None
    if ids is None:
        yield
        return
    token = _current.set(traceparent)
    try:
        with structlog.contextvars.bound_contextvars(trace_id=ids[0], parent_span_id=ids[1]):
            yield
    finally:
        _current.reset(token)


def traceparent_of(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """The header among a gRPC call's metadata; empty if it is not there."""
    for key, value in metadata or ():
        if key == HEADER and isinstance(value, str):
            return value
    return _ABSENT
