"""What every rank does with its place: join the group, load its part of the model."""

from __future__ import annotations

from stepwire.v1 import group_pb2

from gpu_worker.config import WorkerSettings
from gpu_worker.device import resolve_device
from gpu_worker.parallel.layout import Place
from gpu_worker.parallel.process_group import RankGroup, StoreServer
from gpu_worker.runner_api import Runner


def load_rank_runner(
    settings: WorkerSettings, place: Place, server: StoreServer | None = None
) -> tuple[Runner, group_pb2.RankReady]:
    """Find the other ranks, then load this rank's part of the model; `server` is the store's socket on rank 0.

    Raises:
        GroupError: the others are not found in time. What `TorchRunner.load` raises.
    """
    device = resolve_device(settings.device, place.local_rank)
    group = RankGroup(place, device, server)
    runner: Runner
    if device.type == "cuda":
        from gpu_worker.cuda.loading import load_cuda_runner

        runner = load_cuda_runner(settings, device, group)
    else:
        from gpu_worker.runner import TorchRunner

        runner = TorchRunner.load(settings, group)
    facts = runner.describe()
    return runner, group_pb2.RankReady(device=facts.devices[0], block_bytes=facts.block_bytes)
