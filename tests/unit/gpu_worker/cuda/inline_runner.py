"""A `CudaRunner` on the CPU: the same runner, program and kernels, on a timeline on which everything is at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from stepwire_kernels.step_result import result_slot_words

from gpu_worker.assembly import (
    MAX_NUM_LOGPROBS,
    Sizes,
    attention_spec,
    held_kv_scales,
    load_model,
    resolve_kv_dtype,
    without_idle_indexer,
    worker_facts,
)
from gpu_worker.attention.triton_backend import AttentionLimits
from gpu_worker.attention.triton_latent import make_attention
from gpu_worker.config import WorkerSettings
from gpu_worker.cuda.invariant_ops import InvariantTritonOps
from gpu_worker.cuda.ops import TritonOps
from gpu_worker.cuda.packed_linears import PackedLinears
from gpu_worker.cuda.runner import CudaRunner
from gpu_worker.cuda.stage_link import StageLink
from gpu_worker.cuda.step_layout import StepPlanner
from gpu_worker.cuda.step_program import DEALT_ROWS, ProgramBuffers, ProgramLimits, StepProgram
from gpu_worker.cuda.timeline import NUM_SLOTS, StepTimes
from gpu_worker.kv_cache import KVCache, KVCacheShape, MemoryPlan
from gpu_worker.layers.linear import BuildContext
from gpu_worker.models.loader import read_spec
from gpu_worker.parallel.shares import ParallelContext
from gpu_worker.pooling import Pooler, Task, read_pooling
from gpu_worker.quant.scheme import QuantizationSetting, make_scheme


class InlineTimeline:
    """Implements `Timeline`: a step is over when its launches return, as on any device that computes in place."""

    def __init__(self, capacity: int, result_words: int) -> None:
        self.packed = torch.zeros(capacity, dtype=torch.int32)
        self.results = torch.full((NUM_SLOTS, result_words), -7, dtype=torch.int32)
        self._host = np.zeros((NUM_SLOTS, capacity), dtype=np.int32)
        self.num_deltas = 0

    def host_buffer(self, slot: int) -> npt.NDArray[np.int32]:
        return self._host[slot]

    @contextmanager
    def step(self, slot: int, num_words: int) -> Iterator[None]:
        self.packed[:num_words] = torch.from_numpy(self._host[slot, :num_words])
        self.num_deltas += 1
        yield

    def mark_logits(self, slot: int) -> None:
        return None

    @contextmanager
    def arriving(self, slot: int) -> Iterator[None]:
        yield

    def await_arrival(self, slot: int) -> None:
        return None

    def wait(self, slot: int) -> StepTimes:
        return StepTimes(1, 1, -1)


def load_inline(
    directory: Path,
    *,
    max_num_seqs: int = 4,
    max_model_len: int = 96,
    num_blocks: int = 40,
    kv_cache_dtype: str = "auto",
    buffer_words: int = 4096,
    with_graphs: bool = False,
    deterministic: bool = False,
    make_ops: Callable[..., TritonOps] | None = None,
    parallel: ParallelContext | None = None,
    link: StageLink | None = None,
    dealt_rows: int = DEALT_ROWS,
    quantization: QuantizationSetting = "auto",
    task: Task = "auto",
    pooling: str = "auto",
) -> CudaRunner:
    """float32 weights of `directory`, blocks of 16 tokens."""
    device, parallel = torch.device("cpu"), parallel or ParallelContext()
    settings = WorkerSettings(model=directory, device="cpu")
    spec, family = read_spec(directory)
    pooled = read_pooling(directory, spec, family, task, pooling)
    if pooled is not None:
        spec = replace(spec, has_output_head=False)
    sizes = Sizes(block_size=16, max_model_len=max_model_len, max_num_seqs=max_num_seqs, max_num_batched_tokens=128)
    spec = without_idle_indexer(spec, sizes)
    ops = (make_ops or (InvariantTritonOps if deterministic else TritonOps))(device, pdl=False)
    kernels = None if deterministic else PackedLinears(device, pdl=False)
    scheme = make_scheme(
        directory,
        family.name_rules,
        setting=quantization,
        canonical_name=family.canonical_name,
        ops=ops,
        kernels=kernels,
    )
    build = BuildContext(parallel, scheme, torch.float32, device, ops)
    shape = KVCacheShape.of(spec, parallel, 16, resolve_kv_dtype(kv_cache_dtype, torch.float32))
    plan = MemoryPlan("cpu", None, 0, 0, 0, num_blocks, 16)
    model = load_model(settings, family, spec, build, sizes.max_model_len)
    model.allocate_states(max_num_seqs + 1)
    planner = StepPlanner(sizes.max_num_seqs, sizes.max_num_batched_tokens, with_graphs=with_graphs)
    limits = ProgramLimits(
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        max_runs=planner.max_runs,
        max_tokens=planner.max_tokens,
        block_size=16,
        vocab_size=spec.vocab_size,
        max_top=MAX_NUM_LOGPROBS,
    )
    attention = make_attention(
        attention_spec(spec, parallel),
        KVCache(shape, num_blocks, device).layers,
        AttentionLimits(planner.max_runs, planner.max_tokens, planner.max_padding_tokens),
        dtype=torch.float32,
        pdl=False,
        kv_scales=held_kv_scales(spec, model.kv_scales, parallel),
        deterministic=deterministic,
    )
    timeline = InlineTimeline(buffer_words, result_slot_words(planner.max_runs, MAX_NUM_LOGPROBS))
    program = StepProgram(
        model,
        attention,
        ProgramBuffers.allocate(limits, device),
        timeline.packed,
        timeline.results,
        limits,
        pdl=False,
        link=link,
        parallel=parallel,
        dealt_rows=dealt_rows,
    )
    facts = worker_facts(directory, spec, sizes, plan, shape, device, torch.float32, pooled)
    return CudaRunner(
        replace(facts, dtype="float32"),
        program,
        planner,
        timeline,
        None,
        device,
        pooler=None if pooled is None else Pooler(pooled, model),
        is_group=link is not None,
    )
