"""How the workers of one machine share it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from gateway import worker_processes
from gateway.launch_settings import LaunchSettings
from gateway.worker_processes import TooFewDevices, worker_starts

HERE = Path("/run/stack")


def settings(**values: Any) -> LaunchSettings:
    return LaunchSettings(model="m", **values)


def test_one_group_is_started_as_ever() -> None:
    [only] = worker_starts(settings(), HERE, {"CUDA_VISIBLE_DEVICES": "3,5"})
    assert (only.socket, only.flags, only.environment) == ("unix:/run/stack/worker.sock", [], {})


def test_gpus_are_dealt_out_in_order() -> None:
    starts = worker_starts(settings(data_parallel_size=2), HERE, {"CUDA_VISIBLE_DEVICES": "3,5,7"})
    assert [start.environment["CUDA_VISIBLE_DEVICES"] for start in starts] == ["3", "5"]
    assert len({start.socket for start in starts}) == 2


def test_a_group_of_several_ranks_gets_as_many_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LaunchSettings, "num_gpus_per_group", 2)
    starts = worker_starts(settings(data_parallel_size=2), HERE, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"})
    assert [start.environment["CUDA_VISIBLE_DEVICES"] for start in starts] == ["0,1", "2,3"]


def test_too_few_gpus_are_named_with_both_numbers() -> None:
    with pytest.raises(TooFewDevices, match="needs 3 GPUs, and 2 can be seen"):
        worker_starts(settings(data_parallel_size=3), HERE, {"CUDA_VISIBLE_DEVICES": "0,1"})


@pytest.mark.parametrize(
    "values", [{"device": "cpu"}, {"runner": "simulated"}, {}], ids=["cpu", "simulated", "no GPU here"]
)
def test_without_gpus_the_groups_share_the_cores(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    environment = {"CUDA_VISIBLE_DEVICES": "" if not values else "0,1"}
    starts = worker_starts(settings(data_parallel_size=4, **values), HERE, environment)
    assert [start.flags for start in starts] == [["--num-threads=3"]] * 4
    assert not any(start.environment for start in starts)


def test_threads_that_were_asked_for_are_not_overruled() -> None:
    starts = worker_starts(settings(data_parallel_size=2, device="cpu", num_threads=7), HERE, {})
    assert [start.flags for start in starts] == [[], []]


def test_gpus_are_counted_by_the_drivers_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    monkeypatch.setattr(worker_processes, "Path", lambda _: tmp_path)
    starts = worker_starts(settings(data_parallel_size=2), HERE, {})
    assert [start.environment["CUDA_VISIBLE_DEVICES"] for start in starts] == ["0", "1"]
