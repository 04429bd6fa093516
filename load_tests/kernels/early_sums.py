"""Sums of many rows with and without products beside them: `python -m load_tests.kernels.early_sums [ways|layers]`.

Two ranks; `ways`: milliseconds of what stands between two attentions of Llama-3.1-8B on each: a row-parallel product,
its sum over ranks, residual add and RMSNorm, and the column-parallel product that reads them (o and gate_up, down and
qkv). `none` leaves the sum out: what is above it is what the sum costs. `layers`: both pairs in turn by the worker's
own layers, in bfloat16 and quantized on load, with sums begun early and without, and how far the two results are apart.
Launched kernel by kernel, as steps of so many tokens are, behind a pause in which the host gets ahead. Needs PYTHONPATH
to hold `.`, `proto` and `kernels`, and two CUDA devices.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from stepwire_kernels.all_reduce import AllReduceTuning, all_reduce_add_rms_norm
from stepwire_kernels.norm import add_rms_norm
from stepwire_kernels.sent_sums import SentBuffers, sent_buffers, sent_region_words
from stepwire_kernels.signals import publish

from gpu_worker.cuda.early_sums import EarlySums, pieces_of
from gpu_worker.cuda.ops import TritonOps
from gpu_worker.cuda.packed_linears import PackedLinears
from gpu_worker.layers.attention import Attention
from gpu_worker.layers.decoder import DecoderBlock
from gpu_worker.layers.linear import BuildContext
from gpu_worker.layers.sublayer_input import SublayerInput
from gpu_worker.models.loader import read_spec
from gpu_worker.parallel.peer_memory import PeerMemory, map_peers
from gpu_worker.parallel.shares import ParallelContext
from gpu_worker.quant.scheme import QuantizationSetting, make_scheme
from load_tests.kernels.ranks import MAX_ROWS, Rank, run_ranks

MODEL = Path(__file__).resolve().parents[1] / "shapes" / "llama-3.1-8b"
HIDDEN = 4096
# (inputs of the row-parallel product, outputs of the column-parallel one) on one of two ranks.
PAIRS = {"o, gate_up": (2048, 14336), "down, qkv": (7168, 3072)}
ROWS = (2048, 4096, 8192)
EPS = 1e-5
CALLS, REPEATS = 12, 5
# Some 15 ms, in which the host launches what is timed.
PAUSE_CYCLES = 30_000_000
OWN = AllReduceTuning(flagged=True, num_warps=16, num_programs=264)


@dataclass(frozen=True)
class Layer:
    """What is computed: x W_row^T summed over ranks, added, normalised, and times W_column^T."""

    x: torch.Tensor  # [rows, inputs]
    row_weight: torch.Tensor  # [hidden, inputs]
    column_weight: torch.Tensor  # [outputs, hidden]
    norm_weight: torch.Tensor  # [hidden]
    residual: torch.Tensor  # [rows, hidden]

    @classmethod
    def random(cls, rank: Rank, rows: int, inputs: int, outputs: int) -> Layer:
        def fill(*shape: int) -> torch.Tensor:
            return (torch.randn(shape, device=rank.device) * shape[-1] ** -0.5).bfloat16()

        weight = torch.ones(HIDDEN, dtype=torch.bfloat16, device=rank.device)
        return cls(fill(rows, inputs), fill(HIDDEN, inputs), fill(outputs, HIDDEN), weight, fill(rows, HIDDEN))

    def partial(self) -> torch.Tensor:
        return torch.mm(self.x, self.row_weight.t())

    def normed(self, total: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        return add_rms_norm(total[rows], self.residual[rows], self.norm_weight, EPS, out=total[rows])

    def product(self, normed: torch.Tensor, *, is_alone: bool) -> None:
        if not is_alone:
            torch.mm(normed, self.column_weight.t())


@triton.jit
def _tell_kernel(flag_ptr, round_):
    publish(flag_ptr, round_)


Way = Callable[[Layer, bool], None]


def whole(sum_and_norm: Callable[[Layer, torch.Tensor], torch.Tensor]) -> Way:
    def launch(layer: Layer, is_alone: bool) -> None:
        layer.product(sum_and_norm(layer, layer.partial()), is_alone=is_alone)

    return launch


def own_kernel(rank: Rank) -> Callable[[Layer, torch.Tensor], torch.Tensor]:
    def sum_and_norm(layer: Layer, x: torch.Tensor) -> torch.Tensor:
        for first in range(0, len(x), MAX_ROWS):
            rows = slice(first, first + MAX_ROWS)
            all_reduce_add_rms_norm(
                x[rows], layer.residual[rows], layer.norm_weight, EPS, rank.peers, tuning=OWN, pdl=True
            )
        return x

    return sum_and_norm


def nccl_beside(rank: Rank, num_pieces: int) -> Way:
    """Pieces by NCCL on a stream of its own."""
    stream = torch.cuda.Stream(rank.device, priority=-1)
    ready, done = ([torch.cuda.Event() for _ in range(num_pieces)] for _ in range(2))

    def launch(layer: Layer, is_alone: bool) -> None:
        pieces = pieces_of(len(layer.x), num_pieces)
        x = layer.x.new_empty(len(layer.x), HIDDEN)
        product = layer.x.new_empty(len(x), len(layer.column_weight))
        for number, rows in enumerate(pieces):
            torch.mm(layer.x[rows], layer.row_weight.t(), out=x[rows])
            ready[number].record()
            with torch.cuda.stream(stream):
                stream.wait_event(ready[number])
                rank.nccl.all_reduce(x[rows])
                done[number].record()
        for number, rows in enumerate(pieces):
            torch.cuda.current_stream().wait_event(done[number])
            normed = layer.normed(x, rows)
            if not is_alone:
                torch.mm(normed, layer.column_weight.t(), out=product[rows])

    return launch


def sent_beside(early: EarlySums) -> Way:
    def launch(layer: Layer, is_alone: bool) -> None:
        x = layer.x.new_empty(len(layer.x), HIDDEN)
        product = layer.x.new_empty(len(x), len(layer.column_weight))
        for rows in early.pieces(len(x), 2 * HIDDEN):
            torch.mm(layer.x[rows], layer.row_weight.t(), out=x[rows])
            early.begin(x, rows)
        for rows in early.under_way(x):
            normed = early.end_add_norm(x[rows], layer.residual[rows], layer.norm_weight, EPS, 0.0)
            if normed is not None and not is_alone:
                torch.mm(normed, layer.column_weight.t(), out=product[rows])

    return launch


def time_together(launch: Callable[[], Any]) -> float:
    """Milliseconds of one call, the median of some; every rank makes as many calls."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for repeat in range(REPEATS + 1):
        torch.cuda._sleep(PAUSE_CYCLES)
        launch()
        start.record()
        for _ in range(CALLS):
            launch()
        end.record()
        torch.cuda.synchronize()
        if repeat:
            times.append(start.elapsed_time(end) / CALLS)
    return sorted(times)[REPEATS // 2]


def copy_rates(rank: Rank, buffers: SentBuffers) -> dict[str, float]:
    """GB/s of one direction of copies to the peer, both at once, by what they copy in MB."""
    peer = (rank.rank + 1) % rank.size
    found = {}
    for size in (4, 16, 32):
        words = size << 18
        source = torch.zeros(words, dtype=torch.int32, device=rank.device)
        target = buffers.inboxes[peer][0, 0, :words]
        milliseconds = time_together(lambda source=source, target=target: target.copy_(source, non_blocking=True))  # type: ignore[misc]
        found[f"{size} MB"] = round(size * 1.048576 / milliseconds, 1)
    return found


def flag_us(rank: Rank, buffers: SentBuffers) -> dict[str, float]:
    """Microseconds of a flag's write, by the stream and by a kernel; nobody waits for it."""
    peer = (rank.rank + 1) % rank.size
    flags, number = buffers.flags[peer], len(buffers.flags[peer]) - 1
    by_stream = time_together(lambda: torch.ops.symm_mem.stream_write_value32_(flags.view(torch.uint32), number, 0))
    by_kernel = time_together(lambda: _tell_kernel[(1,)](flags[number:], 0, num_warps=1))
    return {"by the stream": round(by_stream * 1e3, 2), "by a kernel": round(by_kernel * 1e3, 2)}


class Normal:
    """Implements `RandomValues`."""

    def fill(self, target: torch.Tensor, std: float) -> None:
        target.normal_(0.0, std)


class BetweenAttentions:
    """A Llama's layers from one attention's output to the next one's input, on this rank."""

    def __init__(self, rank: Rank, early: EarlySums, setting: QuantizationSetting) -> None:
        spec, family = read_spec(MODEL)
        self.parallel = ParallelContext(rank=rank.rank, size=rank.size, collectives=rank.nccl, early=early)
        self.ops = TritonOps(rank.device, pdl=True)
        kernels = PackedLinears(rank.device, pdl=True)
        scheme = make_scheme(
            MODEL, family.name_rules, setting=setting, has_weights=False, ops=self.ops, kernels=kernels
        )
        build = BuildContext(self.parallel, scheme, torch.bfloat16, rank.device, self.ops)
        self.first, self.second = (DecoderBlock(spec, number, [spec.layers[0].rope], build) for number in range(2))
        for block in (self.first, self.second):
            for _, part in block.weighted():
                part.fill_random(Normal())
                part.finish()

    @torch.inference_mode()
    def apply(self, attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """`residual` is overwritten."""
        former, following = self.first.attention, self.second.attention
        assert isinstance(former, Attention) and isinstance(following, Attention)
        output = former.output.apply(attended)
        entered = SublayerInput(self.ops, output, residual, self.first.norms["mlp_norm"], self.parallel)
        output = self.first.mlp.apply(entered)
        norm = self.second.norms["attention_norm"]
        return SublayerInput(self.ops, output, entered.residual, norm, self.parallel).through(following.qkv)


def bench_layers(rank: Rank, row_counts: list[int], out: Path | None) -> None:
    buffers, memory = sent_memory(rank, max(row_counts))
    early = EarlySums(buffers, rank.device, held=memory)
    settings: tuple[QuantizationSetting, ...] = ("auto", "fp8", "int8")
    lines = []
    for setting in settings:
        layers = BetweenAttentions(rank, early, setting)
        for rows in row_counts:
            generator = torch.Generator(rank.device).manual_seed(5)
            residual = torch.randn(rows, HIDDEN, generator=generator, device=rank.device).bfloat16()
            attended = torch.randn(rows, HIDDEN // rank.size, device=rank.device).bfloat16()
            times, results, begun = {}, [], early.num_sums
            for name, min_rows in (("after", 1 << 30), ("early", 1)):
                early.min_rows = min_rows
                changed = residual.clone()
                results.append((layers.apply(attended, changed), changed.clone()))
                times[name] = time_together(lambda changed=changed: layers.apply(attended, changed))  # type: ignore[misc]  # noqa: B023
            apart = [
                float((mine.float() - other.float()).norm() / other.float().norm())
                for other, mine in zip(*results, strict=True)
            ]
            line = {
                "setting": setting,
                "rows": rows,
                "ms": times,
                "product apart": apart[0],
                "residual apart": apart[1],
            }
            assert early.num_sums > begun
            if rank.rank == 0:
                print(json.dumps(line), flush=True)
            lines.append(line)
    if rank.rank == 0 and out is not None:
        out.write_text("".join(json.dumps(line) + "\n" for line in lines))


def sent_memory(rank: Rank, max_rows: int) -> tuple[SentBuffers, PeerMemory]:
    words = max_rows * HIDDEN // 2
    memory = map_peers(rank.group, rank.device, range(rank.size), sent_region_words(rank.size, words), "early sums")
    if memory is None:
        raise SystemExit("these devices do not map each other's memory")
    return sent_buffers(rank.rank, memory.regions, words, rank.peers.stop), memory


def bench_ways(rank: Rank, row_counts: list[int], out: Path | None) -> None:
    buffers, memory = sent_memory(rank, max(row_counts))

    def early(num_pieces: int) -> EarlySums:
        return EarlySums(buffers, rank.device, min_rows=1, num_pieces=num_pieces, held=memory)

    rates, flags = copy_rates(rank, buffers), flag_us(rank, buffers)
    if rank.rank == 0:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; copies to the peer, GB/s: {rates}; ", end="")
        print(f"a flag, us: {flags}", flush=True)
    ways: dict[str, Way] = {
        "none": whole(lambda layer, x: layer.normed(x)),
        "nccl": whole(lambda layer, x: layer.normed(rank.nccl.all_reduce(x))),
        "kernel": whole(own_kernel(rank)),
        "nccl 2": nccl_beside(rank, 2),
        "nccl 4": nccl_beside(rank, 4),
    }
    # One after the other they send as rounds of one sequence, each in buffers of its own count.
    shared = {num_pieces: early(num_pieces) for num_pieces in (1, 2, 3, 4)}
    ways |= {f"sent {num_pieces}": sent_beside(sums) for num_pieces, sums in shared.items()}
    if rank.rank == 0:
        print(f"{'ms':>24s} " + " ".join(f"{name:>8s}" for name in ways), flush=True)
    lines = []
    so_far = 0
    for rows in row_counts:
        for pair, (inputs, outputs) in PAIRS.items():
            layer = Layer.random(rank, rows, inputs, outputs)
            for is_alone in (True, False):
                times = {}
                for name, way in ways.items():
                    for sums in shared.values():
                        sums.num_sums = so_far
                    times[name] = time_together(lambda way=way: way(layer, is_alone))  # type: ignore[misc]  # noqa: B023
                    so_far = max(sums.num_sums for sums in shared.values())
                what = pair.split(",")[0] if is_alone else pair
                if rank.rank == 0:
                    cells = " ".join(f"{ms:8.3f}" for ms in times.values())
                    print(f"{rows:5d} {what:>18s} {cells}", flush=True)
                lines.append({"rows": rows, "what": what, "ms": times})
    if rank.rank == 0 and out is not None:
        out.write_text("".join(json.dumps(line) + "\n" for line in lines))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["ways", "layers"], default="ways")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--out", type=Path, help="file for JSON lines")
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    bench = bench_ways if arguments.what == "ways" else bench_layers
    run_ranks("load_tests.kernels.early_sums", argv, 2, lambda rank: bench(rank, arguments.rows, arguments.out), HIDDEN)


if __name__ == "__main__":
    main(sys.argv[1:])
