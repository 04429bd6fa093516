"""Two ranks on two devices hold the sums over mapped memory against NCCL and float64: what test_all_reduce.py starts.

    python -m tests.gpu.all_reduce_ranks

Rank 0 prints a JSON line for every check: its name and what it found, the empty string where all was well. A rank that
found something says so before it waits for the other, which may be left alone in a sum by then. Every rank says on
stderr which check it begins and, within some, where it stands; one that needs longer than ALL_REDUCE_CHECK_LIMIT_S for
a check (60 s) prints the stacks of its threads and ends.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence

import torch
from stepwire_kernels import reference
from stepwire_kernels.all_gather import all_gather, deal_rows
from stepwire_kernels.all_reduce import AllReduceTuning, all_reduce, all_reduce_add_rms_norm
from stepwire_kernels.norm import add_rms_norm
from stepwire_kernels.sent_sums import sent_buffers, sent_region_words

from gpu_worker.cuda.compiling import compile_in_parallel
from gpu_worker.cuda.early_sums import EarlySums
from gpu_worker.parallel.peer_memory import map_peers
from load_tests.kernels.ranks import LOGITS, Rank, capture, run_ranks
from tests.unit.kernels.checks import TOLERANCE, relative_error

WAYS = [AllReduceTuning(two_shot, flagged) for two_shot, flagged in itertools.product((False, True), repeat=2)]
SHAPES = ((1, 4096), (3, 576), (5, 2), (17, 4098), (64, 8192), (256, 4096))
# Mixed steps, with a program for each row and with fewer.
LARGE_SHAPES = ((257, 4096), (512, 5120), (1024, 4096), (2048, 4096))
LARGE_WAYS = [
    AllReduceTuning(two_shot, flagged=True, num_warps=num_warps, num_programs=num_programs)
    for two_shot in (False, True)
    for num_warps, num_programs in ((16, 0), (8, 264), (16, 132))
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HIDDEN = 8192
# About a millisecond on the device.
LATE_CYCLES = 2_000_000
EPS = 1e-5


def random(rank: Rank, shape: tuple[int, int], dtype: torch.dtype, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator(rank.device).manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, device=rank.device)).to(dtype)


def say(rank: Rank, what: str) -> None:
    """Where this rank stands, for whoever looks at a visit that did not end."""
    print(f"{time.strftime('%T')} rank {rank.rank}: {what}", file=sys.stderr, flush=True)


def of_all(rank: Rank, x: torch.Tensor) -> torch.Tensor:
    """Every rank's x: [size, *x.shape]."""
    return rank.nccl.all_gather(x.reshape(1, -1)).view(rank.size, *x.shape)


def against_nccl_and_twin(rank: Rank) -> str:
    for tuning, shape, dtype in itertools.product(WAYS, SHAPES, DTYPES):
        if shape[1] * dtype.itemsize % 4:
            continue
        mine = random(rank, shape, dtype, 100 + rank.rank)
        parts = of_all(rank, mine)
        # Added up in float32 in rank order: exactly this.
        expected = parts.float().sum(0).to(dtype) if rank.size == 2 else None
        got = all_reduce(mine.clone(), rank.peers, tuning=tuning)
        nccl = rank.nccl.all_reduce(mine.clone())
        if expected is not None and not torch.equal(got, expected):
            return f"{tuning} {shape} {dtype}: not the rounded sum"
        if relative_error(got, nccl) > TOLERANCE[dtype]:
            return f"{tuning} {shape} {dtype}: {relative_error(got, nccl)} from NCCL"
        if not all(torch.equal(got, other) for other in of_all(rank, got)):
            return f"{tuning} {shape} {dtype}: ranks differ"
    return ""


def norm_against_twin(rank: Rank) -> str:
    for tuning, shape, dtype, offset in itertools.product(WAYS, SHAPES, DTYPES, (0.0, 1.0)):
        mine = random(rank, shape, dtype, 200 + rank.rank)
        residual, weight = random(rank, shape, dtype, 7, 3.0), random(rank, (1, shape[1]), dtype, 8)[0]
        total = of_all(rank, mine).float().sum(0).to(dtype)
        sums = (residual.float() + total.float()).to(dtype)
        twin = reference.add_rms_norm(sums.double(), None, weight.double(), EPS, weight_offset=offset)
        got = all_reduce_add_rms_norm(
            mine, residual, weight, EPS, rank.peers, weight_offset=offset, tuning=tuning, pdl=True
        )
        error = relative_error(got, twin)
        if not error <= TOLERANCE[dtype]:
            return f"{tuning} {shape} {dtype}: relative error {error}"
        if not torch.equal(residual, sums):
            return f"{tuning} {shape} {dtype}: another residual"
    return ""


def _bank(rank: Rank, count: int, shape: tuple[int, int]) -> torch.Tensor:
    """Small whole numbers: their sums are exact in bfloat16, so a stale row shows in any way of adding."""
    generator = torch.Generator(rank.device).manual_seed(300 + rank.rank)
    return torch.randint(-40, 41, (count, *shape), generator=generator, device=rank.device).bfloat16()


def large_sums(rank: Rank) -> str:
    """Sums of more rows than a device runs programs, and those with a norm, against NCCL's gather and the twin."""
    with compile_in_parallel():
        for tuning, (rows, columns) in itertools.product(LARGE_WAYS, LARGE_SHAPES[1:]):
            x, weight = (
                torch.zeros(shape, dtype=torch.bfloat16, device=rank.device) for shape in ((rows, columns), columns)
            )
            all_reduce(x, rank.peers, tuning=tuning, pdl=True)
            all_reduce_add_rms_norm(x, x.clone(), weight, EPS, rank.peers, tuning=tuning, pdl=True)
    for tuning, shape in itertools.product(LARGE_WAYS, LARGE_SHAPES):
        mine = random(rank, shape, torch.bfloat16, 900 + rank.rank)
        # In rank order.
        total = of_all(rank, mine).float().sum(0).bfloat16()
        got = all_reduce(mine.clone(), rank.peers, tuning=tuning, pdl=True)
        if rank.size == 2 and not torch.equal(got, total):
            return f"{tuning} {shape}: not the rounded sum"
        if relative_error(got, total) > TOLERANCE[torch.bfloat16]:
            return f"{tuning} {shape}: {relative_error(got, total)} from the sum"
        if not all(torch.equal(got, other) for other in of_all(rank, got)):
            return f"{tuning} {shape}: ranks differ"
        residual, weight = (
            random(rank, shape, torch.bfloat16, 7, 3.0),
            random(rank, (1, shape[1]), torch.bfloat16, 8)[0],
        )
        sums = (residual.float() + got.float()).bfloat16()
        twin = reference.add_rms_norm(sums.double(), None, weight.double(), EPS)
        normed = all_reduce_add_rms_norm(mine, residual, weight, EPS, rank.peers, tuning=tuning, pdl=True)
        if not relative_error(normed, twin) <= TOLERANCE[torch.bfloat16] or not torch.equal(residual, sums):
            return f"{tuning} {shape}: relative error {relative_error(normed, twin)} with a norm, or another residual"
    return ""


def thousands_of_rounds(
    rank: Rank,
    *,
    is_late: bool,
    replays: int,
    calls: int = 40,
    sizes: Sequence[int] = (1, 8, 256, 2, 33, 1, 1, 128),
    ways: Sequence[AllReduceTuning] = WAYS,
) -> str:
    """Replays of a graph of calls of all ways and many sizes; with `is_late`, one rank or the other begins late."""
    bank = _bank(rank, calls, (max(sizes), 1024))
    out = torch.zeros_like(bank)

    def launch() -> None:
        # Other numbers in every replay.
        bank.copy_(torch.where(bank > 30, -40, bank + 1))
        out.copy_(bank)
        for call in range(calls):
            rows = out[call, : sizes[call % len(sizes)]]
            all_reduce(rows, rank.peers, tuning=ways[(call * 7 // 3) % len(ways)], pdl=True)

    graph = capture(launch)
    wrong = torch.zeros((), dtype=torch.int64, device=rank.device)
    for replay in range(replays):
        if is_late and replay % 3 == rank.rank:
            torch.cuda._sleep(LATE_CYCLES * (1 + replay % 4))
        if is_late and replay % 7 == rank.rank:
            time.sleep(0.01)
        graph.replay()
        if replay % 10 == 0:
            expected = rank.nccl.all_reduce(bank.clone())
            for call in range(calls):
                rows = sizes[call % len(sizes)]
                wrong += (out[call, :rows] != expected[call, :rows]).sum()
    torch.cuda.synchronize()
    return f"{int(wrong)} wrong elements after {replays * calls} rounds" if int(wrong) else ""


def chained_norms(rank: Rank) -> str:
    """The chain of a decoder: fused against NCCL and a separate norm, then the same bits in a graph with late ranks."""
    shape = (8, 4096)
    weight = random(rank, (1, shape[1]), torch.bfloat16, 8)[0]
    start = random(rank, shape, torch.bfloat16, 400 + rank.rank)

    def chain(fused: bool) -> tuple[torch.Tensor, torch.Tensor]:
        residual = random(rank, shape, torch.bfloat16, 9)
        x = start.clone()
        for layer in range(64):
            if fused:
                tuning = WAYS[layer % len(WAYS)]
                x = all_reduce_add_rms_norm(x, residual, weight, EPS, rank.peers, tuning=tuning, pdl=True)
            else:
                x = add_rms_norm(rank.nccl.all_reduce(x), residual, weight, EPS, out=x)
            # What ranks hold differs again.
            x = x * (0.5 + rank.rank)
        return x, residual

    separate, expected = chain(fused=False), chain(fused=True)
    # Both round to bfloat16 64 times, after sums of squares in another order.
    if relative_error(expected[1], separate[1]) > 2 * TOLERANCE[torch.bfloat16]:
        return f"{relative_error(expected[1], separate[1])} from NCCL and the separate norm"
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    x, residual = start.clone(), random(rank, shape, torch.bfloat16, 9)
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for layer in range(64):
            tuning = WAYS[layer % len(WAYS)]
            x.copy_(all_reduce_add_rms_norm(x, residual, weight, EPS, rank.peers, tuning=tuning, pdl=True))
            x.mul_(0.5 + rank.rank)
    for replay in range(40):
        if replay % 3 == rank.rank:
            torch.cuda._sleep(LATE_CYCLES)
        x.copy_(start)
        residual.copy_(random(rank, shape, torch.bfloat16, 9))
        graph.replay()
        for got, wanted in zip((x, residual), expected, strict=True):
            if not torch.equal(got, wanted):
                return f"replay {replay}: {relative_error(got, wanted)} from the same without a graph"
    return ""


def logits_against_nccl(rank: Rank) -> str:
    """Gathers in a graph, a sum before each as a step has, late ranks included."""
    columns, problem = LOGITS // rank.size, ""
    for rows in (1, 3, 256):
        x = random(rank, (rows, columns), torch.bfloat16, 500 + rank.rank)
        small = torch.zeros(1, 64, dtype=torch.bfloat16, device=rank.device)
        out = torch.empty(rows, LOGITS, dtype=torch.bfloat16, device=rank.device)

        def launch(x: torch.Tensor = x, small: torch.Tensor = small, out: torch.Tensor = out) -> None:
            for _ in range(4):
                all_reduce(small, rank.peers, pdl=True)
                x.mul_(-1)
                out.copy_(all_gather(x, rank.gather, pdl=True))

        graph = capture(launch)
        say(rank, f"{rows} rows of logits are captured")
        wrong = torch.zeros((), dtype=torch.int64, device=rank.device)
        for replay in range(60):
            if replay % 3 == rank.rank:
                torch.cuda._sleep(LATE_CYCLES)
            x.copy_(random(rank, (rows, columns), torch.bfloat16, 600 + 2 * replay + rank.rank))
            graph.replay()
            if replay % 5 == 0:
                wrong += (out != rank.nccl.all_gather(x)).sum()
        # What is still under way must not run beside the next size's first call, on another stream.
        torch.cuda.synchronize()
        say(rank, f"{rows} rows of logits are gathered")
        if int(wrong):
            problem += f"{rows} rows: {int(wrong)} elements are not what NCCL gathers. "
    return problem


def dealt_rows(rank: Rank) -> str:
    """This rank's rows of what NCCL gathers, by mapped memory in a graph and by NCCL itself; late ranks included."""
    columns, problem = LOGITS // rank.size, ""
    for rows in (1, 33, 256):
        each = -(-rows // rank.size)
        own = slice(min(rows, rank.rank * each), min(rows, rank.rank * each + each))
        x = random(rank, (rows, columns), torch.bfloat16, 700 + rank.rank)
        small = torch.zeros(1, 64, dtype=torch.bfloat16, device=rank.device)
        out = torch.empty(own.stop - own.start, LOGITS, dtype=torch.bfloat16, device=rank.device)

        def launch(x: torch.Tensor = x, small: torch.Tensor = small, out: torch.Tensor = out, each: int = each) -> None:
            for _ in range(4):
                all_reduce(small, rank.peers, pdl=True)
                x.mul_(-1)
                out.copy_(deal_rows(x, rank.gather, each, pdl=True))

        graph = capture(launch)
        say(rank, f"{rows} dealt rows are captured")
        wrong = torch.zeros((), dtype=torch.int64, device=rank.device)
        for replay in range(30):
            if replay % 3 == rank.rank:
                torch.cuda._sleep(LATE_CYCLES)
            x.copy_(random(rank, (rows, columns), torch.bfloat16, 800 + 2 * replay + rank.rank))
            graph.replay()
            if replay % 5 == 0:
                expected = rank.nccl.all_gather(x)[own]
                wrong += (out != expected).sum() + (rank.nccl.deal_rows(x, each) != expected).sum()
        torch.cuda.synchronize()
        if int(wrong):
            problem += f"{rows} rows: {int(wrong)} elements are not what NCCL gathers. "
    return problem


def sums_begun_early(rank: Rank) -> str:
    """Pieces that are sent as they come, with each of the orders that this needs broken where a device could: rows that
    are late, copies that are late, and a late rank."""
    columns, sizes = 4096, (2048, 300, 1, 2048, 777)
    words = max(sizes) * columns // 2
    memory = map_peers(rank.group, rank.device, range(rank.size), sent_region_words(rank.size, words), "early sums")
    if memory is None:
        return "no memory is mapped"
    buffers = sent_buffers(rank.rank, memory.regions, words, rank.peers.stop)
    early = EarlySums(buffers, rank.device, min_rows=1, num_pieces=3, multiple=64, held=memory)
    bank, weight = _bank(rank, 4, (max(sizes), columns)), random(rank, (1, columns), torch.bfloat16, 8)[0]
    # Before: nothing but the sums themselves may bring ranks together.
    totals = torch.stack([of_all(rank, each).float().sum(0).bfloat16() for each in bank])
    wrong = torch.zeros((), dtype=torch.int64, device=rank.device)
    worst = torch.zeros((), device=rank.device)
    for round_ in range(150):
        source, total = (each[round_ % len(bank), : sizes[round_ % len(sizes)]] for each in (bank, totals))
        x = torch.full_like(source, -99.0)
        residual = random(rank, (len(x), columns), torch.bfloat16, round_, 3.0)
        pieces = early.pieces(len(x), columns * x.element_size())
        if early.stream is not None and round_ % 4 == rank.rank:
            # An end that did not wait for this rank's own copies would overwrite what they have yet to read.
            with torch.cuda.stream(early.stream):
                torch.cuda._sleep(LATE_CYCLES)
        for rows in pieces:
            if round_ % 3 == rank.rank:
                # A copy that did not wait for the rows would bring those before them.
                torch.cuda._sleep(LATE_CYCLES)
            x[rows].copy_(source[rows])
            early.begin(x, rows)
        if round_ % 5 == rank.rank:
            torch.cuda._sleep(LATE_CYCLES)
        if round_ % 2:
            for rows in pieces if round_ % 4 == 1 else (slice(0, len(x)),):
                early.end(x[rows])
            wrong += (x != total).sum()
        else:
            twin = residual.clone()
            normed = add_rms_norm(total, twin, weight, EPS)
            early.end_add_norm(x, residual, weight, EPS, 0.0)
            wrong += (residual != twin).sum()
            worst = torch.maximum(worst, (x.float() - normed.float()).norm() / normed.float().norm())
    torch.cuda.synchronize()
    if int(wrong):
        return f"{int(wrong)} wrong elements"
    # Both kernels' norms add squares up in orders of their own.
    return "" if float(worst) <= TOLERANCE[torch.bfloat16] else f"{float(worst)} from the separate norm"


def stop_ends_waiting(rank: Rank) -> str:
    """Rank 0 calls what nobody else does, and is told to stop. The last check: rounds are out of step after."""
    if rank.rank != 0:
        return ""
    for tuning in WAYS:
        rank.peers.stop.zero_()
        all_reduce(torch.zeros(2, 64, device=rank.device), rank.peers, tuning=tuning)
        time.sleep(0.2)
        if torch.cuda.current_stream().query():
            return f"{tuning} did not wait for its peer"
        rank.peers.stop.fill_(1)
        begun = time.monotonic()
        while not torch.cuda.current_stream().query():
            if time.monotonic() - begun > 20:
                return f"{tuning} waits on after it was told to stop"
            time.sleep(0.01)
    return ""


CHECKS: dict[str, Callable[[Rank], str]] = {
    "against nccl and twin": against_nccl_and_twin,
    "norm against twin": norm_against_twin,
    "thousands of rounds": lambda rank: thousands_of_rounds(rank, is_late=False, replays=200),
    "a late rank": lambda rank: thousands_of_rounds(rank, is_late=True, replays=100),
    "large sums": large_sums,
    "rounds of all sizes": lambda rank: thousands_of_rounds(
        rank, is_late=True, replays=60, calls=20, sizes=(1, 512, 8, 2048, 1024, 33, 300), ways=[*LARGE_WAYS, *WAYS]
    ),
    "chained norms in a graph": chained_norms,
    "logits against nccl": logits_against_nccl,
    "dealt rows": dealt_rows,
    "sums begun early": sums_begun_early,
    "stop ends waiting": stop_ends_waiting,
}


def run_checks(rank: Rank) -> None:
    only = os.environ.get("ALL_REDUCE_CHECKS", "")  # names, separated by commas, for a short visit
    limit_s = float(os.environ.get("ALL_REDUCE_CHECK_LIMIT_S", "60"))
    for name, check in CHECKS.items():
        if only and name not in only.split(","):
            continue
        begun = time.monotonic()
        say(rank, f"{name} begins")
        # On every rank: which of them waits for what tells them apart.
        faulthandler.dump_traceback_later(limit_s, exit=True)
        problem = check(rank)
        line = {"check": name, "rank": rank.rank, "seconds": round(time.monotonic() - begun, 1)}
        if problem:
            # Now: its peers may wait for it in the middle of the check, and then it waits for them below.
            print(json.dumps(line | {"problem": problem}), flush=True)
        torch.cuda.synchronize()
        is_sound = rank.group.least([int(not problem)]) == [1]
        faulthandler.cancel_dump_traceback_later()
        if rank.rank == 0 and not problem:
            print(json.dumps(line | {"problem": "" if is_sound else "another rank's"}), flush=True)
        if not is_sound:
            return


if __name__ == "__main__":
    run_ranks("tests.gpu.all_reduce_ranks", sys.argv[1:], 2, run_checks, HIDDEN)
