"""The sampler against plain twins, exact distributions, and its promise that neighbours do not matter."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.runner_api import RowFaultCode, RowSampling
from gpu_worker.sampler import RowSampler, SampledTokens, kept_tokens, sample
from load_tests.cpu_worker.step_driver import sampling

VOCAB = 50


def row(params: RowSampling, tokens: list[int] | None = None, num_prompt: int = 1, vocab: int = VOCAB) -> RowSampler:
    return RowSampler(params, np.array(tokens or [0], dtype=np.int32), num_prompt, vocab)


def draw(logits: torch.Tensor, params: RowSampling, position: int, **kwargs: object) -> int:
    result = sample(logits[None], [row(params, vocab=len(logits), **kwargs)], np.array([position]))  # type: ignore[arg-type]
    assert not result.faults
    return int(result.token_ids[0])


def kept_by_sorting(t: np.ndarray, min_p: float, top_k: int, top_p: float) -> tuple[set[int], bool]:
    """The ids that stay, by sorting everything in Python; and whether top-p's cut is too close to call."""
    alive = {i: float(v) for i, v in enumerate(t) if v > -math.inf}
    if min_p > 0:
        alive = {i: v for i, v in alive.items() if v >= float(np.log(np.float32(min_p)))}
    if 0 < top_k < len(alive):
        kth = sorted(alive.values(), reverse=True)[top_k - 1]
        alive = {i: v for i, v in alive.items() if v >= kth}
    is_close = False
    if top_p < 1:
        masses = {i: float(np.exp(np.float32(v))) for i, v in alive.items()}
        total, above, cut = sum(masses.values()), 0.0, -math.inf
        for i in sorted(alive, key=lambda i: -alive[i]):
            if above >= top_p * total:
                break
            cut = alive[i]
            above += masses[i]
            is_close |= abs(above - top_p * total) < 1e-6 * total
        alive = {i: v for i, v in alive.items() if v >= cut}
    return set(alive), is_close


values = st.floats(-30, 0, width=32)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(values, min_size=1, max_size=60),
    st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    st.sampled_from([0, 1, 2, 7, 59, 1000]),
    st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
    st.booleans(),
)
def test_what_is_kept_equals_sorting(raw: list[float], min_p: float, top_k: int, top_p: float, ties: bool) -> None:
    t = np.array(raw, dtype=np.float32)
    if ties:
        t = np.round(t / 4) * 4
    t = t - t.max()
    expected, is_close = kept_by_sorting(t, min_p, top_k, top_p)
    got = kept_tokens(t, min_p, top_k, top_p)
    got_ids = list(range(len(t))) if got is None else got.tolist()
    assert got_ids == sorted(got_ids)
    if not is_close:
        assert set(got_ids) == expected


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.99999])
def test_top_p_beyond_the_first_guess_sorts_everything(top_p: float) -> None:
    # Nearly flat over 5,000 tokens: far more than the guess are needed.
    t = (np.random.default_rng(0).standard_normal(5000) * 0.1).astype(np.float32)
    t -= t.max()
    got = kept_tokens(t, 0.0, 0, top_p)
    assert got is not None
    assert set(got.tolist()) == kept_by_sorting(t, 0.0, 0, top_p)[0]
    assert len(got) > 1024


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7, "top_k": 4},
        {"top_p": 0.8},
        {"min_p": 0.15, "temperature": 1.3},
        {"top_k": 6, "top_p": 0.9, "min_p": 0.01},
        {"bias": {3: 2.0, 0: -1.0}},
    ],
    ids=str,
)
def test_draws_follow_the_exact_distribution(params: dict[str, object]) -> None:
    logits = np.array([2.0, 1.5, 1.0, 0.5, 0.2, 0.0, -0.5, -1.0, -3.0, 1.2], dtype=np.float32)
    z = logits.astype(np.float64)
    for token, value in params.get("bias", {}).items():  # type: ignore[attr-defined]
        z[token] += value
    t = (z - z.max()) / params.get("temperature", 1.0)
    kept = kept_by_sorting(
        t.astype(np.float32),
        params.get("min_p", 0.0),
        params.get("top_k", 0),
        params.get("top_p", 1.0),  # type: ignore[arg-type]
    )[0]
    mass = np.array([math.exp(v) if i in kept else 0.0 for i, v in enumerate(t)])
    expected = mass / mass.sum()
    num_draws = 2000
    sampler = row(sampling(seed=99, **params), vocab=10)  # type: ignore[arg-type]
    batch = torch.from_numpy(logits).expand(500, -1)
    counts: Counter[int] = Counter()
    for first in range(0, num_draws, 500):
        counts.update(sample(batch, [sampler] * 500, np.arange(first, first + 500)).token_ids.tolist())
    assert set(counts) <= kept
    possible = expected > 0
    chi_square = sum(
        (counts[i] - num_draws * expected[i]) ** 2 / (num_draws * expected[i]) for i in np.flatnonzero(possible)
    )
    degrees = int(possible.sum()) - 1
    # The mean of the chi-square distribution plus five of its standard deviations.
    assert chi_square < degrees + 5 * math.sqrt(2 * max(degrees, 1))


def test_the_sequences_of_a_request_draw_independently() -> None:
    logits = torch.zeros(16)
    first, second = (
        [draw(logits, sampling(seed=5, sequence_index=index), position) for position in range(400)] for index in (0, 1)
    )
    equal = sum(a == b for a, b in zip(first, second, strict=True))
    assert first != second and abs(equal - 25) < 25


every_kind = st.sampled_from(
    [
        sampling(temperature=0.0),
        sampling(seed=1),
        sampling(seed=2, temperature=0.7, top_p=0.9),
        sampling(seed=3, top_k=5, num_logprobs=3),
        sampling(seed=4, min_p=0.05, repetition_penalty=1.3, frequency_penalty=0.2),
        sampling(temperature=0.0, num_logprobs=0, bias={7: 4.0}),
        sampling(seed=6, suppressed=[1, 2], min_tokens=5, allowed=list(range(0, VOCAB, 2))),
    ]
)


def one_result(result: SampledTokens, index: int, num_logprobs: int | None) -> tuple[object, ...]:
    if num_logprobs is None:
        return (int(result.token_ids[index]),)
    assert result.logprobs is not None and result.top_logprobs is not None and result.top_token_ids is not None
    return (
        int(result.token_ids[index]),
        result.logprobs[index].tobytes(),
        result.top_logprobs[index, :num_logprobs].tobytes(),
        result.top_token_ids[index, :num_logprobs].tobytes(),
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(every_kind, min_size=2, max_size=12), st.integers(0, 2**31), st.randoms(use_true_random=False))
def test_neighbours_and_order_do_not_matter_bit_for_bit(kinds: list[RowSampling], seed: int, random: object) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(kinds), VOCAB, generator=generator) * 3
    histories = [[int(t) for t in torch.randint(0, VOCAB, (5,), generator=generator)] for _ in kinds]
    positions = torch.randint(5, 5000, (len(kinds),), generator=generator).numpy()

    def run(order: list[int]) -> dict[int, tuple[object, ...]]:
        rows = [row(kinds[i], histories[i], num_prompt=2) for i in order]
        result = sample(logits[order], rows, positions[order])
        assert not result.faults
        return {i: one_result(result, at, kinds[i].num_logprobs) for at, i in enumerate(order)}

    together = run(list(range(len(kinds))))
    shuffled = list(range(len(kinds)))
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert run(shuffled) == together
    for index in range(len(kinds)):
        assert run([index])[index] == together[index]


def test_greedy_takes_the_largest_and_the_lowest_id_among_equals() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 2.0], [9.0, 1.0, 9.0, 9.0]])
    rows = [row(sampling(temperature=0.0), vocab=4)] * 2
    assert sample(logits, rows, np.array([1, 1])).token_ids.tolist() == [1, 0]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.floats(-10, 10, width=32), min_size=12, max_size=12),
    st.lists(st.integers(0, 11), min_size=1, max_size=20),
    st.data(),
    st.sampled_from([1.0, 1.5, 0.8]),
    st.sampled_from([0.0, 0.7, -1.0]),
    st.sampled_from([0.0, 0.3, -0.4]),
)
def test_penalties_equal_a_plain_twin_also_while_tokens_are_added(
    raw: list[float],
    tokens: list[int],
    data: st.DataObject,
    repetition: float,
    presence: float,
    frequency: float,
) -> None:
    from gpu_worker.sampler import adjust_logits

    num_prompt = data.draw(st.integers(1, len(tokens)))
    known_at_start = data.draw(st.integers(num_prompt, len(tokens)))
    params = sampling(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency, temperature=0.0
    )
    sampler = row(params, tokens[:known_at_start], num_prompt, vocab=12)
    for token in tokens[known_at_start:]:
        sampler.append(token)
    got = adjust_logits(np.array(raw, dtype=np.float32), sampler, len(tokens), None)
    output = Counter(tokens[num_prompt:])
    for token, logit in enumerate(raw):
        expected = logit
        if token in tokens:
            expected = logit / repetition if logit > 0 else logit * repetition
        expected -= frequency * output[token] + (presence if output[token] else 0.0)
        assert got[token] == pytest.approx(expected, abs=1e-5)


def test_many_distinct_tokens_outgrow_the_history_s_first_size() -> None:
    sampler = row(sampling(presence_penalty=1.0), [0], vocab=500)
    for token in range(1, 400):
        sampler.append(token)
    from gpu_worker.sampler import adjust_logits

    got = adjust_logits(np.zeros(500, dtype=np.float32), sampler, 400, None)
    assert got[1:400].tolist() == [-1.0] * 399 and got[0] == 0 and not got[400:].any()


def test_min_tokens_suppresses_until_enough_are_generated() -> None:
    logits = torch.tensor([0.0, 9.0, 1.0])
    params = sampling(temperature=0.0, min_tokens=2, suppressed=[1])
    # One prompt token: the token at position p is output number p - 1.
    assert [draw(logits, params, position) for position in (1, 2, 3)] == [2, 2, 1]


def test_allowed_tokens_bias_and_mask_narrow_the_choice() -> None:
    logits = torch.tensor([5.0, 4.0, 3.0, 2.0])
    assert draw(logits, sampling(temperature=0.0, allowed=[2, 3]), 1) == 2
    assert draw(logits, sampling(temperature=0.0, bias={3: 10.0}), 1) == 3
    assert draw(logits, sampling(temperature=0.0, bias={0: -math.inf}), 1) == 1
    rows = [row(sampling(temperature=0.0), vocab=4), row(sampling(seed=1), vocab=4)]
    bitmask = np.array([0b1000], dtype=np.uint32)
    result = sample(torch.stack([logits, logits]), rows, np.array([1, 1]), [bitmask, bitmask])
    assert result.token_ids.tolist() == [3, 3]


def test_bitmask_bit_i_of_word_w_is_token_32_w_plus_i() -> None:
    for token in (0, 31, 32, 63, 64, 69):
        bitmask = np.zeros(3, dtype=np.uint32)
        bitmask[token // 32] = np.uint32(1) << np.uint32(token % 32)
        result = sample(torch.zeros(1, 70), [row(sampling(seed=3), vocab=70)], np.array([1]), [bitmask])
        assert result.token_ids.tolist() == [token]


def test_nothing_left_to_draw_fails_that_row_alone() -> None:
    rows = [row(sampling(allowed=[1]), vocab=4), row(sampling(temperature=0.0), vocab=4)]
    bitmask = np.array([0b0101], dtype=np.uint32)
    result = sample(torch.arange(8.0).view(2, 4), rows, np.array([1, 1]), [bitmask, None])
    assert [(fault.index, fault.code) for fault in result.faults] == [(0, RowFaultCode.UNSUPPORTED)]
    assert result.token_ids[1] == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_is_not_finite_fails_alone(bad: float, dtype: torch.dtype) -> None:
    logits = torch.randn(3, 1000).to(dtype)
    logits[1, 700] = bad
    rows = [row(sampling(temperature=0.0), vocab=1000) for _ in range(3)]
    result = sample(logits, rows, np.array([1, 1, 1]))
    assert [(fault.index, fault.code) for fault in result.faults] == [(1, RowFaultCode.NOT_FINITE)]
    assert result.token_ids[0] == int(logits[0].float().argmax()) and result.token_ids[2] == int(
        logits[2].float().argmax()
    )


def test_logprobs_are_of_the_raw_distribution_and_nan_where_not_asked() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, VOCAB)
    rows = [
        row(sampling(temperature=0.3, top_k=2, bias={4: 5.0}, seed=1, num_logprobs=4)),
        row(sampling(temperature=0.0)),
        row(sampling(temperature=0.0, num_logprobs=0)),
    ]
    result = sample(logits, rows, np.array([1, 1, 1]))
    expected = torch.log_softmax(logits.double(), -1)
    assert result.logprobs is not None and result.top_token_ids is not None and result.top_logprobs is not None
    assert result.top_token_ids.shape == (3, 4)
    assert result.logprobs[0] == pytest.approx(float(expected[0, result.token_ids[0]]), abs=1e-5)
    assert math.isnan(result.logprobs[1])
    assert result.logprobs[2] == pytest.approx(float(expected[2].max()), abs=1e-5)
    top = expected[0].topk(4)
    assert result.top_token_ids[0].tolist() == top.indices.tolist()
    np.testing.assert_allclose(result.top_logprobs[0], top.values.numpy(), atol=1e-5)


def test_no_logprob_arrays_where_no_row_asks() -> None:
    result = sample(torch.zeros(1, 4), [row(sampling(), vocab=4)], np.array([1]))
    assert result.logprobs is None and result.top_token_ids is None and result.top_logprobs is None


def test_a_tiny_temperature_is_greedy_and_not_an_overflow() -> None:
    logits = torch.tensor([1.0, 30.0, 29.9])
    assert {draw(logits, sampling(temperature=1e-38, seed=seed), 1) for seed in range(20)} == {1}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(1, 100_000), st.integers(0, 2**31))
def test_the_kernels_twin_draws_the_same_token(seed: int, position: int, logit_seed: int) -> None:
    reference_steps = pytest.importorskip("stepwire_kernels.reference_steps", reason="triton is not installed")
    logits = torch.randn(3000, generator=torch.Generator().manual_seed(logit_seed)) * 2
    for params in ({}, {"top_k": 40, "top_p": 0.9}, {"min_p": 0.1, "temperature": 0.6}):
        twin = reference_steps.RowParameters(**({"temperature": 1.0} | params), seed=seed, sequence_index=2)
        expected = reference_steps.sample_row(logits, twin, position).token_id
        assert draw(logits, sampling(**params, seed=seed, sequence_index=2), position) == expected  # type: ignore[arg-type]
