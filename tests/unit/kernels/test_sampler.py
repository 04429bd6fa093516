from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stepwire_kernels import reference_steps, sampler
from stepwire_kernels.reference_steps import RowParameters
from stepwire_kernels.sampler import allocate_sampled, allocate_sampler_workspace
from stepwire_kernels.step_input import PROMPT_FLAG, RowState, allocate_row_state

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def set_row(rows: RowState, row: int, parameters: RowParameters) -> None:
    rows.parameters[row] = torch.from_numpy(parameters.words()).to(rows.parameters.device)
    rows.biases[row] = torch.from_numpy(parameters.bias_words(rows.biases.shape[2])).to(rows.biases.device)


def random_counts(vocab_size: int) -> torch.Tensor:
    counts = torch.randint(0, 4, (vocab_size,), dtype=torch.int32) * (torch.rand(vocab_size) < 0.1).int()
    return counts | torch.where(torch.rand(vocab_size) < 0.1, PROMPT_FLAG, 0).int()


def run(
    logits: torch.Tensor,
    parameters: list[RowParameters],
    *,
    positions: list[int] | None = None,
    counts: torch.Tensor | None = None,
    masks: torch.Tensor | None = None,
    mask_rows: list[int] | None = None,
    max_top: int = 0,
) -> tuple[sampler.Sampled, list[reference_steps.SampledToken]]:
    """The kernel's samples and the twin's, from rows stored in reverse order."""
    num_runs, vocab_size = logits.shape
    rows = allocate_row_state(
        num_runs + 1, 8, 16, vocab_size, DEVICE, max_biases=8, with_token_counts=counts is not None
    )
    row_ids = list(range(num_runs, 0, -1))
    for index, row in enumerate(row_ids):
        set_row(rows, row, parameters[index])
        if counts is not None:
            rows.token_counts[row] = counts[index].to(DEVICE)
    logits = logits.to(DEVICE)
    ints = lambda values: torch.tensor(values, dtype=torch.int32, device=DEVICE)  # noqa: E731
    at = ints(positions or list(range(100, 100 + num_runs)))
    workspace = allocate_sampler_workspace(num_runs, vocab_size, DEVICE)
    workspace.adjusted.fill_(float("nan"))
    workspace.partial.fill_(float("nan"))
    workspace.weights.fill_(float("nan"))
    workspace.candidate_values.fill_(float("nan"))
    out = allocate_sampled(num_runs, max_top, DEVICE)
    out.token_ids.fill_(-9)
    out.logprobs.fill_(float("nan"))
    options = {} if masks is None else {"masks": masks.to(DEVICE), "mask_rows": ints(mask_rows)}
    sampler.sample(logits, ints(row_ids), at, rows, workspace, out, **options)
    twin = reference_steps.sample(logits.double(), ints(row_ids), at, rows, **options)
    return out, twin


def assert_same(out: sampler.Sampled, twin: list[reference_steps.SampledToken]) -> None:
    assert out.token_ids.tolist() == [item.token_id for item in twin]
    assert out.faults.tolist() == [item.fault for item in twin]
    expected = torch.tensor([item.logprob for item in twin])
    assert torch.allclose(out.logprobs.cpu(), expected, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [33, 5000, 9001])
def test_temperature_and_greedy(dtype: torch.dtype, vocab_size: int) -> None:
    logits = (3 * torch.randn(6, vocab_size)).to(dtype)
    parameters = [RowParameters(temperature=t, seed=i) for i, t in enumerate((0.0, 0.3, 1.0, 0.0, 0.7, 2.0))]
    out, twin = run(logits, parameters)
    assert_same(out, twin)
    assert int(out.token_ids[0]) == int(logits[0].float().argmax())


FILTERS = [
    RowParameters(top_k=1),
    RowParameters(top_k=40),
    RowParameters(top_k=4500, temperature=3.0),
    RowParameters(top_p=0.9),
    RowParameters(top_p=1e-6),
    RowParameters(top_p=0.999, temperature=5.0),
    RowParameters(min_p=0.05),
    RowParameters(min_p=1.0),
    RowParameters(min_p=1e-5, temperature=4.0),
    RowParameters(top_k=20, top_p=0.8),
    RowParameters(top_k=4800, top_p=0.97, temperature=6.0),
    RowParameters(top_k=50, top_p=0.95, min_p=0.1, temperature=0.6),
]


@pytest.mark.parametrize(
    ("shape", "filters"),
    [
        ("normal", FILTERS),
        ("peaked", FILTERS[::3]),
        ("flat", FILTERS[1::3]),
        pytest.param("peaked", FILTERS, marks=pytest.mark.slow),
        pytest.param("flat", FILTERS, marks=pytest.mark.slow),
    ],
)
def test_filters_match_the_sorted_twin(shape: str, filters: list[RowParameters]) -> None:
    vocab_size = 5200
    scale = {"normal": 2.0, "peaked": 12.0, "flat": 0.01}[shape]
    logits = scale * torch.randn(len(filters), vocab_size)
    parameters = [dataclasses.replace(item, seed=index) for index, item in enumerate(filters)]
    assert_same(*run(logits, parameters))


def test_filters_on_massive_ties() -> None:
    vocab_size = 4500
    filters = FILTERS[1::2]
    logits = torch.randint(0, 3, (len(filters), vocab_size)).float()
    parameters = [dataclasses.replace(item, seed=index) for index, item in enumerate(filters)]
    assert_same(*run(logits, parameters))
    equal = [RowParameters(top_k=40), RowParameters(top_p=0.9), RowParameters(top_k=20, top_p=0.8)]
    assert_same(*run(torch.zeros(len(equal), vocab_size), equal))


def test_kept_sets_are_exact() -> None:
    """Drawing many tokens from one distribution visits the twin's kept set and nothing else."""
    logits = torch.randn(1, 300).repeat(12, 1) * 2
    item = RowParameters(top_k=7, top_p=0.9, temperature=2.0)
    out, twin = run(logits, [item] * 12, positions=list(range(12)))
    assert_same(out, twin)
    kept = reference_steps.keep_tokens(logits[0].double() / 2.0, item).nonzero().flatten().tolist()
    assert set(out.token_ids.tolist()) <= set(kept) and len(set(out.token_ids.tolist())) > 1


@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    temperature=st.floats(0.05, 4.0),
    top_k=st.integers(0, 400),
    top_p=st.floats(0.01, 1.0),
    min_p=st.sampled_from([0.0, 0.02, 0.5]),
    repetition=st.floats(0.5, 2.0),
    presence=st.floats(-2.0, 2.0),
    frequency=st.floats(-2.0, 2.0),
)
def test_any_parameters_match_twin(seed: int, **values: float) -> None:
    generator = torch.Generator().manual_seed(seed % 2**31)
    vocab_size = 400
    logits = 3 * torch.randn(2, vocab_size, generator=generator)
    item = RowParameters(seed=seed, sequence_index=seed % 5, biases=((7, 5.0), (11, -100.0)), **values)
    counts = torch.stack([random_counts(vocab_size) for _ in range(2)])
    assert_same(*run(logits, [item, dataclasses.replace(item, temperature=0.0)], counts=counts))


def test_penalties_apply_to_prompt_and_output_as_documented() -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0, 1.8, 1.7]])
    counts = torch.tensor([[PROMPT_FLAG, 2, 0, 1 | PROMPT_FLAG, 0]], dtype=torch.int32)
    z = reference_steps.adjust_logits(
        logits[0], RowParameters(repetition=2.0, presence=0.1, frequency=0.2), counts=counts[0]
    )
    assert torch.allclose(z, torch.tensor([1.0, 0.95 - 0.4 - 0.1, -1.0, 0.9 - 0.2 - 0.1, 1.7]))
    out, twin = run(
        logits, [RowParameters(temperature=0.0, repetition=2.0, presence=0.1, frequency=0.2)], counts=counts
    )
    assert_same(out, twin)
    assert out.token_ids.tolist() == [4]


def test_grammar_mask_binds_sampling_and_greedy() -> None:
    vocab_size = 4200
    logits = 4 * torch.randn(4, vocab_size)
    masks = torch.zeros(2, -(-vocab_size // 32), dtype=torch.int32)
    allowed = {0: [5, 31, 32, 4199], 1: [77]}
    for index, tokens in allowed.items():
        for token in tokens:
            bit = np.array([1 << (token % 32)], dtype=np.uint32).view(np.int32)
            masks[index, token // 32] |= int(bit[0])
    parameters = [RowParameters(temperature=t, top_p=p) for t, p in ((1.0, 1.0), (0.0, 1.0), (1.0, 0.9), (1.0, 1.0))]
    out, twin = run(logits, parameters, masks=masks, mask_rows=[0, 0, 1, -1])
    assert_same(out, twin)
    assert all(token in allowed[0] for token in out.token_ids.tolist()[:2]) and int(out.token_ids[2]) == 77


def test_bad_logits_are_a_fault_of_their_own_row_only() -> None:
    logits = torch.randn(4, 100)
    clean = logits.clone()
    logits[0, 50] = float("nan")
    logits[2] = float("-inf")
    parameters = [RowParameters(seed=4, top_p=0.9)] * 4
    out, _ = run(logits, parameters)
    good, _ = run(clean, parameters)
    assert out.faults.tolist() == [sampler.FAULT_NAN_LOGITS, 0, sampler.FAULT_NAN_LOGITS, 0]
    assert all(0 <= token < 100 for token in out.token_ids.tolist())
    assert out.token_ids[[1, 3]].tolist() == good.token_ids[[1, 3]].tolist()


def test_a_mask_that_excludes_all_is_the_requests_fault() -> None:
    masks = torch.zeros(1, 4, dtype=torch.int32)
    parameters = [RowParameters(), RowParameters(temperature=0.0), RowParameters(top_k=5)]
    out, twin = run(torch.randn(3, 100), parameters, masks=masks, mask_rows=[0, 0, -1])
    assert out.faults.tolist() == [sampler.FAULT_NO_TOKEN, sampler.FAULT_NO_TOKEN, 0]
    assert [item.fault for item in twin] == out.faults.tolist()
    assert int(out.token_ids[2]) == twin[2].token_id


def test_top_logprobs_are_sorted_and_exact() -> None:
    vocab_size = 4500
    logits = 3 * torch.randn(4, vocab_size)
    logits[1] = torch.randint(0, 2, (vocab_size,)).float()
    logits[2] = 0.0
    parameters = [RowParameters(num_logprobs=n, temperature=t) for n, t in ((20, 0.7), (5, 0.0), (3, 1.0), (0, 1.0))]
    out, twin = run(logits, parameters, max_top=20)
    assert_same(out, twin)
    for index, item in enumerate(twin):
        count = len(item.top)
        assert out.top_ids[index, :count].tolist() == [token for token, _ in item.top]
        expected = torch.tensor([value for _, value in item.top])
        assert torch.allclose(out.top_logprobs[index, :count].cpu(), expected, atol=1e-4)
        assert (out.top_ids[index, count:] == -1).all()


def test_a_row_draws_the_same_token_alone_and_in_any_batch() -> None:
    logits = 2 * torch.randn(5, 4500)
    parameters = [RowParameters(seed=9 + i, top_p=1.0 if i % 2 else 0.9, temperature=1.3) for i in range(5)]
    positions = [3, 900, 17, 5, 6]
    together, _ = run(logits, parameters, positions=positions)
    for index in range(5):
        alone, _ = run(logits[index : index + 1], [parameters[index]], positions=[positions[index]])
        assert int(alone.token_ids[0]) == int(together.token_ids[index])
        assert float(alone.logprobs[0]) == float(together.logprobs[index])


def test_frequencies_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    noise = [reference_steps.gumbel_noise(42, 0, position, 4) for position in range(4000)]
    drawn = np.stack(noise) + np.log(probabilities.numpy())
    counts = np.bincount(drawn.argmax(axis=1), minlength=4) / 4000
    assert np.abs(counts - probabilities.numpy()).max() < 0.03
    # And the kernel draws from that same noise.
    out, twin = run(probabilities.log().repeat(20, 1), [RowParameters(seed=42)] * 20, positions=list(range(20)))
    assert out.token_ids.tolist() == drawn[:20].argmax(axis=1).tolist() == [item.token_id for item in twin]


def test_misfits_are_refused() -> None:
    rows = allocate_row_state(1, 8, 16, 50, DEVICE)
    workspace = allocate_sampler_workspace(1, 40, DEVICE)
    out = allocate_sampled(1, 0, DEVICE)
    ints = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="do not fit a workspace"):
        sampler.sample(torch.zeros(1, 50, device=DEVICE), ints, ints, rows, workspace, out)
    with pytest.raises(ValueError, match="token counts are for 50 tokens"):
        sampler.sample(torch.zeros(1, 40, device=DEVICE), ints, ints, rows, workspace, out)
    with pytest.raises(ValueError, match="at most 32 top log-probabilities"):
        allocate_sampled(1, 33, DEVICE)
