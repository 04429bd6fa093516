from __future__ import annotations

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from stepwire.process.traces import current_traceparent, trace_ids, traced, traceparent_of

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADER = f"00-{TRACE}-{PARENT}-01"


@pytest.mark.parametrize(
    "traceparent",
    [HEADER, f"00-{TRACE}-{PARENT}-00", f"01-{TRACE}-{PARENT}-01", f"cc-{TRACE}-{PARENT}-01-what-comes-later"],
)
def test_ids_of_a_header(traceparent: str) -> None:
    assert trace_ids(traceparent) == (TRACE, PARENT)


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01-more",
        f"00-{TRACE}-{PARENT}",
        f"00-{TRACE}-{PARENT}-01\n",
        f"01-{TRACE}-{PARENT}-01-" + "x" * 1000,
    ],
)
def test_what_is_no_header_is_ignored(traceparent: str) -> None:
    assert trace_ids(traceparent) is None
    with traced(traceparent):
        assert current_traceparent() == ""
        assert structlog.contextvars.get_contextvars() == {}


@given(st.text(max_size=80))
def test_no_text_does_harm(traceparent: str) -> None:
    with traced(traceparent):
        pass
    assert current_traceparent() == ""


def test_log_lines_are_bound_for_a_request_and_no_longer() -> None:
    with traced(HEADER):
        assert current_traceparent() == HEADER
        assert structlog.contextvars.get_contextvars() == {"trace_id": TRACE, "parent_span_id": PARENT}
        with traced(f"00-{'1' * 32}-{PARENT}-01"):
            assert structlog.contextvars.get_contextvars()["trace_id"] == "1" * 32
        assert structlog.contextvars.get_contextvars()["trace_id"] == TRACE
    assert structlog.contextvars.get_contextvars() == {}


def test_metadata() -> None:
    assert traceparent_of((("authorization", "x"), ("traceparent", HEADER))) == HEADER
    assert traceparent_of((("x-bin", b"1"), ("traceparent", b"2"))) == traceparent_of(None) == ""
