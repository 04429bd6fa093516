"""Puts a `CudaRunner` together: what the GPU must be able to do, the model, the memory plan, the buffers."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import structlog
import torch
from stepwire_kernels.delta_runs import unsupported_heads, unsupported_width
from stepwire_kernels.experts import default_expert_tuning, default_packed_tuning
from stepwire_kernels.step_result import result_slot_words

from gpu_worker.assembly import (
    MAX_NUM_LOGPROBS,
    Sizes,
    agree_on_sizes,
    attention_spec,
    held_kv_scales,
    load_model,
    plan_memory,
    resolve_kv_dtype,
    resolve_sizes,
    without_idle_indexer,
    worker_facts,
)
from gpu_worker.attention.api import backends_of
from gpu_worker.attention.triton_backend import AttentionLimits, TritonAttention, unsupported_attention
from gpu_worker.attention.triton_latent import TritonLatentAttention, make_attention
from gpu_worker.config import WorkerSettings
from gpu_worker.cuda.compiling import compile_in_parallel
from gpu_worker.cuda.invariant_ops import InvariantTritonOps
from gpu_worker.cuda.ops import TritonOps
from gpu_worker.cuda.packed_linears import PackedLinears
from gpu_worker.cuda.peer_collectives import (
    Choices,
    PeerCollectives,
    PeerSizes,
    agree_on_choices,
    open_peer_collectives,
)
from gpu_worker.cuda.runner import CudaRunner
from gpu_worker.cuda.stage_link import LinkSizes, StageLink, open_stage_link
from gpu_worker.cuda.step_graphs import StepGraphs
from gpu_worker.cuda.step_layout import GRAPH_TOKENS, TOKEN_MULTIPLE, StepPlanner
from gpu_worker.cuda.step_program import ProgramBuffers, ProgramLimits, StepProgram
from gpu_worker.cuda.timeline import CudaTimeline, num_slots
from gpu_worker.device import resolve_dtype
from gpu_worker.invariant.coverage import CoveredScheme, refuse_uncovered
from gpu_worker.kv_cache import GIB, KVCache, KVCacheShape, MemoryBudgetError, activation_bytes
from gpu_worker.layers.linear import BuildContext
from gpu_worker.layers.moe import expert_form
from gpu_worker.layers.scaled_experts import needs_float8
from gpu_worker.model_spec import ModelConfigError, ModelSpec
from gpu_worker.models.family import ModelFamily
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.models.loader import read_spec
from gpu_worker.parallel.process_group import RankGroup, single_rank
from gpu_worker.parallel.shares import ParallelContext
from gpu_worker.pooling import Pooler, PoolingSpec, read_pooling
from gpu_worker.prompt_logprobs import PROMPT_LOGITS_BYTES
from gpu_worker.quant.api import QuantScheme
from gpu_worker.quant.none import Unquantized
from gpu_worker.quant.scheme import make_scheme, read_quantization
from gpu_worker.runner import TorchRunner
from gpu_worker.runner_api import Runner

log = structlog.get_logger(__name__)

MIN_CAPABILITY = (8, 0)
PDL_CAPABILITY = (9, 0)
# From here on Triton converts float8_e4m3fn.
FLOAT8_CAPABILITY = (8, 9)
# Words of a step buffer: prompts that are added together beyond this travel in several copies.
BUFFER_WORDS = 1 << 20
# Graphs' own memory. Their intermediate tensors are counted beside it: the pool keeps them apart from eager steps'.
GRAPH_BYTES = GIB
WARM_UP_TOKENS = 256
# Packed linears have a kernel for each of these, and one that makes weights dense.
PACKED_TOKENS = (8, 16, 32, 64, 128, 256, 1024)


@dataclass(frozen=True, slots=True)
class _Parts:
    """Limits that follow from a worker's sizes."""

    planner: StepPlanner
    program: ProgramLimits
    attention: AttentionLimits

    @classmethod
    def of(cls, sizes: Sizes, vocab_size: int, *, with_graphs: bool) -> _Parts:
        planner = StepPlanner(sizes.max_num_seqs, sizes.max_num_batched_tokens, with_graphs=with_graphs)
        return cls(
            planner,
            ProgramLimits(
                max_num_seqs=sizes.max_num_seqs,
                max_model_len=sizes.max_model_len,
                max_runs=planner.max_runs,
                max_tokens=planner.max_tokens,
                block_size=sizes.block_size,
                vocab_size=vocab_size,
                max_top=MAX_NUM_LOGPROBS,
            ),
            AttentionLimits(planner.max_runs, planner.max_tokens, planner.max_padding_tokens),
        )


def load_cuda_runner(settings: WorkerSettings, device: torch.device, group: RankGroup | None = None) -> Runner:
    """The runner for a CUDA device; the plain torch runner, with a warning, where the kernels cannot serve the model.

    Every rank of a group decides alike: the model, the settings and the kind of device are the same for all.

    Raises:
        ModelConfigError, CheckpointError, MemoryBudgetError: as `TorchRunner.load`.
    """
    if settings.model is None:
        raise ModelConfigError("no model is set: give the model's directory with --model")
    spec, family = read_spec(settings.model)
    group = group or single_rank(spec.num_layers)
    parallel = group.context()
    dtype = resolve_dtype(settings.dtype, device, spec.dtype)
    sizes = resolve_sizes(settings, spec, device)
    spec = without_idle_indexer(spec, sizes)
    if settings.deterministic:
        refuse_uncovered(spec, family)
    reason = _unsupported(spec, parallel, sizes, device) or _packed_experts(
        settings, settings.model, spec, family, device
    )
    if family.host_plans_attention:
        reason = f"{spec.architecture} runs through transformers' own code"
    pooling = read_pooling(settings.model, spec, family, settings.task, settings.pooling)
    if pooling is not None:
        spec = replace(spec, has_output_head=False)
        if family.is_encoder:
            reason = f"{spec.architecture} is an encoder"
        elif group.layout.num_stages > 1:
            reason = "vectors and scores are pooled in plain torch where layers are split over stages"
    link: StageLink | None = None
    if reason is None and group.layout.num_stages > 1:
        torch.cuda.set_device(device)
        sizes_of_link = _link_sizes(group, spec, sizes, dtype, with_graphs=not settings.enforce_eager)
        link = open_stage_link(group, device, sizes_of_link, pdl=_has_pdl(device))
        if link is None:
            reason = "stages do not map each other's memory, and hidden states go through the host"
    if reason is not None:
        log.warning("the CUDA kernels cannot run this: plain torch does, many times slower", reason=reason)
        return TorchRunner.load(settings, group)
    if settings.kv_cache_dtype == "fp8" and not _reads_float8(device):
        raise ModelConfigError(
            f"kv_cache_dtype fp8: {_too_old(device, FLOAT8_CAPABILITY)} for it: set --kv-cache-dtype auto, bfloat16 or "
            "float16"
        )
    try:
        return _load_supported(settings, settings.model, device, spec, family, sizes, dtype, group, link, pooling)
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise MemoryBudgetError(
            f"{device} ran out of memory while loading, with {free / GIB:.2f} of {total / GIB:.2f} GiB free: other "
            "processes use it, or the weights do not fit; free it, or set a lower --gpu-memory-utilization"
        ) from error


def _load_supported(
    settings: WorkerSettings,
    directory: Path,
    device: torch.device,
    spec: ModelSpec,
    family: type[ModelFamily],
    sizes: Sizes,
    dtype: torch.dtype,
    group: RankGroup,
    link: StageLink | None,
    pooling: PoolingSpec | None,
) -> CudaRunner:
    parallel = group.context()
    begun = time.monotonic()
    torch.cuda.set_device(device)
    pdl = _has_pdl(device)
    shared_bytes = sent_rows = 0
    if parallel.collectives is not None:
        peer_sizes = _peer_sizes(spec, parallel, sizes, dtype, agree_on_choices(group, device))
        # A piece of a product may take another kernel than the whole.
        peer_sizes = replace(peer_sizes, begins_sums=not settings.deterministic)
        shared_bytes = 8 * sum(peer_sizes.words)
        shared, early = open_peer_collectives(group, parallel.collectives, device, peer_sizes, pdl=pdl)
        parallel = replace(parallel, collectives=shared, early=early)
        sent_rows = 0 if early is None else peer_sizes.max_sent_rows
    waiting = [part for part in (link, parallel.collectives) if isinstance(part, StageLink | PeerCollectives)]
    ops = (InvariantTritonOps if settings.deterministic else TritonOps)(device, pdl=pdl)
    # The packed kernels pick their tiles by the number of tokens.
    kernels = None if settings.deterministic else PackedLinears(device, pdl=pdl, reads_float8=_reads_float8(device))
    scheme: QuantScheme = make_scheme(
        directory,
        family.name_rules,
        setting=settings.quantization,
        has_weights=settings.load_format == "auto",
        canonical_name=family.canonical_name,
        ops=ops,
        kernels=kernels,
    )
    if settings.deterministic:
        scheme = CoveredScheme(scheme)
    build = BuildContext(parallel, scheme, dtype, device, ops)
    shape = KVCacheShape.of(spec, parallel, sizes.block_size, resolve_kv_dtype(settings.kv_cache_dtype, dtype))
    model = load_model(settings, family, spec, build, sizes.max_model_len)
    with_graphs = not settings.enforce_eager and pooling is None
    workspace = shared_bytes + _workspace_bytes(spec, parallel, sizes, dtype, with_graphs=with_graphs)
    if kernels is not None:
        workspace += kernels.num_bytes()
    if link is not None:
        workspace += 8 * _link_sizes(group, spec, sizes, dtype, with_graphs=with_graphs).region_words
    # One row more than sequences may have: the scratch row, for steps that are nobody's.
    num_state_rows = sizes.max_num_seqs + 1
    sizes, plan = plan_memory(
        settings,
        spec,
        parallel,
        shape,
        sizes,
        model.num_bytes(),
        device,
        dtype,
        workspace,
        num_state_rows=num_state_rows,
    )
    sizes, plan = agree_on_sizes(sizes, plan, shape, group)
    for line in plan.lines():
        log.info(line)
    _check_free(plan.kv_bytes + plan.activation_bytes + plan.state_bytes, settings.gpu_memory_utilization, device)
    kv_cache = KVCache(shape, plan.num_blocks, device)
    model.allocate_states(num_state_rows)
    parts = _Parts.of(sizes, spec.vocab_size, with_graphs=with_graphs)
    attention = make_attention(
        attention_spec(spec, parallel, sizes.max_model_len),
        kv_cache.layers,
        parts.attention,
        dtype=dtype,
        pdl=pdl,
        kv_scales=held_kv_scales(spec, model.kv_scales, parallel),
        deterministic=settings.deterministic,
    )
    buffers = ProgramBuffers.allocate(parts.program, device)
    slot_words = result_slot_words(parts.planner.max_runs, MAX_NUM_LOGPROBS)
    timeline = CudaTimeline(device, BUFFER_WORDS, slot_words, num_slots(group.layout.num_stages))
    program = StepProgram(
        model,
        attention,
        buffers,
        timeline.packed,
        timeline.results,
        parts.program,
        pdl=pdl,
        link=link,
        parallel=parallel,
    )
    graphs = StepGraphs(timeline.compute) if with_graphs else None
    facts = worker_facts(directory, spec, sizes, plan, shape, device, dtype, pooling)

    def give_up() -> None:
        for part in waiting:
            part.give_up()

    runner = CudaRunner(
        facts,
        program,
        parts.planner,
        timeline,
        graphs,
        device,
        compile_in_parallel,
        give_up,
        pooler=None if pooling is None else Pooler(pooling, model),
        is_group=group.layout.world_size > 1,
    )
    warm_begun = time.monotonic()
    max_tokens = parts.planner.max_tokens
    packed = not isinstance(scheme, Unquantized)
    compiled = {*_token_counts_of_tiles(spec, max_tokens, dtype, packed=packed)}
    if packed:
        compiled.update(count for count in PACKED_TOKENS if count <= max_tokens)
    if sent_rows:
        compiled.add(min(max_tokens, sent_rows // TOKEN_MULTIPLE * TOKEN_MULTIPLE))
    runner.warm_up(min(WARM_UP_TOKENS, max_tokens), sorted(compiled))
    torch.cuda.synchronize(device)
    log.info(
        "kernels are warm",
        seconds=round(time.monotonic() - warm_begun, 2),
        since_load_began=round(time.monotonic() - begun, 2),
    )
    return runner


def _unsupported(spec: ModelSpec, parallel: ParallelContext, sizes: Sizes, device: torch.device) -> str | None:
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return _too_old(device, MIN_CAPABILITY)
    if spec.gated_delta is not None:
        delta = spec.gated_delta
        reason = unsupported_heads(delta.key_dim, delta.value_dim) or unsupported_width(delta.conv_width)
        if reason is not None:
            return reason
    return unsupported_attention(attention_spec(spec, parallel, sizes.max_model_len), sizes.block_size)


def _has_pdl(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= PDL_CAPABILITY


def _peer_sizes(
    spec: ModelSpec, parallel: ParallelContext, sizes: Sizes, dtype: torch.dtype, choices: tuple[Choices, Choices]
) -> PeerSizes:
    return PeerSizes(
        num_ranks=parallel.size,
        hidden_size=spec.hidden_size,
        vocab_size=spec.vocab_size,
        max_logits=sizes.max_num_seqs,
        max_tokens=StepPlanner(sizes.max_num_seqs, sizes.max_num_batched_tokens, with_graphs=False).max_tokens,
        max_top=MAX_NUM_LOGPROBS,
        dtype=dtype,
        sums=choices[0],
        norms=choices[1],
    )


def _link_sizes(group: RankGroup, spec: ModelSpec, sizes: Sizes, dtype: torch.dtype, *, with_graphs: bool) -> LinkSizes:
    parts = _Parts.of(sizes, spec.vocab_size, with_graphs=with_graphs)
    return LinkSizes(
        group.layout.num_stages,
        parts.planner.max_tokens,
        parts.planner.max_runs,
        MAX_NUM_LOGPROBS,
        spec.hidden_size,
        dtype,
    )


def _too_old(device: torch.device, needed: tuple[int, int]) -> str:
    have, need = (".".join(map(str, pair)) for pair in (torch.cuda.get_device_capability(device), needed))
    return f"{torch.cuda.get_device_name(device)} has compute capability {have}, and the kernels need {need}"


def _reads_float8(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= FLOAT8_CAPABILITY


def _packed_experts(
    settings: WorkerSettings, directory: Path, spec: ModelSpec, family: type[ModelFamily], device: torch.device
) -> str | None:
    """Why a mixture's experts cannot be computed; None: they can."""
    if spec.moe is None or spec.moe.storage != "each":
        return None
    quant = read_quantization(HfConfig.open(directory))
    kind = settings.quantization if quant is None else quant.label or quant.method
    if kind == "auto":
        return None
    scheme = make_scheme(
        directory,
        family.name_rules,
        setting=settings.quantization,
        has_weights=settings.load_format == "auto",
        canonical_name=family.canonical_name,
    )
    paths = [f"layers.{number}.mlp.experts" for number, layer in enumerate(spec.layers) if layer.is_moe]
    if any(expert_form(scheme, path, spec.moe.num_experts) is None for path in paths):
        return (
            f"experts in {kind} have no grouped kernel: those of a layer must have one format, and not asymmetric W8A8"
        )
    methods = [scheme.linear_method(f"{path}.0.{name}") for path in paths for name in ("gate_up", "down")]
    if not _reads_float8(device) and any(needs_float8(method) for method in methods):
        return f"experts in {kind} have no grouped kernel here: {_too_old(device, FLOAT8_CAPABILITY)} for it"
    return None


def _token_counts_of_tiles(
    spec: ModelSpec, max_tokens: int, dtype: torch.dtype, *, packed: bool = False
) -> tuple[int, ...]:
    """A token count for every launch shape of a mixture's experts: each is a kernel of its own."""
    if spec.moe is None:
        return ()
    choose = default_packed_tuning if packed else default_expert_tuning
    counts: dict[int, int] = {}
    for exponent in range(5, max_tokens.bit_length()):
        tuning = choose(1 << exponent, spec.moe.num_chosen, spec.moe.num_experts, dtype)
        counts.setdefault(tuning.tile_rows, 1 << exponent)
    return tuple(counts.values())


def _workspace_bytes(
    spec: ModelSpec, parallel: ParallelContext, sizes: Sizes, dtype: torch.dtype, *, with_graphs: bool
) -> int:
    """What the runner holds beside weights, activations and KV cache; counted on tensors without memory."""
    meta = torch.device("meta")
    parts = _Parts.of(sizes, spec.vocab_size, with_graphs=with_graphs)
    buffers = ProgramBuffers.allocate(parts.program, meta)
    held = sum(
        tensor.numel() * tensor.element_size()
        for part in (buffers.rows, buffers.inputs, buffers.sampler_workspace, buffers.sampled)
        for tensor in vars(part).values()
    )
    no_cache = KVCache(KVCacheShape.of(spec, parallel, sizes.block_size, dtype), 1, meta).layers
    heads = attention_spec(spec, parallel, sizes.max_model_len)
    attention = make_attention(heads, no_cache, parts.attention, dtype=dtype, pdl=False)
    step_buffers = (num_slots(max(1, len(parallel.stage_layers))) + 1) * BUFFER_WORDS * 4
    graph_bytes = 0
    if with_graphs:
        num_tokens = min(GRAPH_TOKENS[-1][0], sizes.max_num_batched_tokens)
        graph_bytes = GRAPH_BYTES + activation_bytes(spec, parallel, num_tokens, sizes.max_num_seqs, dtype)
    backends: tuple[TritonAttention | TritonLatentAttention, ...] = backends_of(attention)
    lists = sum(backend.num_bytes() for backend in backends)
    return held + lists + step_buffers + graph_bytes + PROMPT_LOGITS_BYTES


def _check_free(needed: int, utilization: float, device: torch.device) -> None:
    """The plan is made of the whole device's memory: another process may hold a part of it."""
    free, total = torch.cuda.mem_get_info(device)
    if needed <= free:
        return
    fitting = utilization - (needed - free) / total
    advice = (
        f"set --gpu-memory-utilization {fitting - 0.005:.2f}" if fitting > 0.01 else "free the device, or use another"
    )
    raise MemoryBudgetError(
        f"{needed / GIB:.2f} GiB are planned beside the weights and {free / GIB:.2f} GiB of {device} are free: other "
        f"processes use the rest; {advice}"
    )
