"""Shares per rank, and a real group of processes that must compute what one rank computes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from gpu_worker.parallel.shares import ParallelContext, ParallelError
from tests.unit.gpu_worker.models.tiny_checkpoints import save_tiny
from tests.unit.gpu_worker.parallel import tensor_parallel_ranks

ROOT = Path(__file__).resolve().parents[4]


@given(st.integers(1, 16), st.integers(1, 64))
def test_shares_of_all_ranks_tile_the_dimension(size: int, per_rank: int) -> None:
    shares = [ParallelContext(rank, size).share(size * per_rank, "width") for rank in range(size)]
    assert [index for share in shares for index in range(share.start, share.stop)] == list(range(size * per_rank))


@given(st.integers(1, 16), st.integers(1, 1000))
def test_padded_shares_are_equal_and_cover(size: int, total: int) -> None:
    shares = [ParallelContext(rank, size).padded_share(total) for rank in range(size)]
    assert len({share.size for share in shares}) == 1
    assert shares[-1].stop >= total and shares[-1].stop - total < size
    assert [share.start for share in shares] == [rank * shares[0].size for rank in range(size)]


@given(st.integers(1, 16), st.integers(0, 100))
def test_every_row_is_dealt_to_one_rank(size: int, num_rows: int) -> None:
    ranks = [ParallelContext(rank, size) for rank in range(size)]
    assert [row for rank in ranks for row in range(num_rows)[rank.own_rows(num_rows)]] == list(range(num_rows))
    for number, rank in enumerate(ranks):
        assert all(row // rank.rows_each(num_rows) == number for row in range(num_rows)[rank.own_rows(num_rows)])


@given(st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([1, 2, 4, 8]), st.integers(1, 4))
def test_every_rank_holds_the_kv_heads_that_its_query_heads_read(size: int, num_kv_heads: int, factor: int) -> None:
    num_heads = max(size, num_kv_heads) * factor
    group = num_heads // num_kv_heads
    for rank in range(size):
        heads = ParallelContext(rank, size).heads(num_heads, num_kv_heads)
        read = {query // group for query in range(heads.query.start, heads.query.stop)}
        assert read == set(range(heads.kv.start, heads.kv.stop))


def test_what_cannot_be_split_is_named_with_both_numbers() -> None:
    with pytest.raises(
        ParallelError, match=r"intermediate_size 92 does not divide by tensor_parallel_size 8: .* divisor of 92"
    ):
        ParallelContext(0, 8).share(92, "intermediate_size")
    with pytest.raises(ParallelError, match=r"num_key_value_heads 3 .* tensor_parallel_size 2"):
        ParallelContext(0, 2).heads(6, 3)


@pytest.mark.parametrize(
    ("name", "size", "experts"),
    [
        # Biases, a tied table, a vocabulary of 301 that does not divide: every layer's split is in it.
        ("llama-tied-bias", 2, "width"),
        pytest.param("qwen2-window", 3, "width", marks=pytest.mark.slow),
        pytest.param("qwen2-moe", 2, "width", marks=pytest.mark.slow),
        ("mixtral", 2, "expert"),
        # Layers that read another's cache, per-layer embeddings; KV heads that divide in some layers only.
        ("gemma4", 2, "width"),
        pytest.param("gemma4-large", 3, "width", marks=pytest.mark.slow),
        pytest.param("gemma4-moe", 2, "expert", marks=pytest.mark.slow),
        pytest.param("gpt-oss", 2, "width", marks=pytest.mark.slow),
        pytest.param("gpt-oss", 3, "expert", marks=pytest.mark.slow),
        pytest.param("granite-moe-shared", 2, "width", marks=pytest.mark.slow),
        pytest.param("deepseek-v3", 2, "expert", marks=pytest.mark.slow),
        # Every rank chooses the same tokens.
        pytest.param("deepseek-v3.2", 2, "width", marks=pytest.mark.slow),
        # More ranks than KV heads: a norm over the whole projection counts each copy.
        pytest.param("olmo2", 6, "width", marks=pytest.mark.slow),
        # States are split with the key heads; queries, keys and values stored apart, and in one.
        ("qwen3.5", 2, "width"),
        pytest.param("qwen3-next", 2, "width", marks=pytest.mark.slow),
        pytest.param("phi3", 2, "width", marks=pytest.mark.slow),
        pytest.param("cohere-plus", 2, "width", marks=pytest.mark.slow),
    ],
)
def test_a_group_of_processes_computes_what_one_rank_computes(
    name: str, size: int, experts: str, tmp_path: Path
) -> None:
    # What divides by the ranks: experts, and KV heads or the ranks by them.
    changes = {
        ("mixtral", 2): {"num_local_experts": 4},
        ("gemma4-large", 3): {"num_global_key_value_heads": 1},
        ("gemma4-moe", 2): {"num_experts": 8, "num_key_value_heads": 2, "num_global_key_value_heads": 1},
        ("gpt-oss", 3): {"num_key_value_heads": 3},
        ("deepseek-v3.2", 2): {"pad_token_id": None},
    }
    save_tiny(name, tmp_path, **changes.get((name, size), {}))
    expected = tensor_parallel_ranks.prompt_logits(tmp_path, ParallelContext())
    torch.testing.assert_close(logits_of_group(tmp_path, size, experts), expected, atol=1e-4, rtol=1e-4)


def logits_of_group(directory: Path, size: int, experts: str) -> torch.Tensor:
    output = directory / "logits.safetensors"
    done = subprocess.run(
        [sys.executable, "-m", tensor_parallel_ranks.__name__, str(size), experts, str(directory), str(output)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "proto", "kernels"))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return load_file(output)["logits"]
