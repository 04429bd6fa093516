"""Ranks as processes that share memory at the same addresses, each running the kernels under Triton's interpreter.

    python -m tests.unit.kernels.all_reduce_ranks SIZE usual|all

Prints a JSON line for every case: how far it is from its twin, and whether ranks and ways differ in a bit.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from stepwire_kernels import reference
from stepwire_kernels.all_gather import PART_WORDS, all_gather, deal_rows, gather_buffers, gather_region_words
from stepwire_kernels.all_reduce import (
    AllReduceTuning,
    PeerBuffers,
    all_reduce,
    all_reduce_add_rms_norm,
    peer_buffers,
    region_words,
)
from triton.runtime import interpreter

from tests.unit.kernels.checks import relative_error, repair_interpreter

MAX_ROWS, ROW_WORDS, EPS = 5, 80, 1e-5
# More than one part of a row.
GATHER_COLUMNS = 2 * PART_WORDS + 6
# Rounds of every case: row counts that differ, so that rows are in different rounds.
ROW_COUNTS = (2, 1, 5, 1)


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    columns: int
    tuning: AllReduceTuning
    has_norm: bool
    first_round: int = 0
    is_idle: bool = False
    """Whether other ways have taken all rounds before the first one."""
    stamped_rows: int = MAX_ROWS
    row_counts: tuple[int, ...] = ROW_COUNTS

    @property
    def max_rows(self) -> int:
        return max(self.row_counts)

    def name(self) -> str:
        kind = f"{'two' if self.tuning.two_shot else 'one'}-shot {'flagged' if self.tuning.flagged else 'stamped'}"
        start = f" {'idle until' if self.is_idle else 'from'} round {self.first_round}" if self.first_round else ""
        programs = f" {self.tuning.num_programs} programs" if self.tuning.num_programs else ""
        kind += f" {self.stamped_rows} of {self.max_rows} rows stamped" if self.stamped_rows < self.max_rows else ""
        return f"{self.dtype} {self.columns} {kind} {'norm' if self.has_norm else 'sum'}{programs}{start}"


def cases() -> list[Case]:
    ways = [AllReduceTuning(two_shot, flagged) for two_shot, flagged in itertools.product((False, True), repeat=2)]
    found = [
        Case(dtype, columns, way, has_norm)
        for way in ways
        for dtype, columns, has_norm in ((torch.float32, 33, False), (torch.bfloat16, 66, True))
    ]
    found += [Case(torch.float32, 1, ways[0], has_norm=False), Case(torch.float16, 160, ways[-1], has_norm=True)]
    # Rows that programs share, evenly and not.
    found += [
        Case(torch.bfloat16, 66, replace(way, num_programs=num_programs), has_norm=True)
        for way, num_programs in zip(ways, (2, 1, 3, 2), strict=True)
    ]
    found.append(Case(torch.float32, 33, AllReduceTuning(flagged=True, num_programs=2), has_norm=False))
    # More rows than may go stamped.
    found.append(Case(torch.float32, 33, AllReduceTuning(two_shot=True), has_norm=False, stamped_rows=2))
    # As many rows as a mixed step has tokens, and programs as two on each of an H100's multiprocessors.
    shared = AllReduceTuning(flagged=True, num_programs=264)
    found += [
        Case(torch.bfloat16, 4, way, has_norm=True, row_counts=(300, 1))
        for way in (shared, replace(shared, two_shot=True))
    ]
    # The count of rounds wraps, and may be far from what a row's flags and stamps hold.
    found += [Case(torch.float32, 8, way, has_norm=False, first_round=-2) for way in ways]
    return found + [Case(torch.float32, 8, way, False, first_round=1 - (1 << 31), is_idle=True) for way in ways]


def usual_cases() -> list[Case]:
    """Those that every run has: each way with a norm, each kind of element, shared rows, a count that wraps."""
    every = cases()
    norms = [case for case in every if case.columns == 66 and not case.tuning.num_programs]
    rounds = [case for case in every if case.first_round == -2][1:3]
    return [*norms, every[0], *every[8:11], every[15], *rounds]


def inputs(case: Case, round_: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * round_ + rank)
    return torch.randn(case.row_counts[round_], case.columns, generator=generator).to(case.dtype)


def weights(case: Case) -> torch.Tensor:
    return torch.randn(case.columns, generator=torch.Generator().manual_seed(7)).to(case.dtype)


def run_rank(case: Case, peers: PeerBuffers, results: list[torch.Tensor]) -> None:
    """All rounds of a case on one rank; `results` [2, rows, columns] of each round: outputs and residuals."""
    for round_, rows in enumerate(case.row_counts):
        # One rank is late, another one in the next round.
        time.sleep(0.02 * (round_ % peers.size == peers.rank))
        x = inputs(case, round_, peers.rank)
        if case.has_norm:
            residual = inputs(case, round_, 99)
            all_reduce_add_rms_norm(x, residual, weights(case), EPS, peers, weight_offset=0.5, tuning=case.tuning)
            results[round_][1, :rows] = residual
        else:
            all_reduce(x, peers, tuning=case.tuning)
        results[round_][0, :rows] = x


def twin(case: Case, round_: int, size: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """In float64, rounded where the kernel rounds: the sum, or the normalised sum and the residual."""
    total = torch.zeros(case.row_counts[round_], case.columns)
    for rank in range(size):
        total += inputs(case, round_, rank).float()
    total = total.to(case.dtype)
    if not case.has_norm:
        return total, None
    residual = (inputs(case, round_, 99).float() + total.float()).to(case.dtype)
    weight = weights(case).double()
    return reference.add_rms_norm(residual.double(), None, weight, EPS, weight_offset=0.5), residual


def fork_ranks(size: int, body: Callable[[int], None]) -> list[int]:
    """Call `body` with each rank's number in a process of its own; their exit codes."""
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                body(rank)
                code = 0
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def run_case(case: Case, size: int) -> dict[str, Any]:
    words = region_words(size, case.max_rows, ROW_WORDS, case.stamped_rows)
    regions = [torch.zeros(words, dtype=torch.int64).share_memory_() for _ in range(size)]
    stop = torch.zeros(1, dtype=torch.int32).share_memory_()
    for region in regions if case.first_round and not case.is_idle else ():
        # As it is after so many rounds.
        seen = peer_buffers(0, [region] * size, case.max_rows, ROW_WORDS, stop)
        seen.stamped[0].fill_((case.first_round - 1) << 32)
        seen.flags[0].fill_(case.first_round - 1)
    results = [
        [torch.zeros(2, rows, case.columns, dtype=case.dtype).share_memory_() for rows in case.row_counts]
        for _ in range(size)
    ]

    def body(rank: int) -> None:
        peers = peer_buffers(rank, regions, case.max_rows, ROW_WORDS, stop, case.stamped_rows)
        peers.rounds.fill_(case.first_round)
        run_rank(case, peers, results[rank])

    codes = fork_ranks(size, body)
    errors, same_residuals = [], True
    for round_ in range(len(case.row_counts)):
        expected, residual = twin(case, round_, size)
        errors.append(relative_error(results[0][round_][0], expected))
        same_residuals &= residual is None or torch.equal(results[0][round_][1], residual)
    return {
        "case": case.name(),
        "dtype": str(case.dtype).removeprefix("torch."),
        "exit_codes": codes,
        "error": max(errors),
        "ranks_agree": all(
            torch.equal(mine, other) for rank in results[1:] for mine, other in zip(results[0], rank, strict=True)
        ),
        "same_residuals": same_residuals,
    }


def gather_rank(
    rank: int, size: int, regions: list[torch.Tensor], stop: torch.Tensor, found: torch.Tensor, dealt: torch.Tensor
) -> None:
    """Rounds of a gather and of rows that are dealt out, a sum before each as a step has; what came out of both,
    [rounds, rows, size * columns]: of the second, this rank's rows."""
    gathered = region_words(size, MAX_ROWS, ROW_WORDS)
    peers = peer_buffers(rank, [region[:gathered] for region in regions], MAX_ROWS, ROW_WORDS, stop)
    buffers = gather_buffers(
        rank, [region[gathered:] for region in regions], MAX_ROWS, GATHER_COLUMNS, torch.bfloat16, stop
    )
    for round_, rows in enumerate(ROW_COUNTS):
        time.sleep(0.02 * (round_ % size == rank))
        all_reduce(torch.zeros(1, 2), peers)
        x = torch.full((rows, GATHER_COLUMNS), 10.0 * round_ + rank, dtype=torch.bfloat16)
        found[round_, :rows] = all_gather(x, buffers)
        all_reduce(torch.zeros(1, 2), peers)
        each = -(-rows // size)
        own = deal_rows(x + 100.0, buffers, each)
        dealt[round_, min(rows, rank * each) : min(rows, rank * each) + len(own)] = own


def run_gather(size: int) -> dict[str, Any]:
    words = region_words(size, MAX_ROWS, ROW_WORDS)
    words += gather_region_words(size, MAX_ROWS, GATHER_COLUMNS, torch.bfloat16)
    regions = [torch.zeros(words, dtype=torch.int64).share_memory_() for _ in range(size)]
    stop = torch.zeros(1, dtype=torch.int32).share_memory_()
    shape = (size, len(ROW_COUNTS), MAX_ROWS, size * GATHER_COLUMNS)
    found = torch.full(shape, -1.0, dtype=torch.bfloat16).share_memory_()
    dealt = torch.full(shape, -1.0, dtype=torch.bfloat16).share_memory_()
    codes = fork_ranks(size, lambda rank: gather_rank(rank, size, regions, stop, found[rank], dealt[rank]))
    expected_dealt = torch.full(shape, -1.0, dtype=torch.bfloat16)
    expected = torch.full(shape, -1.0, dtype=torch.bfloat16)
    for round_, rows in enumerate(ROW_COUNTS):
        values = torch.arange(size).repeat_interleave(GATHER_COLUMNS) + 10.0 * round_
        expected[:, round_, :rows] = values.to(torch.bfloat16)
        for row in range(rows):
            expected_dealt[row // -(-rows // size), round_, row] = (values + 100.0).to(torch.bfloat16)
    error = 0.0 if torch.equal(found, expected) and torch.equal(dealt, expected_dealt) else 1.0
    return {
        "case": "gather", "dtype": "bfloat16", "exit_codes": codes, "error": error, "ranks_agree": True,
        "same_residuals": True,
    }  # fmt: skip


def wait_politely() -> None:
    """Have a volatile load, which is what waiting is made of, leave the processor to the rank that is waited for."""
    builder = interpreter.InterpreterBuilder
    load = builder.create_masked_load

    def yielding_load(*arguments: Any) -> Any:
        if arguments[-1]:  # is_volatile
            time.sleep(0.001)
        return load(*arguments)

    builder.create_masked_load = yielding_load


def main() -> None:
    torch.set_num_threads(1)
    repair_interpreter()
    wait_politely()
    for case in {"usual": usual_cases, "all": cases}[sys.argv[2]]():
        print(json.dumps(run_case(case, int(sys.argv[1]))), flush=True)
    print(json.dumps(run_gather(int(sys.argv[1]))), flush=True)


if __name__ == "__main__":
    main()
