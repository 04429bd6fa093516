"""What came back, and the numbers that are made of it.

TTFT: sent until the first token. E2E: sent until the last token. TPOT: (E2E - TTFT) / (N - 1), one value a request of
at least two tokens. ITL: every gap between two arrivals of a request; tokens that arrive together are one arrival.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

_SLO = re.compile(r"(ttft|tpot|itl|e2e)=(\d+(?:\.\d+)?)(ms|s)?")
_MAX_ERRORS_SHOWN = 5


@dataclass(slots=True)
class RequestRecord:
    """Times are of the monotonic clock, which all processes of a machine share."""

    sent_s: float = 0.0
    # How much later than planned it was sent: the driver's own fault.
    late_s: float = 0.0
    # One entry an arrival of tokens.
    arrivals_s: list[float] = field(default_factory=list)
    ended_s: float = 0.0
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    num_cached_tokens: int | None = None
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        return self.arrivals_s[0] - self.sent_s

    @property
    def e2e_s(self) -> float:
        return self.arrivals_s[-1] - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        return (self.e2e_s - self.ttft_s) / (self.num_tokens - 1) if self.num_tokens > 1 else None

    @property
    def is_ok(self) -> bool:
        return self.error is None and bool(self.arrivals_s)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits that a good request keeps, in seconds, by name: ttft, tpot, itl (its mean), e2e."""

    limits_s: dict[str, float]

    @classmethod
    def parse(cls, text: str) -> Slo:
        """`ttft=200ms,tpot=0.05s`; a plain number is milliseconds."""
        limits_s: dict[str, float] = {}
        for part in text.split(","):
            match = _SLO.fullmatch(part.strip())
            if match is None:
                raise ValueError(f"{part.strip()!r} is not NAME=NUMBER[ms|s] with NAME one of ttft, tpot, itl, e2e")
            limits_s[match[1]] = float(match[2]) * (1.0 if match[3] == "s" else 1e-3)
        return cls(limits_s)

    def is_kept(self, record: RequestRecord) -> bool:
        gaps_s = np.diff(record.arrivals_s)
        measured = {
            "ttft": record.ttft_s,
            "tpot": record.tpot_s,
            "itl": float(gaps_s.mean()) if len(gaps_s) else None,
            "e2e": record.e2e_s,
        }
        return all((value := measured[name]) is None or value <= limit for name, limit in self.limits_s.items())


def spread_ms(values_s: Sequence[float] | FloatArray) -> dict[str, float] | None:
    """Mean, median and 99th percentile in milliseconds (linear between neighbours); None of nothing."""
    if not len(values_s):
        return None
    values = np.asarray(values_s, dtype=np.float64) * 1e3
    p50, p99 = np.percentile(values, (50, 99))
    return {"mean": _short(values.mean()), "p50": _short(p50), "p99": _short(p99)}


def phase_numbers(records: Sequence[RequestRecord], slo: Slo | None = None) -> dict[str, Any]:
    """All numbers of one phase. Rates count from the first request sent to the last token received."""
    good = [record for record in records if record.is_ok]
    numbers: dict[str, Any] = {"num_requests": len(records), "num_failed": len(records) - len(good)}
    if len(good) < len(records):
        errors = Counter(record.error or "ended without a token" for record in records if not record.is_ok)
        numbers["errors"] = dict(errors.most_common(_MAX_ERRORS_SHOWN))
    if not good:
        return numbers
    wall_s = max(record.arrivals_s[-1] for record in good) - min(record.sent_s for record in records)
    num_prompt = sum(record.num_prompt_tokens for record in good)
    num_output = sum(record.num_tokens for record in good)
    numbers |= {
        "wall_s": _short(wall_s),
        "num_prompt_tokens": num_prompt,
        "num_output_tokens": num_output,
        "requests_per_s": _short(len(good) / wall_s),
        "output_tokens_per_s": _short(num_output / wall_s),
        "total_tokens_per_s": _short((num_prompt + num_output) / wall_s),
        "ttft_ms": spread_ms([record.ttft_s for record in good]),
        "tpot_ms": spread_ms([tpot_s for record in good if (tpot_s := record.tpot_s) is not None]),
        "itl_ms": spread_ms(_gaps_s(good)),
        "e2e_ms": spread_ms([record.e2e_s for record in good]),
        "tokens_per_arrival": _short(num_output / sum(len(record.arrivals_s) for record in good)),
        "largest_send_delay_ms": _short(max(record.late_s for record in records) * 1e3),
    }
    cached = [record.num_cached_tokens for record in good if record.num_cached_tokens is not None]
    if cached:
        numbers["num_cached_tokens"] = sum(cached)
        numbers["cache_hit_rate"] = _short(sum(cached) / num_prompt)
    if slo is not None:
        num_good = sum(slo.is_kept(record) for record in good)
        numbers["goodput"] = {
            "slo_ms": {name: _short(limit * 1e3) for name, limit in slo.limits_s.items()},
            "share_of_requests": _short(num_good / len(records)),
            "requests_per_s": _short(num_good / wall_s),
        }
    return numbers


def _gaps_s(records: Sequence[RequestRecord]) -> FloatArray:
    return np.concatenate([np.diff(record.arrivals_s) for record in records])  # [num_gaps]


def _short(value: float) -> float:
    """Five significant digits: more is noise, and the file is for people too."""
    return float(f"{value:.5g}")
