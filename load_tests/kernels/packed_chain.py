"""Few tokens through packed int4 linears, alone and one after another as in a layer: what is fastest in the chain?

    python -m load_tests.kernels.packed_chain [--model llama-3.1-8b] [--tokens 1 2 4 8 16] [--out DIRECTORY]

A kernel that is the fastest alone need not be so between others, whose memory and registers it takes while they wait
for each other. Every launch shape is checked against the float64 twin and timed alone; then, beginning with the
shapes of the table and with those that won alone, each linear of a layer tries the best of its shapes between the
others. Prints both, and writes what won in the chain as rows for `tuned/packed`. `--kernels wgmma --tokens 256`: the
same for more tokens.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
from stepwire_kernels import reference
from stepwire_kernels.activation import gated_activation
from stepwire_kernels.norm import add_rms_norm
from stepwire_kernels.packed_choice import choose_linear
from stepwire_kernels.packed_in_flight import InFlightTuning, shared_memory
from stepwire_kernels.packed_linear import KERNEL_NAMES, Tuning, packed_linear
from stepwire_kernels.packed_ring import RingTuning
from stepwire_kernels.packed_ring import shared_memory as shared_memory_of_ring
from stepwire_kernels.packed_weight import PackedWeight, unpack, weight_format
from stepwire_kernels.packed_wgmma import WgmmaTuning
from stepwire_kernels.split_k import LinearWorkspace, allocate_linear_workspace

from load_tests.kernels.linears import MODELS, Linears
from load_tests.kernels.measure import measure_ceilings, time_graph
from load_tests.kernels.quantized import bf16_ms, packed_candidates, packed_weight
from load_tests.kernels.sweep import compile_all
from load_tests.kernels.tuned_files import TUNED, show_choices

BF16 = torch.bfloat16
KIND = "int4-g128"
LAYERS = 4
# Of a multiprocessor: bytes, of which each program takes 1 KiB more than it asks for, and 32-bit registers.
SHARED_MEMORY, REGISTERS = 228 << 10, 1 << 16
MULTIPROCESSORS = 132
Choices = dict[str, Tuning]


def in_flight_candidates(n: int, k: int, count: int) -> Iterator[InFlightTuning]:
    """Launch shapes for so many tokens: programs of 24 to 112 KiB that fill the device, two to four of them beside."""
    pairs, blocks = -(-k // 128), -(-n // 16)
    for warps, parts, row_blocks in product((4, 8, 16), (1, 2, 4, 7, 14), (1, 2, 3, 4, 6, 8)):
        steps = -(-pairs // (warps * parts))
        used = shared_memory(InFlightTuning(row_blocks, warps, steps))
        programs = -(-blocks // row_blocks) * parts
        idle = warps * parts * steps - pairs
        # Inputs come from level 2: no more bytes of them than of weights. Parts are added up again.
        if 4 * row_blocks < count or (count <= 4 and parts * 16 > pairs):
            continue
        if not 24 << 10 <= used <= 113 << 10 or programs < 120 or 8 * idle > pairs or steps > 14:
            continue
        # A thread keeps scales of all its rows and steps.
        for beside in (2, 3, 4):
            registers = REGISTERS // (32 * warps * beside) // 8 * 8
            fits = beside * (used + 1024) <= SHARED_MEMORY and row_blocks * steps <= (24 if beside == 2 else 12)
            if fits and registers >= (64 if count <= 8 and warps == 16 else 80):
                yield InFlightTuning(row_blocks, warps, steps, min(steps, 2), registers if registers < 255 else 0)


def ring_candidates(n: int, k: int, count: int) -> Iterator[RingTuning]:
    """Launch shapes that fill the device once, by one to four programs a multiprocessor: with all of its shared memory
    and registers, or with half of them, so that the next kernel's find room beside them."""
    pairs, blocks = -(-k // 128), -(-n // 16)
    for warps, steps, row_blocks, beside in product((4, 8, 16), (1, 2, 3, 4, 5, 7), (1, 2), (1, 2, 4)):
        parts = -(-pairs // (warps * steps))
        max_columns = MULTIPROCESSORS * beside // parts
        idle = parts * warps * steps - pairs
        # A thread has 16 registers of inputs for each step, or 32.
        if (
            parts > max(2, pairs // 16)
            or 16 * idle > pairs
            or warps * beside not in (8, 16)
            or steps * (1 if count <= 8 else 2) > 7
        ):
            continue
        turns = -(-blocks // (row_blocks * max_columns))
        columns = -(-blocks // (row_blocks * turns))
        if columns * parts < 0.7 * MULTIPROCESSORS * beside:
            continue
        for share in (1, 2) if beside <= 2 else (1,):
            registers = REGISTERS // (32 * warps * beside * share) // 8 * 8
            one = shared_memory_of_ring(RingTuning(columns, row_blocks, warps, steps, 1), 8 if count <= 8 else 16)
            more = row_blocks * warps * steps * 1024
            slots = min(max(turns, 2), 8, 1 + (SHARED_MEMORY // (beside * share) - 1024 - one) // more)
            if slots >= 2 and registers >= (96 if steps <= 2 else 128):
                takes_more = registers >= 255 and (steps > 2 or share == 1)
                registers = 0 if takes_more else min(registers, 128)
                yield RingTuning(columns, row_blocks, warps, steps, slots, registers)
                if beside * share == 2 and row_blocks == 1 and count <= 8:
                    yield RingTuning(columns, row_blocks, warps, steps, slots, registers, trigger_first=True)


def wgmma_candidates(n: int, k: int, count: int) -> Iterator[WgmmaTuning]:
    """Launch shapes that the sweep tries, and tiles of 64 rows by 256 tokens: each weight is decoded once."""
    for tuning in packed_candidates(count):
        if isinstance(tuning, WgmmaTuning) and (count <= 128 or tuning.split_k <= 2):
            yield tuning
    if count > 128:
        shapes = [WgmmaTuning(256, 4, 1, 1, 2, 2), WgmmaTuning(256, 4, 1, 1, 3, 2), WgmmaTuning(128, 8, 1, 1, 4, 3)]
        for shape, split in product(shapes[:2], (1, 2, 4)):
            yield replace(shape, split_k=split)
        for shape in shapes[1:]:
            tiles = -(-n // (16 * shape.num_warps)) * -(-count // shape.block_m)
            if MULTIPROCESSORS // 2 < tiles < MULTIPROCESSORS:
                # Second parts one behind another, on what first parts leave of the device.
                behind = -(-tiles // (MULTIPROCESSORS - tiles))
                even = -(-k // 128 * behind // (behind + 1))
                yield replace(shape, split_k=2, first_pairs=even)
                yield replace(shape, split_k=2, first_pairs=even + 2)


@dataclass
class Layers:
    """Weights of several layers, so that level 2 holds none of those that come next."""

    linears: Linears
    weights: list[dict[str, PackedWeight]]
    norm: torch.Tensor
    workspace: LinearWorkspace

    @staticmethod
    def make(linears: Linears) -> Layers:
        weights = [{name: packed_weight(KIND, n, k) for name, (n, k) in linears.items()} for _ in range(LAYERS)]
        hidden = linears["qkv"][1]
        return Layers(
            linears, weights, torch.ones(hidden, device="cuda", dtype=BF16), allocate_linear_workspace("cuda")
        )

    def linear(self, layer: int, name: str, x: torch.Tensor, choices: Choices) -> torch.Tensor:
        return packed_linear(x, self.weights[layer][name], None, self.workspace, tuning=choices[name], pdl=True)

    def run(self, layer: int, x: torch.Tensor, choices: Choices, *, alone: bool) -> None:
        """A layer without its attention; `alone`: nothing but its linears."""
        linear = partial(self.linear, layer, choices=choices)
        mixed = linear("qkv", x)[:, : self.linears["o"][1]]
        hidden = linear("o", mixed)
        if not alone:
            hidden = add_rms_norm(hidden, x, self.norm, 1e-5, pdl=True)
        inner = linear("gate_up", hidden)
        inner = inner[:, : inner.shape[1] // 2] if alone else gated_activation(inner, "silu", pdl=True)
        hidden = linear("down", inner)
        if not alone:
            add_rms_norm(hidden, x, self.norm, 1e-5, pdl=True)

    def chain_us(self, x: torch.Tensor, choices: Choices, *, alone: bool = False, target_ms: float = 5.0) -> float:
        """Microseconds of one layer, of all layers one after another."""
        launches = [partial(self.run, layer, x, choices, alone=alone) for layer in range(LAYERS)]
        return 1e3 * time_graph(launches, target_ms=target_ms, repeats=3)

    def num_bytes(self, name: str) -> int:
        return self.weights[0][name].num_bytes()


def _compile(job: tuple[int, int, int, Tuning]) -> None:
    """A launch of the same constants, on few rows where their number is none of them."""
    n, k, count, tuning = job
    rows = 16 * getattr(tuning, "row_blocks", 1)
    if isinstance(tuning, InFlightTuning):
        n = 4 * rows if n % rows == 0 else 4 * rows + 16
    weight = packed_weight(KIND, n, k)
    x = torch.randn(count, k, device="cuda", dtype=BF16)
    packed_linear(x, weight, None, allocate_linear_workspace("cuda"), tuning=tuning, pdl=True)


def _wrong(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


def time_alone(
    layers: Layers, name: str, count: int, tunings: list[Tuning], dense: torch.Tensor
) -> list[tuple[float, Tuning]]:
    """(us, launch shape), the fastest first, of those that give the twin's numbers. dense: float64 [N, K]."""
    n, k = layers.linears[name]
    x = torch.randn(count, k, device="cuda", dtype=BF16)
    expected = reference.linear(x.double(), dense)
    own = [weights[name] for weights in layers.weights]
    copies = [*own, *(packed_weight(KIND, n, k) for _ in range((200 << 20) // layers.num_bytes(name) - LAYERS))]
    timed = []
    for tuning in tunings:
        for _ in range(2):
            out = packed_linear(x, own[0], None, layers.workspace, tuning=tuning, pdl=True)
        error = _wrong(out, expected)
        if not error <= 8e-3 or layers.workspace.counters.any():
            print(f"WRONG {name} M={count} {tuning}: error {error:.3g}", flush=True)
            layers.workspace.counters.zero_()
            continue
        launches = [partial(packed_linear, x, w, None, layers.workspace, tuning=tuning, pdl=True) for w in copies]
        timed.append((1e3 * time_graph(launches, target_ms=2, repeats=3), tuning))
    return sorted(timed, key=lambda item: item[0])


def choose_in_chain(layers: Layers, x: torch.Tensor, old: Choices, best: dict[str, list[Tuning]]) -> Choices:
    """Each linear in turn tries its best shapes between the others' as they are by then, twice."""
    starts = [old, {name: shapes[0] for name, shapes in best.items()}]
    timed = [(layers.chain_us(x, start), start) for start in starts]
    us, choices = min(timed, key=lambda item: item[0])
    for _ in range(2):
        for name in ("gate_up", "down", "qkv", "o"):
            for tuning in [*best[name], old[name]]:
                tried = choices | {name: tuning}
                tried_us = us if tried == choices else layers.chain_us(x, tried)
                if tried_us < 0.997 * us:
                    us, choices = tried_us, tried
    return choices


def _shown(tuning: Tuning) -> str:
    return KERNEL_NAMES[type(tuning)] + " " + ",".join(str(value) for value in asdict(tuning).values())


FAMILIES = {"in_flight": in_flight_candidates, "ring": ring_candidates, "wgmma": wgmma_candidates}


def _launch_key(n: int, k: int, count: int, tuning: Tuning) -> tuple[object, ...]:
    """Alike where one compiled kernel serves both."""
    rows = 16 * getattr(tuning, "row_blocks", 1)
    return n if not isinstance(tuning, InFlightTuning) else n % rows == 0, k, count <= 8, tuning


def sweep(linears: Linears, counts: list[int], top: int, families: list[str], out: Path) -> None:
    began = time.monotonic()
    layers = Layers.make(linears)
    old = {
        count: {
            name: choose_linear(torch.empty(count, k, device="cuda", dtype=BF16), layers.weights[0][name])
            for name, (_, k) in linears.items()
        }
        for count in counts
    }
    tunings: dict[tuple[str, int], list[Tuning]] = {
        (name, count): list(
            dict.fromkeys([old[count][name], *(one for family in families for one in FAMILIES[family](n, k, count))])
        )
        for (name, (n, k)), count in product(linears.items(), counts)
    }
    jobs = {
        _launch_key(n, k, count, tuning): (n, k, count, tuning)
        for (name, (n, k)), count in product(linears.items(), counts)
        for tuning in tunings[name, count]
    }
    keys = {job: key for key, job in jobs.items()}
    works = {keys[job] for job in compile_all(_compile, list(jobs.values()))}
    print(f"{len(works)} of {len(jobs)} kernels compiled after {time.monotonic() - began:.0f} s")
    ceilings = measure_ceilings()
    print(f"{torch.cuda.get_device_name(0)}: read {ceilings.read_gb_s:.0f} GB/s")
    timed: dict[tuple[str, int], list[tuple[float, Tuning]]] = {}
    for name, (n, k) in linears.items():
        dense = unpack(layers.weights[0][name])
        floor = layers.num_bytes(name) / ceilings.read_gb_s / 1e3
        for count in counts:
            usable = [tuning for tuning in tunings[name, count] if _launch_key(n, k, count, tuning) in works]
            timed[name, count] = found = time_alone(layers, name, count, usable, dense)
            before = next((us for us, tuning in found if tuning == old[count][name]), float("nan"))
            text = " | ".join(f"{us:.2f} us {100 * floor / us:.0f}% {_shown(tuning)}" for us, tuning in found[:top])
            print(f"{name:8s} M={count:2d} table {before:.2f} us {100 * floor / before:.0f}% best {text}", flush=True)
        del dense
    print(f"alone: done after {time.monotonic() - began:.0f} s")
    rows = []
    floor = sum(layers.num_bytes(name) for name in linears) / ceilings.read_gb_s / 1e3
    for count in counts:
        x = torch.randn(count, linears["qkv"][1], device="cuda", dtype=BF16)
        best = {name: [tuning for _, tuning in timed[name, count][:top]] for name in linears}
        new = choose_in_chain(layers, x, old[count], best)
        turns = [
            [
                layers.chain_us(x, choices, alone=alone, target_ms=10)
                for alone in (False, True)
                for choices in (old[count], new)
            ]
            for _ in range(3)
        ]
        table, ours, table_alone, ours_alone = (sorted(column)[1] for column in zip(*turns, strict=True))
        print(
            f"a layer without attention, M={count:2d}: table {table:.1f} us, chosen {ours:.1f} us; only its linears "
            f"{table_alone:.1f} and {ours_alone:.1f} us ({100 * floor / table_alone:.0f} and "
            f"{100 * floor / ours_alone:.0f} % of read)",
            flush=True,
        )
        for name, (n, k) in linears.items():
            us = next(us for us, tuning in timed[name, count] if tuning == new[name])
            plain = bf16_ms(n, k, torch.randn(count, k, device="cuda", dtype=BF16))
            print(f"    {name:8s} {us:6.2f} us alone, {1e3 * plain / us:.2f} times bf16, {_shown(new[name])}")
            rows.append(
                {"format": weight_format(layers.weights[0][name]), "n": n, "k": k, "num_tokens": count,
                 "kernel": KERNEL_NAMES[type(new[name])], "tuning": asdict(new[name]), "us": round(us, 2),
                 "bf16_us": round(1e3 * plain, 2)}
            )  # fmt: skip
    show_choices(out / "packed", rows, part="chain")
    print(f"done after {time.monotonic() - began:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b", choices=sorted(MODELS), help="whose linears")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--top", type=int, default=4, help="how many of the best shapes the chain tries")
    parser.add_argument("--kernels", nargs="+", default=["in_flight", "ring"], choices=sorted(FAMILIES))
    parser.add_argument("--out", type=Path, default=TUNED, help="where rows are written")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    linears = {name: shape for name, shape in MODELS[arguments.model].items() if name != "lm_head"}
    sweep(linears, arguments.tokens, arguments.top, arguments.kernels, arguments.out)


if __name__ == "__main__":
    main()
