"""Launch shapes of bfloat16 linears of few tokens against torch.

    python -m load_tests.kernels.linear_sweep [MODEL ...] [--tokens 1 8 ...] [--out DIRECTORY]

Times every candidate on the models' shapes and writes kernels/stepwire_kernels/tuned/<device>.json: for each shape ours
where it beats torch by 2 % or more. It takes the place of a row of `tiles` or `fused`, so these are measured after. All
other rows stay as they are.

`--check` times what `linear` chooses for models that were not measured, beside torch, and writes nothing.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from stepwire_kernels.gemm import GemvTuning, SkinnyTuning, gemv, has_room, skinny_gemm
from stepwire_kernels.linear import linear
from stepwire_kernels.split_k import LinearWorkspace, allocate_linear_workspace

from load_tests.kernels.linears import MODELS, UNMEASURED
from load_tests.kernels.measure import Ceilings, copies, measure_ceilings, time_graph
from load_tests.kernels.sweep import compile_all
from load_tests.kernels.tuned_files import TUNED, Row, write_rows

BF16 = torch.bfloat16
TOKENS = (1, 2, 4, 8, 16, 32, 64)
Candidate = GemvTuning | SkinnyTuning
GEMV = [
    GemvTuning(n, k, warps)
    for n, k, warps in ((8, 512, 4), (4, 1024, 4), (4, 2048, 8), (8, 1024, 8), (2, 2048, 4), (4, 512, 4), (16, 512, 8))
]
SKINNY = [
    SkinnyTuning(n, k, split, warps, stages)
    for (n, k, warps, stages), split in itertools.product(
        ((64, 128, 4, 4), (64, 128, 4, 5), (64, 256, 4, 3), (128, 128, 8, 4), (32, 256, 4, 3)), (1, 2, 4, 8)
    )
]


def candidates(num_tokens: int) -> Sequence[Candidate]:
    if num_tokens == 1:
        return GEMV
    return [*GEMV, *SKINNY] if num_tokens == 2 else SKINNY


def _launch(x: torch.Tensor, weight: torch.Tensor, tuning: Candidate, workspace: LinearWorkspace) -> torch.Tensor:
    if isinstance(tuning, GemvTuning):
        return gemv(x, weight, tuning=tuning, pdl=True)
    return skinny_gemm(x, weight, None, workspace, tuning=tuning, pdl=True)


def compile_one(payload: tuple[int, Candidate]) -> None:
    num_tokens, tuning = payload
    x, weight = (torch.zeros(rows, 4096, device="cuda", dtype=BF16) for rows in (num_tokens, 512))
    _launch(x, weight, tuning, allocate_linear_workspace("cuda"))


class Shape:
    """One linear; `weights`: enough of them that the level-2 cache holds none."""

    def __init__(self, n: int, k: int) -> None:
        self.n, self.k = n, k
        self.weights = [torch.randn(n, k, device="cuda", dtype=BF16) for _ in range(min(24, copies(n * k * 2)))]

    def ms(self, num_tokens: int, multiply: Callable[[torch.Tensor, torch.Tensor], object]) -> float:
        x = torch.randn(num_tokens, self.k, device="cuda", dtype=BF16)
        return time_graph([lambda w=w: multiply(x, w) for w in self.weights], target_ms=3, repeats=3)

    def share_of_read(self, ms: float, ceilings: Ceilings) -> float:
        return self.n * self.k * 2 / ms / 1e6 / ceilings.read_gb_s


def sweep(models: Sequence[str], token_counts: Sequence[int], top: int, out: Path) -> None:
    works = compile_all(compile_one, [(count, tuning) for count in token_counts for tuning in candidates(count)])
    ceilings = measure_ceilings()
    workspace = allocate_linear_workspace("cuda")
    rows: list[Row] = []
    shapes = [(f"{model} {name}", *shape) for model in models for name, shape in MODELS[model].items()]
    for name, n, k in shapes:
        shape = Shape(n, k)
        for count in token_counts:
            torch_ms = shape.ms(count, torch.nn.functional.linear)
            fitting = [tuning for number, tuning in works if number == count and _fits(n, k, count, tuning, workspace)]
            timed = [
                (shape.ms(count, lambda x, w, t=tuning: _launch(x, w, t, workspace)), tuning) for tuning in fitting
            ]
            timed.sort(key=lambda item: item[0])
            shares = [(shape.share_of_read(ms, ceilings), _short(tuning)) for ms, tuning in timed[:top]]
            shown = " | ".join(f"{share:.0%} {tuning}" for share, tuning in shares)
            share = shape.share_of_read(torch_ms, ceilings)
            print(f"{name:30s} M={count:<2d} torch {torch_ms * 1e3:7.2f} us {share:.0%} | {shown}", flush=True)
            if timed[0][0] < 0.98 * torch_ms:
                rows.append(_row(count, n, k, torch_ms, *timed[0]))
        del shape
        torch.cuda.empty_cache()
    print(f"{len(rows)} rows written to {write_rows(out, choices=rows)}")


def check(models: Sequence[str], token_counts: Sequence[int]) -> None:
    """What `linear` takes for shapes that the table may not name, as a multiple of torch's speed."""
    ceilings = measure_ceilings()
    workspace = allocate_linear_workspace("cuda")
    for model in models:
        for name, (n, k) in UNMEASURED[model].items():
            shape = Shape(n, k)
            shown = []
            for count in token_counts:
                torch_ms = shape.ms(count, torch.nn.functional.linear)
                ms = shape.ms(count, lambda x, w: linear(x, w, workspace=workspace, pdl=True))
                shown.append(f"M={count} {torch_ms / ms:.2f} ({shape.share_of_read(ms, ceilings):.0%})")
            print(f"{model:22s} {name:8s} {n:6d} x {k:5d}: {' '.join(shown)}", flush=True)
            del shape
            torch.cuda.empty_cache()


def _fits(n: int, k: int, num_tokens: int, tuning: Candidate, workspace: LinearWorkspace) -> bool:
    """Whether a split makes sense: enough steps in each part, and room for the partial sums."""
    if isinstance(tuning, GemvTuning) or tuning.split_k == 1:
        return True
    tiles, steps = -(-n // tuning.block_n), -(-k // tuning.block_k)
    makes_sense = steps >= 2 * tuning.split_k and tiles * tuning.split_k <= 1200
    return makes_sense and has_room(workspace, tuning, num_tokens, n)


def _short(tuning: Candidate) -> str:
    return ",".join(str(value) for value in asdict(tuning).values())


def _row(num_tokens: int, n: int, k: int, torch_ms: float, ms: float, tuning: Candidate) -> Row:
    kernel = "gemv" if isinstance(tuning, GemvTuning) else "skinny"
    row: Row = {"num_tokens": num_tokens, "n": n, "k": k, "kernel": kernel, "tuning": asdict(tuning)}
    return row | {"us": round(ms * 1e3, 2), "torch_us": round(torch_ms * 1e3, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"of {', '.join(MODELS)} (default: all)")
    parser.add_argument("--check", action="store_true", help=f"models are of {', '.join(UNMEASURED)}")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--top", type=int, default=3, help="how many of the best candidates to print")
    parser.add_argument("--out", type=Path, default=TUNED, help="where the table is written")
    arguments = parser.parse_args()
    known = UNMEASURED if arguments.check else MODELS
    if unknown := set(arguments.models) - set(known):
        parser.error(f"unknown {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    torch.manual_seed(0)
    if arguments.check:
        check(arguments.models or list(UNMEASURED), arguments.tokens)
    else:
        sweep(arguments.models or list(MODELS), arguments.tokens, arguments.top, arguments.out)


if __name__ == "__main__":
    main()
