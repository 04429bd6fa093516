"""What a worker's description means, and which workers may serve side by side."""

from __future__ import annotations

from typing import Any

import pytest
from stepwire.v1 import worker_pb2

from control_plane.core.engine_config import EngineConfig
from control_plane.core.group_facts import admission_limits, check_may_serve, model_facts, scheduler_config
from control_plane.core.worker_link import WorkerRefused

CONFIG = EngineConfig()


def worker(**values: Any) -> worker_pb2.DescribeResponse:
    described = {
        "model": "m",
        "architecture": "LlamaForCausalLM",
        "dtype": "bfloat16",
        "kv_cache_dtype": "bfloat16",
        "num_blocks": 101,
        "first_block_id": 1,
        "block_size": 16,
        "max_model_len": 1000,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
        "vocab_size": 100,
        "version": "0.1.0",
    }
    return worker_pb2.DescribeResponse(**described | values)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model": "n"}, "model 'n' instead of 'm'"),
        ({"vocab_size": 101}, "vocab_size 101 instead of 100"),
        ({"version": "0.2.0"}, "version '0.2.0' instead of '0.1.0'"),
        ({"dtype": "float16"}, "dtype 'float16' instead of 'bfloat16'"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype 'fp8'"),
        ({"architecture": "Qwen3ForCausalLM"}, "architecture 'Qwen3ForCausalLM'"),
        ({"block_size": 32}, "block_size 32 instead of 16"),
        ({"capabilities": [worker_pb2.CAPABILITY_TOKEN_MASK]}, "can_mask_tokens True instead of False"),
        ({"max_model_len": 999}, "max_model_len 999 instead of 1000"),
        ({"num_blocks": 40}, "max_model_len 624 instead of 1000"),
    ],
)
def test_a_worker_that_differs_is_refused_by_what_differs(values: dict[str, Any], said: str) -> None:
    with pytest.raises(WorkerRefused) as refused:
        check_may_serve(worker(**values), CONFIG, model_facts(worker(), CONFIG), [worker()])
    assert said in str(refused.value)
    assert "\n" not in str(refused.value), "one message"


def test_everything_that_differs_is_named_at_once() -> None:
    with pytest.raises(WorkerRefused, match=r"model 'n' .*vocab_size 7 .*version '9'"):
        check_may_serve(worker(model="n", vocab_size=7, version="9"), CONFIG, model_facts(worker(), CONFIG), [worker()])


@pytest.mark.parametrize(
    "values",
    [{}, {"num_blocks": 5000}, {"num_blocks": 70}, {"max_num_seqs": 4}, {"buckets": [8, 64]}, {"max_model_len": 2000}],
)
def test_size_may_differ_as_long_as_what_was_promised_fits(values: dict[str, Any]) -> None:
    check_may_serve(worker(**values), CONFIG, model_facts(worker(), CONFIG), [worker()])


def test_alone_a_worker_may_come_back_with_another_version() -> None:
    check_may_serve(worker(version="0.2.0", block_size=32), CONFIG, model_facts(worker(), CONFIG), [])
    check_may_serve(worker(), CONFIG, None, [])


def test_rows_with_states_share_nothing() -> None:
    usual, stateful = scheduler_config(worker(), CONFIG), scheduler_config(worker(keeps_row_states=True), CONFIG)
    assert (usual.enable_prefix_caching, usual.shares_blocks) == (True, True)
    assert (stateful.enable_prefix_caching, stateful.shares_blocks) == (False, False)


def test_a_sequence_has_to_fit_the_pool_and_a_step_its_bucket() -> None:
    small = worker(num_blocks=11, buckets=[16, 128, 300])
    assert model_facts(small, CONFIG).max_model_len == 160
    assert scheduler_config(small, CONFIG).max_num_batched_tokens == 300
    assert scheduler_config(small, EngineConfig(max_num_batched_tokens=200)).max_num_batched_tokens == 128
    assert scheduler_config(worker(), EngineConfig(max_num_batched_tokens=10_000)).max_num_batched_tokens == 512
    limits = admission_limits(small, model_facts(worker(max_model_len=150), CONFIG), CONFIG)
    assert (limits.max_model_len, limits.num_usable_blocks) == (150, 10)
