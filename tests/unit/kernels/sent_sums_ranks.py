"""Ranks as forked processes that share memory: sums of summands that were sent, what test_sent_sums.py starts.

    python -m tests.unit.kernels.sent_sums_ranks SIZE

Prints a JSON line for every case: whether ranks had the sum's bits, in every round.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from stepwire_kernels import reference
from stepwire_kernels.sent_sums import (
    Piece,
    SentBuffers,
    add_sent,
    add_sent_rms_norm,
    send,
    sent_buffers,
    sent_region_words,
)

from tests.unit.kernels.all_reduce_ranks import EPS, fork_ranks, wait_politely
from tests.unit.kernels.checks import TOLERANCE, relative_error, repair_interpreter

WORDS = 80
# First rows of a round's pieces, and the last one's end. Never the same rows in two rounds that share a place.
ROUNDS = ((0, 3, 4), (0, 1, 2, 3), (0, 2), (0, 1, 4), (0, 4))


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    columns: int
    has_norm: bool
    first_round: int = 1

    def name(self) -> str:
        return f"{self.dtype} {self.columns} {'norm' if self.has_norm else 'sum'} from round {self.first_round}"


def cases() -> list[Case]:
    return [
        Case(torch.float32, 17, has_norm=False),
        Case(torch.bfloat16, 34, has_norm=True),
        Case(torch.float16, 40, has_norm=True),
        # The count of rounds passes the largest int32, and wraps.
        Case(torch.float32, 8, has_norm=True, first_round=(1 << 31) - 2),
        Case(torch.float32, 8, has_norm=False, first_round=(1 << 32) - 2),
    ]


def inputs(case: Case, round_: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * round_ + rank)
    return torch.randn(ROUNDS[round_][-1], case.columns, generator=generator).to(case.dtype)


def weights(case: Case) -> torch.Tensor:
    return torch.randn(case.columns, generator=torch.Generator().manual_seed(7)).to(case.dtype)


def run_rank(case: Case, buffers: SentBuffers, results: list[torch.Tensor]) -> None:
    """`results` [2, rows, columns] of each round: outputs and residuals."""
    for round_, bounds in enumerate(ROUNDS):
        # One rank is late, another one in the next round.
        time.sleep(0.02 * (round_ % buffers.size == buffers.rank))
        x, residual = inputs(case, round_, buffers.rank), inputs(case, round_, 99)
        pieces = [Piece(case.first_round + round_, number, first) for number, first in enumerate(bounds[:-1])]
        parts = [slice(first, last) for first, last in itertools.pairwise(bounds)]
        for piece, rows in zip(pieces, parts, strict=True):
            send(x[rows], buffers, piece)
        for piece, rows in zip(pieces, parts, strict=True):
            if case.has_norm:
                add_sent_rms_norm(x[rows], residual[rows], weights(case), EPS, buffers, piece, weight_offset=0.5)
            else:
                add_sent(x[rows], buffers, piece)
        results[round_][0], results[round_][1] = x, residual


def twin(case: Case, round_: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum, or its norm in float64; and the residual."""
    total, residual = torch.zeros(ROUNDS[round_][-1], case.columns), inputs(case, round_, 99)
    for rank in range(size):
        total += inputs(case, round_, rank).float()
    total = total.to(case.dtype)
    if not case.has_norm:
        return total, residual
    residual = (residual.float() + total.float()).to(case.dtype)
    return reference.add_rms_norm(residual.double(), None, weights(case).double(), EPS, weight_offset=0.5), residual


def run_case(case: Case, size: int) -> dict[str, Any]:
    regions = [torch.zeros(sent_region_words(size, WORDS), dtype=torch.int64).share_memory_() for _ in range(size)]
    stop = torch.zeros(1, dtype=torch.int32).share_memory_()
    results = [
        [torch.zeros(2, bounds[-1], case.columns, dtype=case.dtype).share_memory_() for bounds in ROUNDS]
        for _ in range(size)
    ]
    codes = fork_ranks(size, lambda rank: run_rank(case, sent_buffers(rank, regions, WORDS, stop), results[rank]))
    wrong = []
    for round_ in range(len(ROUNDS)):
        expected, residual = twin(case, round_, size)
        got = results[0][round_]
        # Sums are added up in float32 in rank order: exactly this.
        is_right = relative_error(got[0], expected) <= (TOLERANCE[case.dtype] if case.has_norm else 0.0)
        agree = all(torch.equal(got, other[round_]) for other in results[1:])
        if not (is_right and agree and torch.equal(got[1], residual)):
            wrong.append(round_)
    return {"case": case.name(), "exit_codes": codes, "wrong_rounds": wrong}


def main() -> None:
    torch.set_num_threads(1)
    repair_interpreter()
    wait_politely()
    for case in cases():
        print(json.dumps(run_case(case, int(sys.argv[1]))), flush=True)


if __name__ == "__main__":
    main()
