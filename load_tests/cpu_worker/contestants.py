"""The engines that the CPU benchmark compares: each generates greedily from token-id prompts of equal length."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any, Protocol, Self

import torch

from gpu_worker.config import WorkerSettings
from gpu_worker.runner import TorchRunner
from load_tests.cpu_worker.step_driver import StepDriver, greedy
from load_tests.cpu_worker.timing import Timing
from load_tests.records import RequestRecord
from load_tests.stack import ServedStack
from load_tests.target import TargetSpec, open_target
from load_tests.workload import RequestSpec


class Contestant(Protocol):
    name: str

    def generate(self, prompts: list[list[int]], num_tokens: int) -> Timing:
        """Generate `num_tokens` after every prompt, prefill included, EOS ignored."""
        ...


class Stepwire:
    """The runner, driven directly: no gRPC, no scheduler."""

    name = "stepwire"

    def __init__(self, model: Path, dtype: str, num_threads: int) -> None:
        settings = WorkerSettings(
            model=model, device="cpu", dtype=dtype, num_threads=num_threads, max_model_len=2048, cpu_kv_cache_gib=1
        )
        self._runner = TorchRunner.load(settings)

    def generate(self, prompts: list[list[int]], num_tokens: int) -> Timing:
        driver = StepDriver(self._runner)
        begun = time.perf_counter()
        for row, prompt in enumerate(prompts):
            driver.add(row, prompt, greedy())
        run_prompts(driver)
        while any(len(driven.tokens) < driven.num_prompt_tokens + num_tokens for driven in driver.rows.values()):
            driver.step(
                {
                    row: 1
                    for row, driven in driver.rows.items()
                    if len(driven.tokens) < driven.num_prompt_tokens + num_tokens
                }
            )
        return Timing(len(prompts) * num_tokens, time.perf_counter() - begun)


def run_prompts(driver: StepDriver) -> None:
    """Steps until every row has its first token."""
    budget = driver.facts.max_num_batched_tokens
    while any(driven.num_computed < driven.num_prompt_tokens for driven in driver.rows.values()):
        driver.step(_prefill_chunk(driver, budget))


def _prefill_chunk(driver: StepDriver, budget: int) -> dict[int, int]:
    """Whole and partial prompts up to the step's budget; rows that are done wait."""
    runs: dict[int, int] = {}
    for row, driven in driver.rows.items():
        left = driven.num_prompt_tokens - driven.num_computed
        if left > 0 and budget > 0:
            runs[row] = min(left, budget)
            budget -= runs[row]
    return runs


class ServedStepwire:
    """The whole stack as `stepwire serve` starts it, asked over REST: gateway, control plane, gRPC, worker."""

    name = "stepwire served"
    _served_name = "served"

    def __init__(self, model: Path, dtype: str, num_threads: int) -> None:
        flags = ["--device", "cpu", "--dtype", dtype, "--num-threads", str(num_threads)]
        self._stack = ServedStack(
            [str(model), *flags, "--max-model-len", "2048", "--served-model-name", self._served_name]
        )

    def __enter__(self) -> Self:
        self._stack.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.stop()

    def generate(self, prompts: list[list[int]], num_tokens: int) -> Timing:
        return asyncio.run(self._generate(prompts, num_tokens))

    async def _generate(self, prompts: list[list[int]], num_tokens: int) -> Timing:
        spec = TargetSpec("rest", self._stack.url, model=self._served_name, temperature=0.0)
        async with open_target(spec) as target:
            encoded = [target.encode(RequestSpec(prompt, num_tokens)) for prompt in prompts]
            records = [RequestRecord() for _ in prompts]
            begun = time.perf_counter()
            await asyncio.gather(*map(target.send, encoded, records))
            seconds = time.perf_counter() - begun
        for record in records:
            if record.error is not None or record.num_tokens != num_tokens:
                raise RuntimeError(f"{record.num_tokens} of {num_tokens} tokens came: {record.error}")
        return Timing(len(prompts) * num_tokens, seconds)


class Transformers:
    """`generate` of transformers: padded batches, which equal lengths make free of padding."""

    name = "transformers generate"

    def __init__(self, model: Path, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()

    def generate(self, prompts: list[list[int]], num_tokens: int) -> Timing:
        inputs = torch.tensor(prompts)
        begun = time.perf_counter()
        with torch.inference_mode():
            output = self._model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        seconds = time.perf_counter() - begun
        return Timing(output.numel() - inputs.numel(), seconds)


class TransformersContinuous:
    """`generate_batch` of transformers: its own continuous batching over a paged cache."""

    name = "transformers generate_batch"

    def __init__(self, model: Path, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), attn_implementation="paged|sdpa"
        ).eval()

    def generate(self, prompts: list[list[int]], num_tokens: int) -> Timing:
        from transformers import GenerationConfig

        config = GenerationConfig(
            max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cuda_graph=False
        )
        begun = time.perf_counter()
        results = self._model.generate_batch(prompts, generation_config=config)
        seconds = time.perf_counter() - begun
        generated = sum(len(result.generated_tokens) for result in results.values())
        if generated != len(prompts) * num_tokens:
            raise RuntimeError(f"generate_batch gave {generated} tokens, expected {len(prompts) * num_tokens}")
        return Timing(generated, seconds)
