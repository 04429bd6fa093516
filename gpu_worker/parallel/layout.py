"""Which rank is where: stages, tensor-parallel ranks, nodes, and how many layers a stage gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpu_worker.errors import LoadError
from gpu_worker.parallel.shares import ParallelError


class GroupError(LoadError, RuntimeError):
    """Ranks do not find together, or one is lost. The message names the rank and what to do."""


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """The ranks of a worker group; those of a stage stand together: rank = stage * tensor_parallel_size + number."""

    tensor_parallel_size: int
    stage_layers: tuple[int, ...]
    """Layers of each pipeline stage."""
    expert_parallel: bool = False
    num_nodes: int = 1

    @property
    def num_stages(self) -> int:
        return len(self.stage_layers)

    @property
    def world_size(self) -> int:
        return self.tensor_parallel_size * self.num_stages

    @property
    def ranks_per_node(self) -> int:
        return self.world_size // self.num_nodes

    def ranks_of_node(self, node: int) -> range:
        return range(node * self.ranks_per_node, (node + 1) * self.ranks_per_node)

    def stage_of(self, rank: int) -> int:
        return rank // self.tensor_parallel_size

    def stage_ranks(self, rank: int) -> range:
        """The ranks of the stage of `rank`."""
        first = rank - rank % self.tensor_parallel_size
        return range(first, first + self.tensor_parallel_size)

    def column_ranks(self, rank: int) -> range:
        """The rank in the place of `rank` in every stage, first stage first."""
        return range(rank % self.tensor_parallel_size, self.world_size, self.tensor_parallel_size)

    def sender_of_tokens(self, rank: int) -> int:
        """Who tells `rank` the tokens of a step: the rank in its place of the last stage, where all have them."""
        return (self.num_stages - 1) * self.tensor_parallel_size + rank % self.tensor_parallel_size

    def describe_rank(self, rank: int) -> str:
        """`rank 3 (stage 1 of 2, tensor-parallel rank 1 of 2)`."""
        parts = []
        if self.num_stages > 1:
            parts.append(f"stage {self.stage_of(rank)} of {self.num_stages}")
        if self.tensor_parallel_size > 1:
            parts.append(f"tensor-parallel rank {rank % self.tensor_parallel_size} of {self.tensor_parallel_size}")
        return f"rank {rank}" + (f" ({', '.join(parts)})" if parts else "")


@dataclass(frozen=True, slots=True)
class Place:
    """A rank's place in its group, as handed out by rank 0."""

    rank: int
    layout: GroupLayout
    local_rank: int = 0
    num_local_ranks: int = 1
    store_address: str = ""
    host: str = "127.0.0.1"
    timeout_s: float = 25.0

    @property
    def label(self) -> str:
        return self.layout.describe_rank(self.rank)


def plan_layout(
    tensor_parallel_size: int,
    pipeline_parallel_size: int,
    *,
    layer_costs: Sequence[float],
    first_cost: float = 0.0,
    last_cost: float = 0.0,
    stage_layers: Sequence[int] = (),
    expert_parallel: bool = False,
    num_nodes: int = 1,
) -> GroupLayout:
    """The layout for these settings.

    Args:
        layer_costs: what a token costs in each layer; first_cost, last_cost: before the first (embedding) and after the
            last (head) one. Any unit.
        stage_layers: `--pipeline-parallel-layers`; empty: split by cost.

    Raises:
        ParallelError: numbers that do not go together; the message names the setting to change.
    """
    num_layers = len(layer_costs)
    if pipeline_parallel_size > num_layers:
        raise ParallelError(
            f"pipeline_parallel_size {pipeline_parallel_size} is more than the model's {num_layers} layers: "
            f"set --pipeline-parallel-size {num_layers} or less"
        )
    if stage_layers:
        if len(stage_layers) != pipeline_parallel_size or sum(stage_layers) != num_layers:
            raise ParallelError(
                f"pipeline_parallel_layers {','.join(map(str, stage_layers))} must be {pipeline_parallel_size} numbers "
                f"(--pipeline-parallel-size) whose sum is the model's {num_layers} layers"
            )
        counts = tuple(stage_layers)
    else:
        counts = split_layers(layer_costs, pipeline_parallel_size, first_cost, last_cost)
    world_size = tensor_parallel_size * pipeline_parallel_size
    if world_size % num_nodes:
        raise ParallelError(
            f"{world_size} ranks (tensor_parallel_size {tensor_parallel_size} x pipeline_parallel_size "
            f"{pipeline_parallel_size}) do not divide by num_nodes {num_nodes}: every node holds as many ranks"
        )
    return GroupLayout(tensor_parallel_size, counts, expert_parallel, num_nodes)


def split_layers(
    layer_costs: Sequence[float], num_stages: int, first_cost: float = 0.0, last_cost: float = 0.0
) -> tuple[int, ...]:
    """Layers of each stage such that the dearest stage is as cheap as can be; every stage has at least one.

    Exact, by dynamic programming over (stages, layers). Among equals the earlier stages get more: the last one samples.
    """
    num_layers = len(layer_costs)
    before = [0.0]
    for cost in layer_costs:
        before.append(before[-1] + cost)

    def cost_of(stage: int, start: int, stop: int) -> float:
        ends = (first_cost if stage == 0 else 0.0) + (last_cost if stage == num_stages - 1 else 0.0)
        return before[stop] - before[start] + ends

    # best[n]: the dearest stage of the first so many stages over n layers, and the layers of the last one among them.
    best: dict[int, tuple[float, tuple[int, ...]]] = {
        stop: (cost_of(0, 0, stop), (stop,)) for stop in range(1, num_layers + 1)
    }
    for stage in range(1, num_stages):
        following: dict[int, tuple[float, tuple[int, ...]]] = {}
        for stop in range(stage + 1, num_layers + 1):
            for start in range(stop - 1, stage - 1, -1):
                dearest, counts = best[start]
                cost = max(dearest, cost_of(stage, start, stop))
                if stop not in following or cost < following[stop][0]:
                    following[stop] = (cost, (*counts, stop - start))
        best = following
    return best[num_layers][1]
