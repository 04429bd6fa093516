"""Rank 0 forms the group: decides the layout, hands out the places, starts or awaits the other ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import structlog
import torch
from stepwire.v1 import group_pb2

from gpu_worker.config import WorkerSettings
from gpu_worker.device import DeviceError, resolve_device
from gpu_worker.errors import LoadError
from gpu_worker.layers.linear import BuildContext
from gpu_worker.model_spec import ModelConfigError, ModelSpec
from gpu_worker.models.family import ModelFamily
from gpu_worker.models.loader import read_spec
from gpu_worker.parallel.early_end import EarlyEnd
from gpu_worker.parallel.group_runner import Followers, GroupRunner
from gpu_worker.parallel.group_watch import GroupWatch
from gpu_worker.parallel.layout import GroupError, GroupLayout, plan_layout
from gpu_worker.parallel.local_ranks import LocalRanks
from gpu_worker.parallel.nodes import NodeServer, group_host
from gpu_worker.parallel.places import read_place, write_places
from gpu_worker.parallel.process_group import StoreServer
from gpu_worker.parallel.rank_loading import load_rank_runner
from gpu_worker.parallel.shares import ParallelContext
from gpu_worker.pooling import read_pooling
from gpu_worker.quant.scheme import make_scheme
from gpu_worker.runner_api import Runner

log = structlog.get_logger(__name__)

_ONE_NODE = "127.0.0.1"


def load_group_runner(settings: WorkerSettings, before_end: Callable[[str], None] | None = None) -> Runner:
    """The runner of a group of several ranks, all of them ready.

    `before_end` is told why, on any thread, before a failure of another rank ends this process.

    Raises:
        LoadError: the settings do not fit the model, or rank 0's own part cannot be loaded. A failure of another rank
            while the group forms ends this process, with one line that names the rank; so does a node that is told to
            end, with exit code 0.
    """
    if settings.model is None:
        raise ModelConfigError("no model is set: give the model's directory with --model")
    spec, _ = read_spec(settings.model)
    layout = layout_for(settings, spec)
    check_split(settings, settings.model, layout)
    check_devices(settings, layout)
    if settings.enable_expert_parallel and spec.moe is None:
        log.warning("--enable-expert-parallel does nothing: the model has no experts", architecture=spec.architecture)
    followers: list[Followers] = []
    watch = GroupWatch(layout, before_end)
    with EarlyEnd(followers, watch):
        return _form(settings, layout, followers, watch)


def _form(settings: WorkerSettings, layout: GroupLayout, followers: list[Followers], watch: GroupWatch) -> Runner:
    host = _ONE_NODE if settings.num_nodes == 1 else group_host(settings)
    server = StoreServer(host)
    nodes = None
    if settings.num_nodes > 1:
        nodes = NodeServer(settings, layout, watch, server.address)
        followers.append(nodes)
    places = write_places(layout, 0, settings, server.address, host)
    local_ranks = LocalRanks(watch.on_event)
    followers.append(local_ranks)
    try:
        if nodes is not None:
            nodes.await_all()
        local_ranks.start(places[1:])
        watch.wait_started(settings.group_timeout_s)
        form = group_pb2.RankCommand(form=group_pb2.Empty()).SerializeToString()
        for each in followers:
            each.send(form)
        local, own = load_rank_runner(settings, read_place(places[0]), server)
        others = watch.wait_ready()
    except BaseException as error:
        explained = watch.explain(error) if not isinstance(error, LoadError) and isinstance(error, Exception) else error
        watch.stop()
        for each in followers:
            each.close(0.0)
        if explained is error:
            raise
        raise explained from error
    facts = replace(
        local.describe(),
        devices=(own.device, *(others[rank].device for rank in sorted(others))),
        block_bytes=own.block_bytes + sum(ready.block_bytes for ready in others.values()),
        num_stages=layout.num_stages,
    )
    log.info(
        "the group is complete",
        num_ranks=layout.world_size,
        tensor_parallel_size=layout.tensor_parallel_size,
        stage_layers=list(layout.stage_layers),
    )
    return GroupRunner(local, facts, followers, watch)


def check_devices(settings: WorkerSettings, layout: GroupLayout) -> None:
    """Whether every rank of this node has a device, before any is started. Raises `GroupError`."""
    for rank in layout.ranks_of_node(0):
        try:
            resolve_device(settings.device, rank)
        except DeviceError as error:
            raise GroupError(f"{layout.describe_rank(rank)}: {error}") from error


def layout_for(settings: WorkerSettings, spec: ModelSpec) -> GroupLayout:
    """Raises `ParallelError`."""
    return plan_layout(
        settings.tensor_parallel_size,
        settings.pipeline_parallel_size,
        layer_costs=spec.layer_weights(),
        # A step looks up a row for every token, and multiplies by the whole head.
        first_cost=spec.hidden_size,
        last_cost=spec.vocab_size * spec.hidden_size,
        stage_layers=settings.pipeline_parallel_layers,
        expert_parallel=settings.enable_expert_parallel,
        num_nodes=settings.num_nodes,
    )


def check_split(settings: WorkerSettings, model: Path, layout: GroupLayout) -> None:
    """Whether every rank can have its part, seen on models without memory, before any rank is started.

    Raises:
        ParallelError: a size that does not divide; names both numbers.
        ModelConfigError: what is asked for works on one rank only.
    """
    spec, family = read_spec(model)
    _refuse_what_one_rank_does(settings, model, spec, family)
    scheme = make_scheme(
        model,
        family.name_rules,
        setting=settings.quantization,
        has_weights=settings.load_format == "auto",
        canonical_name=family.canonical_name,
    )
    for rank in range(layout.world_size):
        parallel = ParallelContext(
            rank=rank % layout.tensor_parallel_size,
            size=layout.tensor_parallel_size,
            splits_experts_whole=layout.expert_parallel,
            stage=layout.stage_of(rank),
            stage_layers=layout.stage_layers,
        )
        family(spec, 1, BuildContext(parallel, scheme, torch.float32, torch.device("meta")))


def _refuse_what_one_rank_does(
    settings: WorkerSettings, model: Path, spec: ModelSpec, family: type[ModelFamily]
) -> None:
    what = {
        # Sums over ranks are not known to be the same for a row in any batch.
        "--deterministic": settings.deterministic,
        "a model that runs through transformers' own code": family.host_plans_attention,
        "pooling": read_pooling(model, spec, family, settings.task, settings.pooling) is not None,
    }
    for name, is_asked in what.items():
        if is_asked:
            raise ModelConfigError(
                f"{name} works on one rank only: leave out --tensor-parallel-size and --pipeline-parallel-size"
            )
