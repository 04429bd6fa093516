"""Sums that are begun early: their pieces, and what is refused. What ranks compute with them: test_ranks.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stepwire_kernels.all_reduce_choice import default_choices
from stepwire_kernels.quantize_input import quantize_input
from stepwire_kernels.sent_sums import MAX_PIECES, sent_buffers, sent_region_words

from gpu_worker.cuda.early_sums import MIN_ROWS, NUM_PIECES, PIECE_MULTIPLE, EarlySums, pieces_of
from gpu_worker.cuda.ops import TritonOps
from gpu_worker.cuda.packed_linears import PackedLinears
from gpu_worker.cuda.peer_collectives import PeerSizes
from gpu_worker.cuda.step_layout import GRAPH_TOKENS, StepPlanner, mixed_buckets
from gpu_worker.layers.linear import BuildContext, RowParallelLinear, column_parallel
from gpu_worker.layers.norm import RMSNorm
from gpu_worker.layers.ops import TORCH_OPS, QuantizedRows
from gpu_worker.layers.sublayer_input import SublayerInput
from gpu_worker.parallel.shares import ParallelContext, Share
from gpu_worker.quant.api import QuantScheme
from gpu_worker.quant.none import Unquantized
from gpu_worker.quant.scheme import OnLoadScheme
from tests.unit.kernels.checks import repair_interpreter

CPU = torch.device("cpu")


@given(
    num_rows=st.integers(1, 70000), num_pieces=st.integers(1, MAX_PIECES), multiple=st.sampled_from((1, 3, 128, 256))
)
def test_pieces_are_all_rows_in_order(num_rows: int, num_pieces: int, multiple: int) -> None:
    pieces = pieces_of(num_rows, num_pieces, multiple)
    assert [row for piece in pieces for row in (piece.start, piece.stop)][1:-1:2] == [
        piece.start for piece in pieces[1:]
    ]
    assert (pieces[0].start, pieces[-1].stop) == (0, num_rows)
    assert 1 <= len(pieces) <= num_pieces and all(piece.start < piece.stop for piece in pieces)
    assert all(piece.stop % multiple == 0 for piece in pieces[:-1])


def test_no_step_of_which_there_is_a_graph_begins_sums_early() -> None:
    """One rank may replay what another, whose capture failed, launches kernel by kernel."""
    assert max(mixed_buckets(1 << 20)) == GRAPH_TOKENS[-1][0] < MIN_ROWS
    for max_num_seqs in (256, 5000):
        shapes = StepPlanner(max_num_seqs, 8192, with_graphs=True).graph_shapes()
        assert max(shape.num_tokens for shape in shapes) < sizes_of(max_num_seqs).min_sent_rows
    assert NUM_PIECES <= MAX_PIECES and PIECE_MULTIPLE * NUM_PIECES < MIN_ROWS


def sizes_of(max_num_seqs: int, max_tokens: int = 8192) -> PeerSizes:
    choices = default_choices(2)
    return PeerSizes(2, 4096, 49152, max_num_seqs, max_tokens, 20, torch.bfloat16, choices, choices)


def test_more_sequences_than_that_begin_theirs_with_more_rows_or_not_at_all() -> None:
    assert sizes_of(256).max_sent_rows == sizes_of(5000).max_sent_rows == 8192
    assert sizes_of(8192).max_sent_rows == 0
    assert sizes_of(256, 1 << 20).max_sent_rows == 16384 < sizes_of(16384, 1 << 20).min_sent_rows


def pair(words: int = 32) -> tuple[EarlySums, EarlySums]:
    """Of two ranks in one process: what one has begun the other ends at once."""
    regions = [torch.zeros(sent_region_words(2, words), dtype=torch.int64) for _ in range(2)]
    stop = torch.zeros(1, dtype=torch.int32)
    first, second = (
        EarlySums(sent_buffers(rank, regions, words, stop), CPU, min_rows=4, num_pieces=2, multiple=2)
        for rank in range(2)
    )
    return first, second


def begin(early: EarlySums, x: torch.Tensor) -> torch.Tensor:
    for rows in early.pieces(len(x), x.shape[1] * x.element_size()):
        early.begin(x, rows)
    return x


def test_few_rows_too_many_rows_and_halves_of_words_are_not_begun() -> None:
    early, _ = pair()
    assert early.pieces(3, 16) == early.pieces(9, 16) == early.pieces(4, 6) == ()
    assert early.pieces(7, 16) == (slice(0, 4), slice(4, 7))


def test_other_rows_are_nothing_that_is_under_way() -> None:
    early, other = pair()
    parallel = ParallelContext(size=2, early=early)
    x, unrelated = torch.ones(4, 4), torch.ones(4, 4)
    begin(early, x)
    begin(other, torch.full((4, 4), 2.0))
    assert parallel.under_way(unrelated) == parallel.under_way(x[2:]) == ()
    assert parallel.under_way(x) == (slice(0, 2), slice(2, 4))
    # The next piece is all that is under way of itself.
    assert parallel.under_way(x[:2]) == (slice(0, 2),)
    parallel.all_reduce(x[:2])
    assert parallel.under_way(x[2:]) == (slice(0, 2),)
    assert x[:, 0].tolist() == [3.0, 3.0, 1.0, 1.0]
    parallel.all_reduce(x[2:])
    assert parallel.under_way(x) == ()
    assert x[:, 0].tolist() == [3.0] * 4


def test_rows_that_are_no_pieces_are_refused() -> None:
    early, _ = pair()
    x = begin(early, torch.ones(4, 4))
    with pytest.raises(RuntimeError, match="3 rows are asked for"):
        early.end(x[:3])


def test_a_sum_is_ended_before_the_next_is_begun() -> None:
    early, _ = pair()
    x = begin(early, torch.ones(4, 4))
    with pytest.raises(RuntimeError, match="still under way"):
        early.begin(x, slice(0, 2))


class _Normal:
    """Implements `RandomValues`."""

    def fill(self, target: torch.Tensor, std: float) -> None:
        target.normal_(0.0, std)


def scheme_of(kind: str) -> QuantScheme:
    ops = TritonOps(CPU, pdl=False)
    if kind in ("fp8", "int8"):
        return OnLoadScheme(kind, ops, PackedLinears(CPU, pdl=False))  # type: ignore[arg-type]
    # oneDNN's layout is copied from.
    return Unquantized(TORCH_OPS if kind == "copied" else ops)


@pytest.mark.parametrize(("kind", "has_bias"), [("plain", False), ("plain", True), ("copied", True), ("fp8", True)])
def test_products_in_pieces_are_those_of_all_rows(kind: str, has_bias: bool) -> None:
    """Both sides of a sum over two ranks, of which one's products are looked at."""
    repair_interpreter()
    torch.manual_seed(3)
    (early, other), num_rows, hidden = pair(words=6 * 16), 6, 16
    parallel = ParallelContext(rank=0, size=2, early=early)
    build = BuildContext(
        parallel, scheme_of(kind), torch.float32, CPU, TritonOps(CPU, pdl=False), leaves_sums=True, begins_sums=True
    )
    row = RowParallelLinear(Share(0, 32, 64), hidden, bias=has_bias, path="row", build=build)
    column = column_parallel(hidden, [("", Share(0, 48, 96))], bias=has_bias, path="column", build=build)
    norm = RMSNorm(hidden, 1e-5, build)
    for part in (row, column, norm):
        part.fill_random(_Normal())
        part.finish()
    x, theirs, residual = torch.randn(num_rows, 32), torch.randn(num_rows, hidden), torch.randn(num_rows, hidden)
    total = residual + row.method.apply(x) + theirs
    outputs = [lambda: row.apply(x)]
    quant = row.method.row_quant()
    if quant is not None:
        # Rows that come quantized, as from a gate.
        outputs.append(lambda: row.apply_quantized(QuantizedRows(*quantize_input(x, quant.dtype))))
    for number, make_output in enumerate(outputs, start=1):
        output, sent = make_output(), begin(other, theirs.clone())
        assert early.num_sums == number and len(parallel.under_way(output)) == 2
        entered = SublayerInput(build.ops, output, residual.clone(), norm, parallel)
        product = entered.through(column)
        assert parallel.under_way(output) == ()
        torch.testing.assert_close(entered.residual, total, rtol=1e-5, atol=1e-5)
        # Who reads the rows after that has all of them.
        torch.testing.assert_close(entered.rows(), norm.apply(total), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(product, column.method.apply(entered.rows()), rtol=1e-5, atol=1e-5)
        other.end(sent)
