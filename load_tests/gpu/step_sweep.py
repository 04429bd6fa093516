"""Launch shapes judged by whole steps: what wins alone, or in a chain of linears, need not win beside attention.

    python -m load_tests.gpu.step_sweep --shape qwen3-0.6b [--batch-sizes 1 32] [--quantization fp8]
        [--places attention o down qkv gate_up gate] [--out DIRECTORY]

For one batch size after another and one place of a layer after another, every candidate is put into the table that the
worker reads, the step's graph is captured anew, and its device time is measured. A candidate that is faster by more
than `MARGIN`, twice, stays for the places that follow. What was found is written into tuned/<device>.json (rows with
`step_us` and `step_before_us`); for attention it is only printed, since its launch shapes are rules, not tables.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from stepwire_kernels import attention_from_qkv, fused_linear, gated_choice, linear, scaled_choice
from stepwire_kernels.attention_from_qkv import FromQkvTuning
from stepwire_kernels.fused_linear import FusedTuning
from stepwire_kernels.gemm import SkinnyTuning
from stepwire_kernels.split_k import allocate_linear_workspace
from stepwire_kernels.tile_linear import TileLinearTuning, tile_linear

from gpu_worker.cuda.runner import CudaRunner
from gpu_worker.cuda.step_graphs import GraphKey, GraphKind, StepGraphs
from load_tests.gpu.step_bench import CONTEXT, fill_cache, load, measure_steps
from load_tests.kernels import fused, linear_sweep
from load_tests.kernels.linears import MODELS, Linears
from load_tests.kernels.measure import measure_ceilings
from load_tests.kernels.sweep import compile_all
from load_tests.kernels.tuned_files import TUNED, Row, write_rows

MARGIN = 0.003
FEW_TOKENS = fused_linear.MAX_FUSED_TOKENS
# Registers of a thread that may hold weights, and programs that a device is to get.
MOST_HELD, PROGRAMS = 128, (128, 256, 512, 1024, 2048)
PLACES = ("attention", "o", "down", "qkv", "gate_up", "gate")
FLOAT8 = torch.float8_e4m3fn

Tuning = FusedTuning | SkinnyTuning | TileLinearTuning | FromQkvTuning
KERNEL_NAMES = {FusedTuning: "ahead", SkinnyTuning: "skinny", TileLinearTuning: "tile"}


@dataclass(frozen=True)
class Place:
    """One launch of every layer, and where its launch shape is kept."""

    name: str
    candidates: Sequence[Tuning]
    put: Callable[[Tuning], None]
    restore: Callable[[], None]
    table: str | None = None
    """The list of the device's file that its rows belong to; None: it has none."""
    key: tuple[int, int, int] = (0, 0, 0)  # tokens, N, K
    gated: bool | None = None

    def row(self, tuning: Tuning, step_us: float, before_us: float) -> Row:
        num_tokens, n, k = self.key
        row: Row = {"num_tokens": num_tokens, "n": n, "k": k}
        if self.gated is not None:
            row["gated"] = self.gated
        if self.table in ("choices", "scaled"):
            row["kernel"] = KERNEL_NAMES[type(tuning)]
        return row | {
            "tuning": asdict(tuning),
            "step_us": round(step_us, 1),
            "step_before_us": round(before_us, 1),
        }


def held_candidates(n: int, k: int, item_size: int, num_rows: int) -> Iterator[FusedTuning]:
    """Shapes of few tokens: all that a program multiplies on its way before the wait, or as much as registers hold.

    n: outputs; `num_rows`: rows of the weight for each.
    """
    seen = set()
    for programs, (warps, block_k) in itertools.product(PROGRAMS, ((4, 1024), (8, 1024), (8, 2048))):
        block_n = 1 << max(n // programs, 1).bit_length() - 1
        block_k = min(block_k, 1 << (k - 1).bit_length())
        steps = -(-k // block_k)
        of_tile = max(1, block_n * num_rows * block_k * item_size // (4 * 32 * warps))  # registers of a thread
        for ahead in {min(steps, most // of_tile) for most in (MOST_HELD // 4, MOST_HELD)}:
            tuning = FusedTuning(block_n, block_k, warps, ahead)
            if ahead and tuning not in seen:
                seen.add(tuning)
                yield tuning


def tile_candidates(num_tokens: int, n: int, k: int, item_size: int) -> Iterator[TileLinearTuning]:
    """Tiles by descriptor that are as large as the tokens, in as many parts as fill the device."""
    block_m = max(16, num_tokens)
    if num_tokens % block_m or block_m > 128:
        return
    for block_n, stages, split_k in itertools.product((64, 128), (3, 4, 5), (1, 2, 4)):
        block_k = 128 // item_size * 2
        programs = -(-n // block_n) * split_k
        if programs <= 1200 and k // block_k >= 2 * split_k and (split_k == 1 or programs <= 300):
            yield TileLinearTuning(block_m, block_n, block_k, split_k, 4, stages, 512)


def takes_gate(tile: TileLinearTuning) -> bool:
    """Half of a tile's rows are gate's: fewer than 64 are no tile of Hopper's matrix units."""
    return tile.split_k == 1 and tile.block_n >= 128


def attention_candidates() -> list[FromQkvTuning]:
    """Few rows: chunks added up by a launch of its own, or by whoever finishes last."""
    own = [(16, 4), (16, 8), (32, 2), (32, 4), (16, 2), (64, 2), (64, 4)]
    return [*(FromQkvTuning(tokens, warps, adds_up=True) for tokens, warps in own), FromQkvTuning(32, 2)]


class Step:
    """Decodes of one batch size: its graph is captured anew whenever a launch shape has changed."""

    def __init__(self, runner: CudaRunner, shape: str, batch_size: int) -> None:
        self._runner, self._shape, self._batch_size = runner, shape, batch_size

    def us(self) -> float:
        """Device time of a step."""
        runner = self._runner
        assert runner._graphs is not None
        linear.choose_linear.cache_clear()
        runner._graphs = StepGraphs(runner._graphs._stream)
        runner._eager_uses.clear()
        runner._attempted.clear()
        key = GraphKey(runner._planner.decode_shape(self._batch_size), GraphKind.PLAIN)
        runner._run_unseen([key.shape])
        runner._capture(key)
        if runner._graphs.get(key) is None:
            raise RuntimeError("the step was not captured")
        return measure_steps(runner, self._shape, self._batch_size).details["device_ms"] * 1e3


def table_place(
    name: str,
    table: str,
    entries: dict[Any, Any],
    key: tuple[Any, ...],
    candidates: Sequence[Tuning],
    gated: bool | None = None,
) -> Place:
    before = entries.get(key)

    def restore() -> None:
        if before is None:
            entries.pop(key, None)
        else:
            entries[key] = before

    wanted = [tuning for tuning in dict.fromkeys(candidates) if tuning != before]
    return Place(name, wanted, lambda tuning: entries.update({key: tuning}), restore, table, key[:3], gated)


def places(linears: Linears, names: Sequence[str], num_tokens: int, is_float8: bool) -> list[Place]:
    """Of a layer, in the order asked for."""
    found = []
    for name in names:
        if name == "attention" and num_tokens <= FEW_TOKENS:
            found.append(attention_place())
        elif name == "gate" and is_float8 and num_tokens > FEW_TOKENS and "gate_up" in linears:
            found.append(float8_gate_place(num_tokens, *linears["gate_up"]))
        elif name in linears:
            find = float8_place if is_float8 else few_place if num_tokens <= FEW_TOKENS else many_place
            found.append(find(name, num_tokens, *linears[name]))
    return found


def float8_place(name: str, num_tokens: int, n: int, k: int) -> Place:
    if name == "o" and num_tokens == 1 and n * k <= scaled_choice.MAX_HELD_BYTES:
        return held_place(n, k)
    is_few = num_tokens <= FEW_TOKENS
    tunings: list[Tuning] = [*(held_candidates(n, k, 1, 1) if is_few else tile_candidates(num_tokens, n, k, 1))]
    entries = scaled_choice.load_scaled_table(torch.cuda.get_device_name(0))
    return table_place(name, "scaled", entries, (num_tokens, n, k), tunings)


def float8_gate_place(num_tokens: int, n: int, k: int) -> Place:
    """Gate and product of many tokens in one launch, instead of a gate in the launch that quantizes."""
    whole = [tile for tile in tile_candidates(num_tokens, n, k, 1) if takes_gate(tile)]
    entries = scaled_choice.load_scaled_gated_table(torch.cuda.get_device_name(0))
    return table_place("gate", "scaled_gated", entries, (num_tokens, n, k), whole)


def few_place(name: str, num_tokens: int, n: int, k: int) -> Place:
    device = torch.cuda.get_device_name(0)
    if name in ("o", "down"):
        tunings = list(held_candidates(n, k, 2, 1))
        return table_place(name, "choices", linear.load_table(device), (num_tokens, n, k), tunings)
    is_gated = name == "gate_up"
    num_rows = 2 if is_gated else 1
    tunings = list(held_candidates(n // num_rows, k, 2, num_rows))
    entries = fused_linear.load_fused_table(device)
    return table_place(name, "fused", entries, (num_tokens, n, k, is_gated), tunings, is_gated)


def many_place(name: str, num_tokens: int, n: int, k: int) -> Place:
    device, key = torch.cuda.get_device_name(0), (num_tokens, n, k)
    tiles = list(tile_candidates(num_tokens, n, k, 2))
    if name == "gate_up":
        whole = [tile for tile in tiles if takes_gate(tile)]
        return table_place(name, "gated", gated_choice.load_gated_table(device), key, whole)
    workspace = allocate_linear_workspace("cuda")
    skinny = [each for each in linear_sweep.SKINNY if linear_sweep._fits(n, k, num_tokens, each, workspace)]
    return table_place(name, "choices", linear.load_table(device), key, [*skinny, *tiles])


def attention_place() -> Place:
    before = attention_from_qkv.default_from_qkv_tuning

    def put(tuning: Tuning) -> None:
        assert isinstance(tuning, FromQkvTuning)
        few = tuning

        def chosen(
            num_runs: int, num_heads: int, num_kv_heads: int, head_dim: int, item_size: int = 2
        ) -> FromQkvTuning:
            is_few = attention_from_qkv.is_few(num_runs, num_heads, num_kv_heads)
            return few if is_few else before(num_runs, num_heads, num_kv_heads, head_dim, item_size)

        attention_from_qkv.default_from_qkv_tuning = chosen

    def restore() -> None:
        attention_from_qkv.default_from_qkv_tuning = before

    return Place("attention", attention_candidates(), put, restore)


def held_place(n: int, k: int) -> Place:
    """o of one token in float8, which quantizes its inputs itself (`choose_quantizing`)."""
    before = scaled_choice._HELD

    def put(tuning: Tuning) -> None:
        assert isinstance(tuning, FusedTuning)
        scaled_choice._HELD = tuning

    whole = [each for each in held_candidates(n, k, 1, 1) if each.ahead * each.block_k >= k and each != before]
    return Place("o", whole, put, lambda: put(before), key=(1, n, k))


def compile_one(payload: tuple[tuple[int, int, int], Tuning, bool]) -> None:
    """Launch one linear's candidate once, on a weight of as many inputs."""
    (num_tokens, n, k), tuning, is_float8 = payload
    dtype = FLOAT8 if is_float8 else torch.bfloat16
    rows = min(n, 512)
    if isinstance(tuning, SkinnyTuning):
        linear_sweep.compile_one((num_tokens, tuning))
    elif isinstance(tuning, TileLinearTuning):
        x, weight = (torch.zeros(count, k, device="cuda").to(dtype) for count in (num_tokens, rows))
        scales = (torch.ones(num_tokens, device="cuda"), torch.ones(rows, device="cuda")) if is_float8 else None
        workspace = allocate_linear_workspace("cuda")
        for activation in (None, "silu") if tuning.split_k == 1 else (None,):
            tile_linear(
                x, weight, None, workspace, activation=activation, scales=scales, out_dtype=torch.bfloat16,
                tuning=tuning, pdl=True,
            )  # fmt: skip
    elif isinstance(tuning, FusedTuning) and not is_float8:
        for has_norm, gated in ((True, False), (True, True), (False, False)):
            fused.compile_one((fused.Work(rows, k, has_norm, gated), num_tokens, tuning))


def sweep(step: Step, found: Sequence[Place]) -> dict[str, list[Row]]:
    """Put the fastest candidate of each place into its table; rows of those that won."""
    rows: dict[str, list[Row]] = {}
    base = min(step.us(), step.us())
    print(f"{base:9.1f} us as it is", flush=True)
    for place in found:
        timed: list[tuple[float, Tuning]] = []
        for tuning in place.candidates:
            place.put(tuning)
            try:
                timed.append((step.us(), tuning))
            except Exception as error:  # (a candidate that does not compile or fit is a result)
                print(f"          {place.name} {_short(tuning)} left out: {type(error).__name__}: {str(error)[:90]}")
        timed.sort(key=lambda item: item[0])
        shown = " | ".join(f"{us:.1f} {_short(tuning)}" for us, tuning in timed[:4])
        place.restore()
        if timed and timed[0][0] < base * (1 - MARGIN):
            again = min(step.us(), step.us())
            place.put(timed[0][1])
            best = min(step.us(), step.us())
            if best < again * (1 - MARGIN):
                if place.table is not None:
                    rows.setdefault(place.table, []).append(place.row(timed[0][1], best, again))
                print(
                    f"{best:9.1f} us with {place.name} {_short(timed[0][1])}, {again:.1f} without: {shown}", flush=True
                )
                base = best
                continue
            place.restore()
        print(f"{base:9.1f} us, {place.name} stays: {shown}", flush=True)
    return rows


def _short(tuning: Tuning) -> str:
    return f"{KERNEL_NAMES.get(type(tuning), '')}{','.join(str(value) for value in asdict(tuning).values())}"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m load_tests.gpu.step_sweep", description=__doc__)
    parser.add_argument("--shape", required=True, choices=sorted(MODELS))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--quantization", default="auto", help="of the weights: auto or fp8")
    parser.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES))
    parser.add_argument("--out", type=Path, default=TUNED, help="where the table is written")
    args = parser.parse_args(argv)
    is_float8 = args.quantization == "fp8"
    linears = MODELS[args.shape]
    of_batch = {size: places(linears, args.places, size, is_float8) for size in args.batch_sizes}
    payloads = [
        (place.key, tuning, is_float8)
        for found in of_batch.values()
        for place in found
        if place.key[0]
        for tuning in place.candidates
    ]
    compile_all(compile_one, list(dict.fromkeys(payloads)))
    ceilings = measure_ceilings()
    print(f"read {ceilings.read_gb_s:.0f} GB/s, bf16 {ceilings.bf16_tflop_s:.0f} TFLOP/s", flush=True)
    torch.cuda.empty_cache()
    extra = {"kv_cache_dtype": "auto", "enforce_eager": False, "quantization": args.quantization}
    runner, _ = load(args.shape, 9216, extra)
    fill_cache(runner, max(args.batch_sizes) * (2 * CONTEXT // runner.describe().block_size + 2) + 2)
    rows: dict[str, list[Row]] = {}
    for size, found in of_batch.items():
        print(f"-- {args.shape} {args.quantization} b{size}", flush=True)
        for table, won in sweep(Step(runner, args.shape, size), found).items():
            rows.setdefault(table, []).extend(won)
    args.out.mkdir(parents=True, exist_ok=True)
    if rows:
        print(f"{sum(map(len, rows.values()))} rows written to {write_rows(args.out, **rows)}")
    runner.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
