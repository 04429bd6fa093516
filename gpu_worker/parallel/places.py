"""Ranks' places on the wire."""

from __future__ import annotations

from stepwire.v1 import group_pb2

from gpu_worker.config import WorkerSettings
from gpu_worker.parallel.layout import GroupLayout, Place


def write_places(
    layout: GroupLayout, node: int, settings: WorkerSettings, store_address: str, host: str
) -> list[group_pb2.RankPlace]:
    """The places of a node's ranks."""
    ranks = layout.ranks_of_node(node)
    return [
        group_pb2.RankPlace(
            rank=rank,
            tensor_parallel_size=layout.tensor_parallel_size,
            stage_layers=layout.stage_layers,
            expert_parallel=layout.expert_parallel,
            local_rank=rank - ranks.start,
            num_local_ranks=len(ranks),
            store_address=store_address,
            host=host,
            timeout_s=settings.group_timeout_s,
            settings=settings.model_dump_json(exclude_none=True),
        )
        for rank in ranks
    ]


def read_place(message: group_pb2.RankPlace) -> Place:
    return Place(
        rank=message.rank,
        layout=GroupLayout(message.tensor_parallel_size, tuple(message.stage_layers), message.expert_parallel),
        local_rank=message.local_rank,
        num_local_ranks=message.num_local_ranks,
        store_address=message.store_address,
        host=message.host,
        timeout_s=message.timeout_s,
    )
