"""Linears of few tokens with their norm and gate in one launch, against separate launches.

    python -m load_tests.kernels.fused MODEL [MODEL ...] [--tokens 1 2 4] [--out DIRECTORY]

Times every launch shape in a chain of a model's layers (each launch waits for the one before, as in a decode step) and
writes what wins into tuned/<device>.json: `fused` rows where norm, product and gate were faster together, `ahead` rows
among the `choices` where a product alone was.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from stepwire_kernels.activation import gated_activation
from stepwire_kernels.fused_linear import FusedTuning, NormInput, fused_linear
from stepwire_kernels.linear import linear
from stepwire_kernels.norm import add_rms_norm
from stepwire_kernels.split_k import LinearWorkspace, allocate_linear_workspace

from load_tests.kernels.linears import MODELS
from load_tests.kernels.measure import copies, measure_ceilings, time_graph
from load_tests.kernels.sweep import compile_all
from load_tests.kernels.tuned_files import TUNED, Row, write_rows

BF16 = torch.bfloat16
Launches = list[Callable[[], object]]


@dataclass(frozen=True)
class Work:
    """One linear of a layer."""

    n: int
    k: int
    has_norm: bool
    gated: bool

    @classmethod
    def of(cls, name: str, n: int, k: int) -> Work:
        return cls(n, k, has_norm=name in ("qkv", "gate_up", "router"), gated=name == "gate_up")

    def candidates(self, num_tokens: int) -> list[FusedTuning]:
        """Launch shapes whose weights on the way and sums fit into registers, and that fill the device."""
        rows_of = 2 if self.gated else 1
        found = []
        for block_n, columns, warps in itertools.product((1, 2, 4, 8, 16), (1, 4, 8), (4, 8)):
            if columns > warps or block_n * columns < warps:
                continue
            block_k = 256 * columns
            steps = -(-self.k // block_k)
            # Of a thread, for one tile: registers of weights, and sums.
            of_tile, sums = (block_n * rows_of * columns * per // warps for per in (4, num_tokens))
            programs = self.n // rows_of // block_n
            if sums > 16 or programs < min(200, self.n // rows_of):
                continue
            # All that a program multiplies, or as much of it as registers hold.
            found += [
                FusedTuning(block_n, block_k, warps, ahead)
                for ahead in sorted({min(steps, wanted // of_tile) for wanted in (24, 40, 64)})
                if ahead > 0
            ]
        return found


def fused_launches(work: Work, num_tokens: int, weights: Sequence[torch.Tensor], tuning: FusedTuning) -> Launches:
    x, residual, gain = _inputs(work, num_tokens)
    norm = NormInput(residual, gain, 1e-5) if work.has_norm else None
    out = torch.empty(num_tokens, work.n // (2 if work.gated else 1), device="cuda", dtype=BF16)
    total = torch.empty_like(x)
    return [
        lambda w=weight: fused_linear(
            x, w, norm=norm, activation="silu" if work.gated else None, tuning=tuning, out=out, residual_out=total,
            pdl=True,
        )
        for weight in weights
    ]  # fmt: skip


def separate_launches(
    work: Work, num_tokens: int, weights: Sequence[torch.Tensor], workspace: LinearWorkspace
) -> Launches:
    """What a step launches otherwise."""
    x, residual, gain = _inputs(work, num_tokens)
    normed = torch.empty_like(x)

    def launch(weight: torch.Tensor) -> None:
        if work.has_norm:
            add_rms_norm(x, residual, gain, 1e-5, out=normed, pdl=True)
        y = linear(normed if work.has_norm else x, weight, workspace=workspace, pdl=True)
        if work.gated:
            gated_activation(y, "silu", pdl=True)

    return [lambda w=weight: launch(w) for weight in weights]


def _inputs(work: Work, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, residual = (torch.randn(num_tokens, work.k, device="cuda", dtype=BF16) for _ in range(2))
    return x, residual, torch.randn(work.k, device="cuda", dtype=BF16)


def compile_one(payload: tuple[Work, int, FusedTuning]) -> None:
    work, num_tokens, tuning = payload
    weight = torch.zeros(64, work.k, device="cuda", dtype=BF16)
    small = Work(64, work.k, work.has_norm, work.gated)
    fused_launches(small, num_tokens, [weight], tuning)[0]()


def measure(models: Sequence[str], token_counts: Sequence[int], top: int, out: Path) -> None:
    works = {
        f"{model} {name}": Work.of(name, n, k)
        for model in models
        for name, (n, k) in MODELS[model].items()
        if name != "lm_head"
    }
    jobs = [
        (work, count, tuning) for work in works.values() for count in token_counts for tuning in work.candidates(count)
    ]
    compiled = compile_all(compile_one, list(dict.fromkeys(jobs)))
    ceilings = measure_ceilings()
    print(f"read {ceilings.read_gb_s:.0f} GB/s")
    workspace = allocate_linear_workspace("cuda")
    fused: list[Row] = []
    plain: list[Row] = []
    for name, work in works.items():
        moved = work.n * work.k * 2
        weights = [torch.randn(work.n, work.k, device="cuda", dtype=BF16) for _ in range(min(28, copies(moved)))]
        for count in token_counts:
            apart = time_graph(separate_launches(work, count, weights, workspace), target_ms=4, repeats=3)
            timed = [
                (time_graph(fused_launches(work, count, weights, tuning), target_ms=3, repeats=3), tuning)
                for job_work, job_count, tuning in compiled
                if (job_work, job_count) == (work, count)
            ]
            timed.sort(key=lambda item: item[0])
            shown = " | ".join(
                f"{ms * 1e3:.2f} us {100 * moved / ms / 1e6 / ceilings.read_gb_s:.0f}% "
                f"n{tuning.block_n} k{tuning.block_k} w{tuning.num_warps} a{tuning.ahead}"
                for ms, tuning in timed[:top]
            )
            print(f"{name:22s} M={count} apart {apart * 1e3:6.2f} us, together {shown}", flush=True)
            if timed and timed[0][0] < 0.99 * apart:
                (fused if work.has_norm else plain).append(_row(work, count, apart, *timed[0]))
        del weights
        torch.cuda.empty_cache()
    print(f"{len(fused)} + {len(plain)} rows written to {write_rows(out, fused=fused, choices=plain)}")


def _row(work: Work, num_tokens: int, apart_ms: float, ms: float, tuning: FusedTuning) -> Row:
    row: Row = {"num_tokens": num_tokens, "n": work.n, "k": work.k}
    row |= {"gated": work.gated} if work.has_norm else {"kernel": "ahead"}
    return row | {"tuning": asdict(tuning), "us": round(ms * 1e3, 2), "apart_us": round(apart_ms * 1e3, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=list(MODELS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--top", type=int, default=4, help="how many of the best candidates to print")
    parser.add_argument("--out", type=Path, default=TUNED, help="where the table is written")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    measure(arguments.models, arguments.tokens, arguments.top, arguments.out)


if __name__ == "__main__":
    main()
