"""What was recorded against what is answered now, step by step."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from stepwire.v1 import worker_pb2

from gpu_worker.runner_api import StepResult
from gpu_worker.step_codec import decode_result


@dataclass(frozen=True, slots=True)
class Difference:
    """The first thing that is not as recorded."""

    session: int
    """Sessions are counted from 1, over the whole file."""
    step_id: int
    row: int
    position: int | None
    """Index of the token in its sequence; None where the row did not run in this step."""
    expected: str
    got: str

    def __str__(self) -> str:
        at = "" if self.position is None else f", position {self.position}"
        where = f"session {self.session}, step {self.step_id}, row {self.row}{at}"
        return f"{where}: expected {self.expected}, got {self.got}"


@dataclass(slots=True)
class Comparison:
    """Counts over all sessions. `difference` is set by the first step whose tokens differ."""

    num_sessions: int = 0
    num_steps: int = 0
    num_tokens: int = 0
    num_logprobs: int = 0
    num_changed_logprobs: int = 0
    largest_logprob_change: float = 0.0
    difference: Difference | None = None
    _positions: dict[int, dict[int, int]] = field(default_factory=dict)  # step id -> row -> position of its token

    def begin_session(self) -> None:
        self.num_sessions += 1
        self._positions.clear()

    def note_step(self, step: worker_pb2.StepBatch) -> None:
        """A step that is sent: where the tokens of its result stand."""
        rows, starts, counts = (
            np.frombuffer(data, dtype="<u4").astype(np.int64)
            for data in (step.run_rows, step.run_start_positions, step.run_num_tokens)
        )
        self._positions[step.step_id] = dict(zip(rows.tolist(), (starts + counts).tolist(), strict=True))

    def compare(self, expected_message: worker_pb2.StepResult, got_message: worker_pb2.StepResult) -> bool:
        """Whether the tokens agree; counts them."""
        expected, got = decode_result(expected_message), decode_result(got_message)
        positions = self._positions.pop(expected.step_id, {})
        wanted, answered = _outcomes(expected), _outcomes(got)
        for row in [*wanted, *(row for row in answered if row not in wanted)]:
            if wanted.get(row) != answered.get(row):
                self.difference = Difference(
                    self.num_sessions,
                    expected.step_id,
                    row,
                    positions.get(row),
                    wanted.get(row, "no token"),
                    answered.get(row, "no token"),
                )
                return False
        self.num_steps += 1
        self.num_tokens += len(expected.token_ids)
        self._compare_logprobs(expected, got)
        return True

    def _compare_logprobs(self, expected: StepResult, got: StepResult) -> None:
        """Only counted: they may differ in the last bits where tokens do not."""
        if expected.logprobs is None or got.logprobs is None:
            return
        pairs = [(expected.logprobs, got.logprobs)]
        if expected.top_logprobs is not None and got.top_logprobs is not None:
            pairs.append((expected.top_logprobs.ravel(), got.top_logprobs.ravel()))
        # Results of one step name their rows in the same order: the tokens were compared by row already.
        for one, other in pairs:
            asked = np.isfinite(one) & np.isfinite(other)
            self.num_logprobs += int(asked.sum())
            changes = np.abs(one[asked] - other[asked])
            self.num_changed_logprobs += int((changes != 0).sum())
            self.largest_logprob_change = max(self.largest_logprob_change, float(changes.max(initial=0.0)))

    def summary(self) -> str:
        """One line for a person."""
        if self.difference is not None:
            return f"differs after {self.num_steps} steps that agree: {self.difference}"
        sessions = "1 session" if self.num_sessions == 1 else f"{self.num_sessions} sessions"
        line = f"all {self.num_steps} steps agree ({self.num_tokens} tokens, {sessions})"
        if self.num_changed_logprobs:
            line += (
                f"; {self.num_changed_logprobs} of {self.num_logprobs} log-probabilities differ, by at most "
                f"{self.largest_logprob_change:.2g}"
            )
        elif self.num_logprobs:
            line += f"; {self.num_logprobs} log-probabilities are the same to the bit"
        return line


def _outcomes(result: StepResult) -> dict[int, str]:
    """What each row of a step came to."""
    outcomes = {}
    for index, row in enumerate(result.rows.tolist()):
        tokens = result.token_ids[result.offsets[index] : result.offsets[index + 1]].tolist()
        outcomes[row] = f"token {tokens[0]}" if len(tokens) == 1 else f"tokens {tokens}"
    for fault in result.faults:
        outcomes[fault.row] = f"fault {fault.code.name}"
    return outcomes
