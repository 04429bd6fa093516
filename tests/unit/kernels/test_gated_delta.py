"""The kernels of the gated delta rule against their twins in float64: runs of any length side by side, rows that go on
and rows that begin where another sequence has left its state, padding, both orders of a projection's columns."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from stepwire_kernels import gated_delta_chunks, reference_delta
from stepwire_kernels.causal_conv import causal_conv
from stepwire_kernels.delta_runs import DeltaRuns, unsupported_heads, unsupported_width
from stepwire_kernels.gated_delta import gated_delta
from stepwire_kernels.gated_heads import gate_heads, gated_norm, without_gates

from gpu_worker.layers.delta_rule import DeltaLayout
from tests.unit.kernels.checks import USUAL_DTYPES, assert_close, poison

NUM_ROWS = 9


@dataclass(frozen=True)
class Step:
    """(tokens of this step, tokens before) of each run; then padding."""

    runs: tuple[tuple[int, int], ...]
    padding: int = 0
    num_runs: int = 0
    """With padding; 0: as many as there are."""

    @property
    def num_tokens(self) -> int:
        return sum(length for length, _ in self.runs) + self.padding

    def on(self, device: str) -> DeltaRuns:
        single = all(length == 1 for length, _ in self.runs)
        lengths = [length for length, _ in self.runs]
        lens = [length + before for length, before in self.runs]
        missing = max(self.num_runs, len(self.runs)) - len(self.runs)
        # Padding as `step_input.py` has it: a token a run in a step of decodes, else all of it in the first.
        lengths += [1] * missing if single else [self.padding, *[0] * (missing - 1)][:missing]
        starts = [sum(lengths[:run]) for run in range(len(lengths) + 1)]
        rows = [7, 2, 5, 0, 8, 3][: len(self.runs)] + [0] * missing

        def ints(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        return DeltaRuns(ints(starts), ints(lens + [0] * missing), ints(rows), 1 in lengths, not single)


STEPS = {
    "decodes": Step(((1, 5), (1, 0), (1, 70)), padding=2, num_runs=5),
    "one-decode": Step(((1, 3),)),
    "mixed": Step(((1, 9), (64, 0), (3, 2), (1, 0), (65, 30)), padding=7, num_runs=7),
    "prompt": Step(((130, 0),), padding=30, num_runs=4),
    "short": Step(((2, 0), (2, 1), (2, 2))),
    "one-token-of-padding": Step(((2, 4), (5, 0)), padding=1, num_runs=3),
}
LAYOUTS = {
    "apart": DeltaLayout.of(2, 3, 16, 32, is_grouped=False),
    "grouped": DeltaLayout.of(3, 2, 32, 16, is_grouped=True),
    "alone": DeltaLayout.of(1, 1, 16, 64, is_grouped=True),
}
steps = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
layouts = pytest.mark.parametrize("layout", [LAYOUTS["apart"], LAYOUTS["grouped"]], ids=["apart", "grouped"])


def width_of(layout: DeltaLayout) -> int:
    return layout.num_channels + layout.num_value_heads * layout.value_dim


def rows_that_run(runs: DeltaRuns) -> dict[int, bool]:
    """Whether each had tokens before."""
    lists = (runs.run_rows.tolist(), runs.kv_lens.tolist(), runs.query_starts.diff().tolist())
    return {row: kv_len > length for row, kv_len, length in zip(*lists, strict=True) if kv_len}


def poison_what_begins(state: torch.Tensor, runs: DeltaRuns) -> None:
    """Rows whose sequence begins must not read what is there."""
    for row, goes_on in rows_that_run(runs).items():
        if not goes_on:
            state[row] = float("nan")


def assert_rows(
    state: torch.Tensor,
    twin: torch.Tensor,
    before: torch.Tensor,
    runs: DeltaRuns,
    *,
    dtype: torch.dtype | None = None,
    factor: float = 1.0,
) -> None:
    """Rows that run are as the twin's, others as they were."""
    ran = rows_that_run(runs)
    for row in range(len(state)):
        if row in ran:
            assert_close(state[row], twin[row], dtype=dtype, factor=factor)
        else:
            assert torch.equal(state[row], before[row])


@steps
@layouts
@pytest.mark.parametrize("dtype", USUAL_DTYPES)
@pytest.mark.parametrize("width", [2, 4])
def test_convolution(device: str, dtype: torch.dtype, layout: DeltaLayout, step: Step, width: int) -> None:
    runs = step.on(device)
    wide = torch.randn(step.num_tokens, width_of(layout) + 8, device=device).to(dtype)
    x = wide[:, : width_of(layout)]
    weight = torch.randn(layout.num_channels, width, device=device).to(dtype)
    state = torch.randn(NUM_ROWS, width - 1, layout.num_channels, device=device).to(dtype)
    poison_what_begins(state, runs)
    before, twin = state.clone(), state.double()
    expected = reference_delta.causal_conv(x.double(), weight.double(), twin, layout, runs)

    out = poison(step.num_tokens, layout.num_channels, dtype=dtype, device=device)
    causal_conv(x, weight, state, layout, runs, out=out)

    assert_close(out, expected)
    assert_rows(state, twin, before, runs)
    ran = list(rows_that_run(runs))
    assert torch.equal(state[ran].double(), twin[ran])  # inputs, as they came
    padding = slice(step.num_tokens - step.padding, None)
    assert not out[padding].any()


@steps
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", USUAL_DTYPES)
def test_rule(device: str, dtype: torch.dtype, layout: DeltaLayout, step: Step) -> None:
    check_rule(device, dtype, layout, step)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_rule_of_heads_as_large_as_released_ones(device: str, dtype: torch.dtype) -> None:
    check_rule(device, dtype, DeltaLayout.of(1, 2, 128, 128, is_grouped=False), STEPS["mixed"])


@pytest.mark.parametrize("alike", [3.0, 30.0])
def test_keys_that_are_alike_and_heads_that_forget_nothing(device: str, alike: float) -> None:
    """Where products of powers of the chunk's system would cancel all digits."""
    check_rule(device, torch.float32, LAYOUTS["apart"], STEPS["prompt"], alike=alike, log_rate=-12.0, factor=20)


def test_heads_that_forget_at_once(device: str) -> None:
    check_rule(device, torch.float32, LAYOUTS["apart"], STEPS["mixed"], log_rate=4.0, factor=20)


def check_rule(
    device: str,
    dtype: torch.dtype,
    layout: DeltaLayout,
    step: Step,
    *,
    alike: float = 0.0,
    log_rate: float = 0.0,
    factor: float = 1.0,
) -> None:
    runs, heads = step.on(device), layout.num_value_heads
    if device == "cuda" and dtype == torch.float32:
        factor *= 8  # three TF32 products in place of each
    keys = layout.num_key_heads * layout.key_dim
    qkv = torch.randn(step.num_tokens, layout.num_channels, device=device)
    qkv[:, keys : 2 * keys] += alike
    qkv = qkv.to(dtype)
    pairs = torch.randn(step.num_tokens, 2 * heads, device=device).to(dtype)
    rates, bias = torch.randn(heads, device=device) + log_rate, torch.randn(heads, device=device)
    matrices = torch.randn(NUM_ROWS, heads, layout.key_dim, layout.value_dim, device=device)
    poison_what_begins(matrices, runs)
    before, twin = matrices.clone(), matrices.double()
    expected = reference_delta.gated_delta(
        qkv.double(), pairs.double(), rates.double(), bias.double(), twin, layout, runs
    )

    out = poison(step.num_tokens, heads, layout.value_dim, dtype=dtype, device=device)
    gated_delta(qkv, pairs, rates, bias, matrices, layout, runs, out=out)

    assert_close(out, expected, factor=factor)
    assert_rows(matrices, twin, before, runs, dtype=dtype, factor=factor)
    assert not out[step.num_tokens - step.padding :].any()


def test_places_of_chunks_are_nobody_else_s() -> None:
    """Of runs as they come, with and without a token beyond a multiple of a chunk."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(300):
        count = int(torch.randint(1, 12, (1,), generator=generator))
        lengths = torch.tensor([0, 1, 2, 63, 64, 65, 128, 200])[torch.randint(0, 8, (count,), generator=generator)]
        starts = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).int()
        runs = DeltaRuns(starts, lengths.int(), lengths.int(), True, True)
        chunk = gated_delta_chunks.CHUNK_TOKENS
        places = [
            int(starts[run]) // chunk + run + number
            for run in range(count)
            for number in range(-(-int(lengths[run]) // chunk))
        ]
        assert places == sorted(set(places))
        assert not places or places[-1] < runs.num_places(int(starts[-1]), chunk)


@layouts
@pytest.mark.parametrize("dtype", USUAL_DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 13])
def test_gated_norm(device: str, dtype: torch.dtype, layout: DeltaLayout, num_tokens: int) -> None:
    x = torch.randn(num_tokens, layout.num_value_heads, layout.value_dim, device=device).to(dtype)
    mixed = torch.randn(num_tokens, width_of(layout) + 8, device=device).to(dtype)[:, : width_of(layout)]
    weight = torch.randn(layout.value_dim, device=device).to(dtype)
    expected = reference_delta.gated_norm(x.double(), mixed.double(), weight.double(), 1e-5, layout)
    out = poison(num_tokens, layout.num_value_heads * layout.value_dim, dtype=dtype, device=device)
    gated_norm(x, mixed, weight, 1e-5, layout, out=out)
    assert_close(out, expected)


@pytest.mark.parametrize("dtype", USUAL_DTYPES)
@pytest.mark.parametrize(("num_tokens", "heads", "dim", "rest"), [(1, 2, 64, 128), (5, 3, 20, 7), (2, 24, 64, 0)])
def test_gates_of_attention(device: str, dtype: torch.dtype, num_tokens: int, heads: int, dim: int, rest: int) -> None:
    columns = torch.randn(num_tokens, 2 * heads * dim + rest, device=device).to(dtype)
    queries, gates = columns[:, : 2 * heads * dim].unflatten(1, (heads, 2, dim)).unbind(2)
    out = poison(num_tokens, heads * dim + rest, dtype=dtype, device=device)
    without_gates(columns, heads, dim, out=out)
    assert torch.equal(out, torch.cat((queries.flatten(1), columns[:, 2 * heads * dim :]), dim=1))
    x = torch.randn(num_tokens, heads * dim, device=device).to(dtype)
    expected = x.double() * gates.double().sigmoid().flatten(1)
    assert gate_heads(x, gates) is x
    assert_close(x, expected)


def test_what_does_not_fit_is_refused(device: str) -> None:
    layout, runs = LAYOUTS["apart"], STEPS["one-decode"].on(device)
    x = torch.zeros(1, width_of(layout), device=device)
    for width in (1, 18):
        weight, state = torch.zeros(256, width, device=device), torch.zeros(1, width - 1, 256, device=device)
        with pytest.raises(ValueError, match=f"a convolution over {width} tokens, which are not 2 to 17"):
            causal_conv(x, weight, state, layout, runs)
    with pytest.raises(ValueError, match=r"256 channels need weight \[256, W\]"):
        causal_conv(x, torch.zeros(255, 4, device=device), torch.zeros(1, 3, 256, device=device), layout, runs)
    rates = torch.zeros(6, device=device)
    with pytest.raises(ValueError, match=r"6 heads of \(16, 32\) need qkv \[tokens, 256\]"):
        gated_delta(x, x, rates, rates, torch.zeros(1, 6, 16, 32, device=device), layout, runs)
    assert unsupported_heads(128, 128) is None and unsupported_width(4) is None
    assert "keys of 48 numbers" in str(unsupported_heads(48, 128))
