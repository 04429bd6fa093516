"""Which way a sum over ranks takes, by its size: measured tables (`tuned/all_reduce/<device>.json`) and a default.

Tables are made by `python -m load_tests.kernels.all_reduce sweep` on the machine in question.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from stepwire_kernels.all_reduce import AllReduceTuning
from stepwire_kernels.tuned_table import tuned_rows

# Of a row of hidden states in every table: 4,096 of bfloat16.
MEASURED_ROW_BYTES = 8192


@dataclass(frozen=True)
class AllReduceChoice:
    """For sums of up to `max_bytes` of one rank's tensor; no tuning: NCCL."""

    max_bytes: int
    tuning: AllReduceTuning | None


def choose(choices: Sequence[AllReduceChoice], num_bytes: int) -> AllReduceTuning | None:
    """What to use for `num_bytes`: the first choice that reaches so far, NCCL beyond the last."""
    for choice in choices:
        if num_bytes <= choice.max_bytes:
            return choice.tuning
    return None


def reach(choices: Sequence[AllReduceChoice], *, stamped: bool = False) -> int:
    """Bytes of the largest sum that goes through mapped memory; `stamped`: in words that carry their round."""
    return max(
        (
            choice.max_bytes
            for choice in choices
            if choice.tuning is not None and not (stamped and choice.tuning.flagged)
        ),
        default=0,
    )


def default_choices(size: int) -> tuple[AllReduceChoice, ...]:
    """Until a device has been measured: bytes through the link are what tells the ways apart."""
    two_shot = size > 2
    return (
        AllReduceChoice((1 << 19) // size, AllReduceTuning()),
        AllReduceChoice((1 << 22) // size, AllReduceTuning(two_shot=two_shot, flagged=True)),
    )


@functools.cache
def all_reduce_choices(device_name: str, size: int, *, has_norm: bool) -> tuple[AllReduceChoice, ...]:
    """The choices for a device as torch names it and a number of ranks, small sums first.

    `has_norm`: with the residual add and RMSNorm, which cost a kernel more beside NCCL.
    """
    kind = "norm" if has_norm else "sum"
    measured = tuned_rows(device_name, "choices", ("ranks", "kind"), "all_reduce")
    rows = [row for row in measured if row["ranks"] == size and row["kind"] == kind]
    if rows:
        found = (
            AllReduceChoice(row["max_bytes"], None if row["way"] == "nccl" else AllReduceTuning(**row["tuning"]))
            for row in rows
        )
        return tuple(sorted(found, key=lambda choice: choice.max_bytes))
    return default_choices(size)
