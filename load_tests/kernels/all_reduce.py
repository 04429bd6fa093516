"""Sums over ranks, NCCL against mapped memory: `python -m load_tests.kernels.all_reduce [bench|sweep|large]`.

Prints microseconds of one call, in a CUDA graph of many: the sum alone, and the sum with the residual add and RMSNorm.
`sweep` also writes kernels/stepwire_kernels/tuned/all_reduce/<device>.json, by which a server chooses; `large` measures
sums of 256 rows and more alone, those of mixed steps, and writes them where smaller ones have been. Needs PYTHONPATH to
hold `.`, `proto` and `kernels`, and as many CUDA devices as ranks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from stepwire_kernels.all_gather import all_gather, deal_rows
from stepwire_kernels.all_reduce import AllReduceTuning, all_reduce, all_reduce_add_rms_norm
from stepwire_kernels.norm import add_rms_norm
from stepwire_kernels.tuned_table import tuned_rows

from gpu_worker.cuda.compiling import compile_in_parallel
from load_tests.kernels.measure import RESULTS, commit
from load_tests.kernels.ranks import LOGITS, Rank, capture, run_ranks

TUNED = Path(__file__).resolve().parents[2] / "kernels" / "stepwire_kernels" / "tuned" / "all_reduce"
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
HIDDEN = (4096, 8192)
LARGE_TOKENS, LARGE_HIDDEN = (256, 384, 512, 768, 1024, 2048, 4096), (4096, 5120)
CALLS, REPLAYS, REPEATS = 32, 10, 5
# Bytes; sums below are those of decodes.
SMALLEST_LARGE = 2 * LARGE_TOKENS[0] * HIDDEN[0]
# Of a kernel that shares rows out: one, two and four on each of an H100's multiprocessors.
PROGRAMS = (0, 132, 264, 528)
WAYS = {
    f"{'two' if two_shot else 'one'}-shot {'flagged' if flagged else 'stamped'}": AllReduceTuning(two_shot, flagged)
    for two_shot, flagged in itertools.product((False, True), repeat=2)
}


@dataclass(frozen=True)
class Sizes:
    tokens: int
    hidden: int

    @property
    def num_bytes(self) -> int:
        return 2 * self.tokens * self.hidden


def launches(rank: Rank, sizes: Sizes, tunings: dict[str, AllReduceTuning]) -> dict[str, Callable[[], Any]]:
    """Everything that is timed at one size, by "<kind> <way>"; bfloat16."""
    shape = (sizes.tokens, sizes.hidden)
    x, residual = (torch.zeros(shape, dtype=torch.bfloat16, device=rank.device) for _ in range(2))
    weight = torch.ones(sizes.hidden, dtype=torch.bfloat16, device=rank.device)
    found: dict[str, Callable[[], Any]] = {
        "sum nccl": lambda: rank.nccl.all_reduce(x),
        "norm nccl": lambda: add_rms_norm(rank.nccl.all_reduce(x), residual, weight, 1e-5, out=x, pdl=True),
    }
    for name, tuning in tunings.items():
        found[f"sum {name}"] = lambda tuning=tuning: all_reduce(x, rank.peers, tuning=tuning, pdl=True)
        found[f"norm {name}"] = lambda tuning=tuning: all_reduce_add_rms_norm(
            x, residual, weight, 1e-5, rank.peers, tuning=tuning, pdl=True
        )
    return found


def time_together(rank: Rank, launch: Callable[[], Any], calls: int = CALLS, replays: int = REPLAYS) -> float:
    """Microseconds of one call; every rank measures the same number of calls, since each waits for the others."""

    def launch_many() -> None:
        for _ in range(calls):
            launch()

    graph = capture(launch_many)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(REPEATS):
        graph.replay()
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / (replays * calls))
    # NCCL's communicator does not end before the graphs that hold it.
    del graph
    return sorted(times)[REPEATS // 2]


def warm_up(rank: Rank, tunings: dict[str, AllReduceTuning], hidden_sizes: Sequence[int] = HIDDEN) -> None:
    """Compile every kernel at once; those of NCCL are launched meanwhile, and add up zeros."""
    # Rows are shared out where there are more of them than programs.
    num_tokens = 1 + min((tuning.num_programs for tuning in tunings.values() if tuning.num_programs), default=0)
    with compile_in_parallel():
        for hidden in hidden_sizes:
            for launch in launches(rank, Sizes(num_tokens, hidden), tunings).values():
                launch()
    torch.cuda.synchronize()


def measure(
    rank: Rank, sizes: Sizes, tunings: dict[str, AllReduceTuning], calls: int = CALLS, replays: int = REPLAYS
) -> dict[str, float]:
    found = launches(rank, sizes, tunings)
    return {name: time_together(rank, launch, calls, replays) for name, launch in found.items()}


def bench(rank: Rank) -> None:
    warm_up(rank, WAYS)
    names = ["nccl", *WAYS]
    if rank.rank == 0:
        print(f"us a call, {rank.size} ranks, {torch.cuda.get_device_name()}: sum, then sum + add + RMSNorm")
        print(f"{'tokens x hidden':>16s} {'KB':>6s} " + " ".join(f"{name:>18s}" for name in names), flush=True)
    rows = []
    for hidden, tokens in itertools.product(HIDDEN, TOKENS):
        sizes = Sizes(tokens, hidden)
        times = measure(rank, sizes, WAYS)
        cells = " ".join(f"{times[f'sum {name}']:8.2f} {times[f'norm {name}']:9.2f}" for name in names)
        if rank.rank == 0:
            print(f"{tokens:8d} x {hidden:5d} {sizes.num_bytes // 1024:6d} {cells}", flush=True)
        rows.append({"kernel": "all_reduce", "tokens": tokens, "hidden": hidden, "ranks": rank.size, "us": times})
    bench_logits(rank)
    if rank.rank == 0:
        context = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "commit": commit(),
            "command": " ".join(["python -m load_tests.kernels.all_reduce", *sys.argv[1:]]),
        }
        with RESULTS.open("a") as file:
            file.writelines(json.dumps({**row, **context}) + "\n" for row in rows)


def bench_logits(rank: Rank) -> None:
    """Logits of a split vocabulary, with a sum before each call, whose time is taken off."""
    x = torch.zeros(1, 64, dtype=torch.bfloat16, device=rank.device)
    for rows in (1, 32, 256):
        part = torch.zeros(rows, LOGITS // rank.size, dtype=torch.bfloat16, device=rank.device)

        def with_sum(gather: Callable[..., torch.Tensor], part: torch.Tensor = part) -> float:
            def launch() -> None:
                all_reduce(x, rank.peers, pdl=True)
                gather(part)

            return time_together(rank, launch)

        alone = time_together(rank, lambda: all_reduce(x, rank.peers, pdl=True))
        nccl = with_sum(rank.nccl.all_gather) - alone
        ours = with_sum(lambda part: all_gather(part, rank.gather, pdl=True)) - alone
        each = -(-rows // rank.size)
        dealt_nccl = with_sum(lambda part, each=each: rank.nccl.deal_rows(part, each)) - alone
        dealt = with_sum(lambda part, each=each: deal_rows(part, rank.gather, each, pdl=True)) - alone
        if rank.rank == 0:
            print(
                f"logits of {rows:4d} rows: nccl {nccl:8.2f} us, mapped memory {ours:8.2f} us; dealt out: "
                f"nccl {dealt_nccl:8.2f} us, mapped memory {dealt:8.2f} us",
                flush=True,
            )


def sweep(rank: Rank, out: Path) -> None:
    """The fastest way for each size, NCCL among them."""
    tunings = {
        f"{name}, {num_warps} warps": AllReduceTuning(tuning.two_shot, tuning.flagged, num_warps)
        for name, tuning in WAYS.items()
        for num_warps in (8, 16)
    }
    warm_up(rank, tunings)
    choices = []
    for tokens in TOKENS:
        sizes = Sizes(tokens, HIDDEN[0])
        choices += best_choices(rank, sizes, tunings, measure(rank, sizes, tunings))
    choices = [choice for choice in choices if choice["max_bytes"] < SMALLEST_LARGE] + large_choices(rank)
    if rank.rank == 0:
        write_table(choices, torch.cuda.get_device_name(), out)


def sweep_large(rank: Rank, out: Path) -> None:
    """Those of a complete table that only steps with prompts have."""
    choices = large_choices(rank)
    name = torch.cuda.get_device_name()
    known = tuned_rows(name, "choices", ("ranks", "kind"), "all_reduce")
    smaller = [row for row in known if row["ranks"] == rank.size and row["max_bytes"] < SMALLEST_LARGE]
    if rank.rank == 0 and smaller:
        write_table(smaller + choices, name, out)
    elif rank.rank == 0:
        print(f"no table is written: smaller sums of {rank.size} ranks were not measured here; `sweep` measures all")


def large_choices(rank: Rank) -> list[dict[str, Any]]:
    """The fastest way for sums of 256 rows and more, all of them flagged."""
    tunings = {
        f"{'two' if two_shot else 'one'}-shot, {num_programs or 'row'} programs, {num_warps} warps": AllReduceTuning(
            two_shot, flagged=True, num_warps=num_warps, num_programs=num_programs
        )
        for two_shot, num_programs, num_warps in itertools.product((False, True), PROGRAMS, (8, 16))
    }
    begun = time.monotonic()
    warm_up(rank, tunings, LARGE_HIDDEN)
    if rank.rank == 0:
        print(f"us a call, {rank.size} ranks, {torch.cuda.get_device_name()}")
        print(f"compiled in {time.monotonic() - begun:.0f} s", flush=True)
    choices: list[dict[str, Any]] = []
    for hidden, tokens in itertools.product(LARGE_HIDDEN, LARGE_TOKENS):
        sizes = Sizes(tokens, hidden)
        # Larger sums need fewer calls for as many microseconds.
        found = best_choices(rank, sizes, tunings, measure(rank, sizes, tunings, calls=16, replays=4))
        if hidden == HIDDEN[0]:
            choices += found
    return choices


def best_choices(
    rank: Rank, sizes: Sizes, tunings: dict[str, AllReduceTuning], times: dict[str, float]
) -> list[dict[str, Any]]:
    """The table's rows for one size, as this rank measured it; rank 0 prints its own, beside the best of others."""
    choices = []
    for kind in ("sum", "norm"):
        mine = {name.removeprefix(f"{kind} "): us for name, us in times.items() if name.startswith(kind)}
        best = min(mine, key=lambda name: mine[name])
        choice: dict[str, Any] = {"ranks": rank.size, "kind": kind, "max_bytes": sizes.num_bytes}
        choice |= {"way": best} if best == "nccl" else {"way": "peers", "tuning": asdict(tunings[best])}
        choices.append(choice | {"us": round(mine[best], 2), "nccl_us": round(mine["nccl"], 2)})
        if rank.rank == 0:
            beside = " ".join(
                f"{shots} {min(us for name, us in mine.items() if name.startswith(shots)):.2f}"
                for shots in ("one-shot", "two-shot")
            )
            size = f"{kind:4s} {sizes.tokens:4d} x {sizes.hidden}"
            print(f"{size}: {best} {mine[best]:.2f} us; nccl {mine['nccl']:.2f} {beside}", flush=True)
    return choices


def write_table(choices: list[dict[str, Any]], device_name: str, out: Path) -> None:
    """Those of other numbers of ranks stay."""
    device = re.sub(r"^NVIDIA ", "", device_name)
    target = out / f"{device.lower().replace(' ', '_')}.json"
    sizes = {choice["ranks"] for choice in choices}
    if target.exists():
        choices += [row for row in json.loads(target.read_text())["choices"] if row["ranks"] not in sizes]
    lines = ",\n".join("  " + json.dumps(choice) for choice in choices)
    target.write_text(f'{{"device": "{device}", "dtype": "bfloat16", "choices": [\n{lines}\n]}}\n')
    print(f"{len(choices)} choices written to {target}")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["bench", "sweep", "large"], default="bench")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, default=TUNED, help="where `sweep` writes its table")
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)

    def body(rank: Rank) -> None:
        if arguments.what == "bench":
            bench(rank)
        else:
            {"sweep": sweep, "large": sweep_large}[arguments.what](rank, arguments.out)

    run_ranks("load_tests.kernels.all_reduce", argv, arguments.ranks, body, max(HIDDEN))


if __name__ == "__main__":
    main(sys.argv[1:])
