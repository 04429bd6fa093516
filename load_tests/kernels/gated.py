"""Gate and up of five to some hundred tokens with the gate behind them in one launch, against two.

    python -m load_tests.kernels.gated MODEL [MODEL ...] [--tokens 8 16 32 64 128] [--out DIRECTORY]

Times every launch shape behind the norm that it waits for in a step and writes what wins by at least one hundredth into
tuned/<device>.json, list `gated`. A whole step may still lose by it (`load_tests.gpu.step_bench` before and after):
where a tile's stages filled the shared memory, attention came to its memory later (Qwen3-0.6B, 64 rows).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from stepwire_kernels.activation import gated_activation
from stepwire_kernels.linear import linear
from stepwire_kernels.norm import add_rms_norm
from stepwire_kernels.split_k import LinearWorkspace, allocate_linear_workspace
from stepwire_kernels.tile_linear import TileLinearTuning, tile_linear

from load_tests.kernels.linears import MODELS
from load_tests.kernels.measure import copies, measure_ceilings, time_graph
from load_tests.kernels.sweep import compile_all
from load_tests.kernels.tuned_files import TUNED, Row, write_rows

BF16 = torch.bfloat16
AHEAD = (512, 1024, 2048)
Launches = list[Callable[[], object]]
Job = tuple[int, TileLinearTuning]

# A warpgroup multiplies 64 rows of each half at least.
TILES = [(128, 64, 4, 6), (128, 128, 4, 3), (128, 128, 4, 4), (128, 64, 8, 6), (128, 128, 8, 4), (256, 64, 8, 4),
         (256, 128, 8, 2), (256, 128, 8, 3)]  # fmt: skip


def candidates(num_tokens: int) -> list[TileLinearTuning]:
    block_m = max(16, 1 << (num_tokens - 1).bit_length())
    return [
        TileLinearTuning(block_m, block_n, block_k, 1, warps, stages, 0)
        for block_n, block_k, warps, stages in TILES
        if block_m * block_n <= 128 * 256
    ]


class Case:
    """gate_up of a model; `weights`: enough of them that the level-2 cache holds none."""

    def __init__(self, num_tokens: int, weights: Sequence[torch.Tensor]) -> None:
        n, k = weights[0].shape
        self._weights = weights
        self._workspace = allocate_linear_workspace("cuda")
        self._x, self._residual = (torch.randn(num_tokens, k, device="cuda", dtype=BF16) for _ in range(2))
        self._gain, self._normed = torch.randn(k, device="cuda", dtype=BF16), torch.empty_like(self._x)
        self._out = torch.empty(num_tokens, n // 2, device="cuda", dtype=BF16)

    def _launches(self, multiply: Callable[[torch.Tensor, LinearWorkspace], object]) -> Launches:
        def launch(weight: torch.Tensor) -> None:
            add_rms_norm(self._x, self._residual, self._gain, 1e-5, out=self._normed, pdl=True)
            multiply(weight, self._workspace)

        return [lambda w=w: launch(w) for w in self._weights]

    def together(self, tuning: TileLinearTuning) -> Launches:
        return self._launches(
            lambda w, space: tile_linear(
                self._normed, w, None, space, activation="silu", tuning=tuning, out=self._out, pdl=True
            )
        )

    def apart(self) -> Launches:
        """What a step launches otherwise."""
        return self._launches(
            lambda w, space: gated_activation(linear(self._normed, w, workspace=space, pdl=True), "silu", pdl=True)
        )


def compile_one(job: Job) -> None:
    num_tokens, tuning = job
    Case(num_tokens, [torch.zeros(512, 1024, device="cuda", dtype=BF16)]).together(tuning)[0]()


def measure(models: Sequence[str], token_counts: Sequence[int], top: int, out: Path) -> None:
    jobs = [(count, tuning) for count in token_counts for tuning in candidates(count)]
    compiled = set(compile_all(compile_one, jobs))
    ceilings = measure_ceilings()
    print(f"read {ceilings.read_gb_s:.0f} GB/s")
    rows: list[Row] = []
    for model in models:
        n, k = MODELS[model]["gate_up"]
        weights = [torch.randn(n, k, device="cuda", dtype=BF16) for _ in range(min(28, copies(n * k * 2)))]
        for count in token_counts:
            case = Case(count, weights)

            def timed(tuning: TileLinearTuning, case: Case = case) -> tuple[float, TileLinearTuning]:
                return time_graph(case.together(tuning), target_ms=3, repeats=3), tuning

            apart = time_graph(case.apart(), target_ms=4, repeats=3)
            found = sorted((timed(tuning) for number, tuning in compiled if number == count), key=_ms)
            best = [tuning for _, tuning in found[:2]]
            found += [timed(replace(tuning, ahead=ahead)) for tuning, ahead in itertools.product(best, AHEAD)]
            found.sort(key=_ms)
            share = 100 * n * k * 2 / 1e6 / ceilings.read_gb_s
            shown = " | ".join(f"{ms * 1e3:.2f} us {share / ms:.0f}% {_shown(tuning)}" for ms, tuning in found[:top])
            print(f"{model:14s} M={count:<3d} apart {apart * 1e3:.2f} us, together {shown}", flush=True)
            if found[0][0] < 0.99 * apart:
                rows.append(_row(count, n, k, apart, *found[0]))
        del weights
        torch.cuda.empty_cache()
    print(f"{len(rows)} rows written to {write_rows(out, gated=rows)}")


def _ms(timed: tuple[float, TileLinearTuning]) -> float:
    return timed[0]


def _shown(tuning: TileLinearTuning) -> str:
    return "/".join(str(value) for value in asdict(tuning).values())


def _row(num_tokens: int, n: int, k: int, apart_ms: float, ms: float, tuning: TileLinearTuning) -> Row:
    row: Row = {"num_tokens": num_tokens, "n": n, "k": k, "tuning": asdict(tuning)}
    return row | {"us": round(ms * 1e3, 2), "apart_us": round(apart_ms * 1e3, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=[model for model in MODELS if "gate_up" in MODELS[model]])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--top", type=int, default=3, help="how many of the best candidates to print")
    parser.add_argument("--out", type=Path, default=TUNED, help="where the table is written")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    measure(arguments.models, arguments.tokens, arguments.top, arguments.out)


if __name__ == "__main__":
    main()
