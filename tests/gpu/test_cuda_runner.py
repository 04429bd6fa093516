"""The CUDA runner on a GPU: the CPU worker's tokens in float32, transformers' numbers in bfloat16, graphs as eager."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v3 import DeepseekV3Config
from transformers.models.gpt_oss import GptOssConfig
from transformers.models.llama import LlamaConfig
from transformers.models.qwen3 import Qwen3Config
from transformers.models.qwen3_moe import Qwen3MoeConfig

from gpu_worker.config import WorkerSettings
from gpu_worker.runner import TorchRunner
from gpu_worker.runner_api import Runner, StepResult, TokenMask
from load_tests.cpu_worker.step_driver import StepDriver, greedy, sampling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

VOCAB_SIZE = 2000
KINDS = ("llama", "qwen3", "window", "qwen3-moe", "gpt-oss", "deepseek-v2", "deepseek-v3")


def save_model(directory: Path, kind: str) -> None:
    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64 if kind == "window" else 128,
        "max_position_embeddings": 2048,
        "initializer_range": 0.08,
    }
    torch.manual_seed(11)
    if kind == "qwen3":
        config: Any = Qwen3Config(**fields)
    elif kind == "window":
        config = Qwen3Config(**fields, use_sliding_window=True, sliding_window=100, max_window_layers=2)
    elif kind == "qwen3-moe":
        config = Qwen3MoeConfig(
            **fields, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=192, norm_topk_prob=True
        )
    elif kind == "gpt-oss":
        fields |= {"head_dim": 64, "intermediate_size": 256}
        config = GptOssConfig(**fields, num_local_experts=8, num_experts_per_tok=2, sliding_window=100)
    elif kind.startswith("deepseek"):
        fields |= {"num_key_value_heads": 8, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32}
        fields |= {"v_head_dim": 64, "n_routed_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 192}
        fields |= {"first_k_dense_replace": 1, "n_group": 4, "topk_group": 2}
        del fields["head_dim"]
        if kind == "deepseek-v2":
            config = DeepseekV2Config(**fields, topk_method="group_limited_greedy", q_lora_rank=None)
        else:
            config = DeepseekV3Config(**fields, q_lora_rank=128)
    else:
        config = LlamaConfig(**fields)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)


@pytest.fixture(scope="module", params=KINDS)
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp(request.param)
    save_model(directory, request.param)
    return directory


def load(directory: Path, **changes: Any) -> Runner:
    from gpu_worker.cuda.loading import load_cuda_runner
    from gpu_worker.cuda.runner import CudaRunner

    values: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 12, "max_model_len": 1024}
    values |= {"gpu_memory_utilization": 0.05, "max_num_batched_tokens": 512}
    settings = WorkerSettings(model=directory, device="cuda", **(values | changes))
    runner = load_cuda_runner(settings, torch.device("cuda", 0))
    assert isinstance(runner, CudaRunner)
    return runner


def load_cpu(directory: Path) -> Runner:
    settings = WorkerSettings(
        model=directory, device="cpu", dtype="float32", max_num_seqs=12, max_model_len=1024, block_size=64
    )
    return TorchRunner.load(settings)


def prompt(seed: int, length: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, VOCAB_SIZE, length)]


Drive = Callable[[StepDriver], list[StepResult]]


def chunks_and_decodes(driver: StepDriver) -> list[StepResult]:
    driver.add(0, prompt(1, 300), greedy())
    driver.add(5, prompt(2, 65), greedy())
    results = [driver.step({0: 128, 5: 64}), driver.step({0: 100, 5: 1})]
    driver.add(3, prompt(3, 1), greedy())
    results += [driver.step({0: 72, 5: 1, 3: 1})]
    return results + [driver.step() for _ in range(70)]


def prefixes_and_preemption(driver: StepDriver) -> list[StepResult]:
    shared = prompt(4, 128)
    driver.add(0, [*shared, 7], greedy())
    results = [driver.step()]
    for row in range(1, 8):
        driver.add(row, [*shared, *prompt(row, 3 * row)], greedy(), prefix_of=0, num_shared_tokens=128)
    for number in range(20):
        results.append(driver.step())
        if number == 9:
            tokens = driver.drop(4)
            driver.add(11, tokens, greedy(), num_prompt_tokens=140)
    return results


def sampled_with_everything(driver: StepDriver) -> list[StepResult]:
    driver.add(0, prompt(20, 30), sampling(temperature=0.9, top_p=0.9, seed=1))
    driver.add(1, prompt(21, 30), sampling(temperature=0.7, top_k=40, seed=2**63, repetition_penalty=1.2))
    driver.add(2, prompt(22, 9), sampling(temperature=1.1, min_p=0.05, seed=3, presence_penalty=0.3, num_logprobs=5))
    driver.add(
        3, prompt(23, 9), sampling(temperature=0, bias={5: 3.0}, min_tokens=4, suppressed=[9], allowed=range(50))
    )
    results = [driver.step() for _ in range(10)]
    bitmask = np.zeros((1, -(-VOCAB_SIZE // 32)), dtype=np.uint32)
    bitmask[0, 10] = 0xFFFF
    results.append(driver.step(mask=TokenMask(np.array([0], dtype=np.uint32), bitmask)))
    return results + [driver.step() for _ in range(5)]


SCENARIOS = (chunks_and_decodes, prefixes_and_preemption, sampled_with_everything)


def assert_same(ours: list[StepResult], theirs: list[StepResult]) -> None:
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert one.rows.tolist() == other.rows.tolist(), f"step {number}"
        assert one.token_ids.tolist() == other.token_ids.tolist(), f"step {number}"
        assert not one.faults and not other.faults
        assert (one.logprobs is None) == (other.logprobs is None)
        if one.logprobs is not None and other.logprobs is not None:
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-3)


def test_float32_tokens_equal_the_cpu_worker(model_dir: Path) -> None:
    cuda, cpu = load(model_dir), load_cpu(model_dir)
    for drive in SCENARIOS:
        # Twice: the first use of a bucket is eager, the next a graph.
        theirs = drive(StepDriver(cpu))
        assert_same(drive(StepDriver(cuda)), theirs)
        assert_same(drive(StepDriver(cuda)), theirs)


def test_graphs_equal_eager_launches(model_dir: Path) -> None:
    graphs, eager = load(model_dir, dtype="bfloat16"), load(model_dir, dtype="bfloat16", enforce_eager=True)
    while graphs.idle():  # type: ignore[attr-defined]
        pass
    for drive in SCENARIOS:
        assert_same(drive(StepDriver(graphs)), drive(StepDriver(eager)))


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_bfloat16_logprobs_are_as_near_to_float32_as_transformers_are(model_dir: Path, kv_cache_dtype: str) -> None:
    tokens = prompt(40, 500)
    driver = StepDriver(load(model_dir, dtype="bfloat16", kv_cache_dtype=kv_cache_dtype))
    driver.add(0, tokens, greedy(num_logprobs=20))
    driver.step({0: 300})
    result = driver.step()
    assert result.top_token_ids is not None and result.top_logprobs is not None
    ids = torch.from_numpy(result.top_token_ids[0].astype(np.int64))
    references = []
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation="eager").cuda()
        with torch.inference_mode():
            logits = model(torch.tensor([tokens], device="cuda")).logits[0, -1].float()
        references.append(torch.log_softmax(logits, -1).cpu()[ids])
    ours = torch.from_numpy(result.top_logprobs[0])
    error = (ours - references[0]).abs().mean()
    theirs = (references[1] - references[0]).abs().mean()
    factor = 8 if kv_cache_dtype == "fp8" else 2
    assert error <= factor * theirs + 0.01, f"ours {error:.4f}, transformers in bfloat16 {theirs:.4f}"


def test_a_seeded_row_draws_the_same_in_any_batch(model_dir: Path) -> None:
    runner = load(model_dir)
    params = sampling(temperature=0.9, top_p=0.95, seed=77, sequence_index=2, frequency_penalty=0.1)
    alone = StepDriver(runner)
    alone.add(0, prompt(50, 40), params)
    for _ in range(30):
        alone.step()
    beside = StepDriver(runner)
    for row in range(9):
        beside.add(row, prompt(60 + row, 10 * row + 1), sampling(seed=row))
    beside.add(10, prompt(50, 40), params)
    for _ in range(30):
        beside.step()
    assert beside.rows[10].tokens == alone.rows[0].tokens


def test_two_steps_in_flight_give_the_same_tokens(model_dir: Path) -> None:
    """Steps launched before the ones ahead of them have been read."""
    from load_tests.gpu.pipeline import Pipeline

    runner = load(model_dir)
    waiting = StepDriver(runner)
    for row in range(4):
        waiting.add(row, prompt(row, 100), greedy())
    expected = [waiting.step().token_ids.tolist() for _ in range(40)]
    pipeline = Pipeline(runner, depth=3)
    for row in range(4):
        pipeline.add(row, prompt(row, 100), greedy())
    pipeline.launch({row: 100 for row in range(4)}, samples=True)
    for _ in range(39):
        pipeline.launch({row: 1 for row in range(4)}, samples=True)
    pipeline.finish()
    assert [result.token_ids.tolist() for result in pipeline.results] == expected
