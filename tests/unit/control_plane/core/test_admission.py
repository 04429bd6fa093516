from __future__ import annotations

import pytest

from control_plane.core.admission import AdmissionLimits, QueueLoad, check_admission, retry_after_s
from control_plane.core.request import AdmissionError
from control_plane.core.step_deadline import StepDeadline

from .conftest import make_request

LIMITS = AdmissionLimits(
    max_queued_requests=3,
    max_queued_tokens=100,
    max_model_len=64,
    max_num_seqs=4,
    block_size=8,
    num_usable_blocks=6,
    vocab_size=100,
)
QUIET = QueueLoad(0, 0, 0.0)


def reason(prompt: int, max_tokens: int, load: QueueLoad = QUIET, **fields: object) -> AdmissionError | None:
    try:
        check_admission(make_request(0, prompt, max_tokens, **fields), LIMITS, load)
    except AdmissionError as error:
        return error
    return None


def test_what_fits_is_admitted() -> None:
    assert reason(40, 9) is None  # 49 tokens; the last one's KV is never written: 48 slots are 6 blocks


def test_context_and_pool_are_named_with_both_numbers() -> None:
    too_long = reason(60, 5)
    assert too_long and too_long.reason == "context_length_exceeded" and "65" in str(too_long) and "64" in str(too_long)
    too_big = reason(40, 10)
    assert too_big and too_big.code == "INVALID_ARGUMENT" and "7" in str(too_big) and "6" in str(too_big)


def test_too_many_sequences() -> None:
    error = reason(4, 4, num_sequences=5)
    assert error and error.field == "n"


def test_a_full_queue_says_when_to_come_back() -> None:
    error = reason(4, 4, QueueLoad(3, 12, 2.0))
    assert error and error.code == "RESOURCE_EXHAUSTED" and error.retry_after_s is not None
    error = reason(20, 4, QueueLoad(1, 90, 2.0))
    assert error and error.reason == "queue_full"
    # A prompt larger than the token bound is still let into an empty queue: it could never come otherwise.
    assert reason(20, 4, QueueLoad(0, 0, 0.0)) is None


@pytest.mark.parametrize("rate, seconds", [(0.0, 5.0), (1e9, 1.0), (1e-9, 60.0), (10.0, 10.0)])
def test_retry_time_follows_the_rate(rate: float, seconds: float) -> None:
    assert retry_after_s(QueueLoad(5, 1000, rate)) == pytest.approx(seconds)


def test_deadline_follows_what_steps_take() -> None:
    deadline = StepDeadline(60.0)
    assert deadline.limit_s(1) == 60.0
    for _ in range(20):
        deadline.note(10, 1.0)
    assert deadline.limit_s(10) == pytest.approx(20.0)
    assert deadline.limit_s(20) == pytest.approx(40.0)
    assert deadline.limit_s(10_000) == 60.0
    for _ in range(300):
        deadline.note(10, 0.001)
    assert deadline.limit_s(10) == 10.0
    deadline.forget()
    assert deadline.limit_s(10) == 60.0
