"""Linears of one to some hundred tokens, 16-bit and float8, each behind a kernel that it waits for.

    python -m load_tests.kernels.tiles MODEL [MODEL ...] [--dtypes bf16 fp8] [--tokens 1 8 32 ...] [--out DIRECTORY]

Times every launch shape of `tile_linear` (and of float8 rows in registers, up to four tokens) against what the tables
and the library do, and writes what wins into tuned/<device>.json: `tile` rows among the `choices` where bfloat16 is
multiplied faster, and the rows of `scaled`: ours, or the library where it was faster. What runs before each product is
the quantization of a small input, as in a step: a launch that fetches weights while it waits gains what it gains there.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from stepwire_kernels.fused_linear import MAX_FUSED_TOKENS, FusedTuning, fused_linear
from stepwire_kernels.linear import linear
from stepwire_kernels.quantize_input import quantize_input
from stepwire_kernels.scaled_linear import scaled_linear
from stepwire_kernels.split_k import LinearWorkspace, allocate_linear_workspace
from stepwire_kernels.tile_linear import TileLinearTuning, tile_linear

from load_tests.kernels.linears import MODELS
from load_tests.kernels.measure import copies, measure_ceilings, time_graph
from load_tests.kernels.sweep import compile_all
from load_tests.kernels.tuned_files import TUNED, Row, write_rows

BF16, FLOAT8 = torch.bfloat16, torch.float8_e4m3fn
DTYPES = {"bf16": BF16, "fp8": FLOAT8}
MULTIPROCESSORS = 132
AHEAD = (0, 512, 1024, 2048)
Tuning = TileLinearTuning | FusedTuning
Launches = list[Callable[[], object]]
Job = tuple[str, int, int, int, Tuning]


def candidates(dtype: str, num_tokens: int, n: int, k: int) -> list[Tuning]:
    """Launch shapes that fill the device and fit it."""
    size = DTYPES[dtype].itemsize
    found: list[Tuning] = []
    if dtype == "fp8" and num_tokens <= MAX_FUSED_TOKENS:
        for block_n, columns, warps in itertools.product((2, 4, 8, 16, 32), (1, 4, 8), (4, 8)):
            steps = -(-k // (512 * columns))
            of_tile, sums = block_n * columns * 4 // warps, block_n * columns * num_tokens // warps
            if columns > warps or block_n * columns < warps or not n // block_n >= 200 or sums > 32:
                continue
            found += [
                FusedTuning(block_n, 512 * columns, warps, ahead)
                for ahead in sorted({min(steps, max(1, wanted // of_tile)) for wanted in (24, 48)})
            ]
    block_m = min(256, max(16, 1 << (num_tokens - 1).bit_length()))
    shapes = [(64, 128, 4, 6), (64, 256, 4, 4), (128, 128, 4, 5), (128, 128, 8, 5), (128, 256, 8, 3), (256, 128, 8, 4)]
    for block, (block_n, row_bytes, warps, stages) in itertools.product({block_m, min(128, block_m)}, shapes):
        if block * block_n > 32768 or (warps == 4 and block * block_n > 16384):
            continue
        programs = -(-n // block_n) * -(-num_tokens // block)
        splits = [split for split in (1, 2, 3, 4, 6, 8) if MULTIPROCESSORS * 0.6 <= programs * split <= 330] or [1]
        splits = [split for split in splits if k // split >= 4 * row_bytes // size][:3] or [1]
        found += [TileLinearTuning(block, block_n, row_bytes // size, split, warps, stages, 0) for split in splits]
    return found


class Case:
    """One linear of a model and its input; `weights`: enough of them that the level-2 cache holds none."""

    def __init__(self, dtype: str, num_tokens: int, weights: Sequence[torch.Tensor], scales: torch.Tensor) -> None:
        self._weights, self._workspace = weights, allocate_linear_workspace("cuda")
        n, k = weights[0].shape
        self._dtype = DTYPES[dtype]
        self._plain = torch.randn(num_tokens, k, device="cuda", dtype=BF16)
        self._values, self._scales = quantize_input(self._plain, FLOAT8)
        self._w_scales, self._out = scales, torch.empty(num_tokens, n, device="cuda", dtype=BF16)

    def launches(self, multiply: Callable[[torch.Tensor, LinearWorkspace], object]) -> Launches:
        def launch(weight: torch.Tensor) -> None:
            quantize_input(self._plain, FLOAT8, pdl=True)
            multiply(weight, self._workspace)

        return [lambda w=w: launch(w) for w in self._weights]

    def of(self, tuning: Tuning) -> Launches:
        is_scaled = self._dtype == FLOAT8
        x = self._values if is_scaled else self._plain
        scales = (self._scales, self._w_scales) if is_scaled else None
        if isinstance(tuning, FusedTuning):
            return self.launches(lambda w, _: fused_linear(x, w, scales=scales, tuning=tuning, out=self._out, pdl=True))
        return self.launches(
            lambda w, space: tile_linear(x, w, None, space, scales=scales, tuning=tuning, out=self._out, pdl=True)
        )

    def others(self) -> dict[str, Launches]:
        """What there is beside these kernels."""
        if self._dtype == BF16:
            return {"table": self.launches(lambda w, space: linear(self._plain, w, workspace=space, pdl=True))}
        x, x_scales, w_scales = self._values, self._scales, self._w_scales
        found = {
            "scaled": self.launches(
                lambda w, space: scaled_linear(x, x_scales, w, w_scales, None, space, BF16, out=self._out, pdl=True)
            )
        }
        for name, fast in (("library", False), ("library fast", True)):
            if x.shape[0] > 16:
                found[name] = self.launches(
                    lambda w, _, fast=fast: torch._scaled_mm(
                        x, w.t(), x_scales, w_scales.t(), out_dtype=BF16, use_fast_accum=fast
                    )
                )
        return found


def compile_one(job: Job) -> None:
    dtype, num_tokens, n, k, tuning = job
    weight = torch.zeros(n, k, device="cuda", dtype=BF16).to(DTYPES[dtype])
    Case(dtype, num_tokens, [weight], torch.ones(n, 1, device="cuda")).of(tuning)[0]()


def measure(models: Sequence[str], dtypes: Sequence[str], token_counts: Sequence[int], top: int, out: Path) -> None:
    shapes = {
        f"{model} {name}": shape
        for model in models
        for name, shape in MODELS[model].items()
        if name not in ("router", "lm_head")
    }
    jobs = [
        (dtype, count, n, k, tuning)
        for dtype, count, (n, k) in itertools.product(dtypes, token_counts, shapes.values())
        for tuning in candidates(dtype, count, n, k)
    ]
    # What is compiled depends on the launch shape and the type, and on no more of the sizes than these.
    kinds = {(dtype, count, n % 16, tuning): job for job in jobs for dtype, count, n, _, tuning in [job]}
    refused = set(kinds.values()) - set(compile_all(compile_one, list(kinds.values())))
    bad = {(dtype, count, tuning) for dtype, count, _, _, tuning in refused}
    ceilings = measure_ceilings()
    print(f"read {ceilings.read_gb_s:.0f} GB/s, bf16 {ceilings.bf16_tflop_s:.0f} TFLOP/s")
    rows: dict[str, list[Row]] = {"bf16": [], "fp8": []}
    for (name, (n, k)), dtype in itertools.product(shapes.items(), dtypes):
        size = DTYPES[dtype].itemsize
        weights = [
            torch.randn(n, k, device="cuda", dtype=BF16).to(DTYPES[dtype]) for _ in range(min(16, copies(n * k * size)))
        ]
        scales = torch.rand(n, 1, device="cuda")
        for count in token_counts:
            case = Case(dtype, count, weights, scales)
            others = {other: _time(launches) for other, launches in case.others().items()}
            mine = {job[4] for job in jobs if job[:4] == (dtype, count, n, k) and (dtype, count, job[4]) not in bad}
            timed = sorted(((_time(case.of(tuning)), tuning) for tuning in mine), key=lambda item: item[0])
            timed = _with_ahead(case, timed)
            floor_us = max(
                n * k * size / ceilings.read_gb_s / 1e3, 2e-6 * count * n * k / ceilings.bf16_tflop_s * size / 2
            )
            print(
                f"{dtype} {name:20s} M={count:3d} floor {floor_us:6.1f} "
                + " ".join(f"{other} {us:.1f}" for other, us in others.items())
                + " | "
                + " | ".join(f"{us:.1f} {_short(tuning)}" for us, tuning in timed[:top]),
                flush=True,
            )
            rows[dtype] += _rows(dtype, count, n, k, others, *timed[0])
        del weights
        torch.cuda.empty_cache()
    target = write_rows(out, **{key: rows[dtype] for key, dtype in (("choices", "bf16"), ("scaled", "fp8"))})
    print(f"{len(rows['bf16'])} + {len(rows['fp8'])} rows written to {target}")


def _time(launches: Launches) -> float:
    return 1e3 * time_graph(launches, target_ms=2, repeats=3)


def _with_ahead(case: Case, timed: list[tuple[float, Tuning]]) -> list[tuple[float, Tuning]]:
    """The best tiles once more, with weights fetched before the wait."""
    tiles = [tuning for _, tuning in timed[:3] if isinstance(tuning, TileLinearTuning)][:2]
    more = [replace(tuning, ahead=ahead) for tuning in tiles for ahead in AHEAD[1:]]
    return sorted([*timed, *((_time(case.of(tuning)), tuning) for tuning in more)], key=lambda item: item[0])


def _rows(
    dtype: str, num_tokens: int, n: int, k: int, others: dict[str, float], us: float, tuning: Tuning
) -> list[Row]:
    best_other = min(others, key=lambda name: others[name])
    row: Row = {"num_tokens": num_tokens, "n": n, "k": k}
    times = {"us": round(us, 2), "others_us": {name: round(value, 2) for name, value in others.items()}}
    if us < 0.98 * others[best_other]:
        kernel = "tile" if isinstance(tuning, TileLinearTuning) else "ahead"
        return [row | {"kernel": kernel, "tuning": asdict(tuning)} | times]
    if dtype == "bf16":
        return []
    return [row | {"kernel": "library", "tuning": {}} | times] if best_other.startswith("library") else []


def _short(tuning: Tuning) -> str:
    kind = "t" if isinstance(tuning, TileLinearTuning) else "r"
    return kind + ",".join(str(value) for value in asdict(tuning).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--top", type=int, default=2, help="how many of the best candidates to print")
    parser.add_argument("--out", type=Path, default=TUNED, help="where the table is written")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    measure(arguments.models, arguments.dtypes, arguments.tokens, arguments.top, arguments.out)


if __name__ == "__main__":
    main()
