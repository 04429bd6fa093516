"""How long a step may take before its worker counts as hung: a multiple of what such steps have taken."""

from __future__ import annotations

from collections import deque

# How much slower than the slowest step seen a step may be. Generous: a neighbour on the machine is not a hang.
_FACTOR = 20.0
_MIN_LIMIT_S = 10.0
# Until this many steps are seen, compilation and first touches may take as long as the setting says.
_WARM_UP_STEPS = 16
_WINDOW_STEPS = 256


class StepDeadline:
    """`max_limit_s` is the limit while nothing is known, and the most at any time."""

    def __init__(self, max_limit_s: float) -> None:
        self._max_limit_s = max_limit_s
        self._recent: deque[tuple[int, float]] = deque(maxlen=_WINDOW_STEPS)

    def note(self, num_tokens: int, duration_s: float) -> None:
        self._recent.append((num_tokens, duration_s))

    def forget(self) -> None:
        """Another worker may be slower."""
        self._recent.clear()

    def limit_s(self, num_tokens: int) -> float:
        """Seconds from sending a step of `num_tokens` tokens."""
        if len(self._recent) < _WARM_UP_STEPS:
            return self._max_limit_s
        slowest_tokens, slowest_s = max(self._recent, key=lambda step: step[1])
        scale = max(1.0, num_tokens / max(1, slowest_tokens))
        return min(self._max_limit_s, max(_MIN_LIMIT_S, _FACTOR * slowest_s * scale))
