"""What the first rank refuses before it starts any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config

from gpu_worker.config import WorkerSettings
from gpu_worker.model_spec import ModelConfigError
from gpu_worker.models.loader import read_spec
from gpu_worker.parallel.layout import GroupError
from gpu_worker.parallel.leader import check_devices, check_split, layout_for
from tests.unit.gpu_worker.models.tiny_checkpoints import Tiny, save_model, save_tiny


def check(directory: Path, **changes: Any) -> None:
    settings = WorkerSettings(model=directory, device="cpu", tensor_parallel_size=2, **changes)
    check_split(settings, directory, layout_for(settings, read_spec(directory)[0]))


@pytest.mark.parametrize(
    ("changes", "words"), [({"deterministic": True}, "--deterministic"), ({"task": "embed"}, "pooling")], ids=str
)
def test_what_works_on_one_rank_only_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    check(tmp_path)
    with pytest.raises(ModelConfigError, match=f"{words} works on one rank only: leave out --tensor-parallel-size"):
        check(tmp_path, **changes)


def test_so_are_models_of_transformers_own_code(tmp_path: Path) -> None:
    save_model(Tiny(GPT2Config, {}), tmp_path)
    with pytest.raises(ModelConfigError, match="transformers' own code works on one rank only"):
        check(tmp_path)


@pytest.mark.parametrize(("num_devices", "said"), [(1, "1 CUDA device,"), (2, "2 CUDA devices,")])
def test_the_first_rank_without_a_device_is_named(
    num_devices: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("llama", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_devices)
    settings = WorkerSettings(model=tmp_path, tensor_parallel_size=3)
    with pytest.raises(GroupError) as refused:
        check_devices(settings, layout_for(settings, read_spec(tmp_path)[0]))
    message = str(refused.value)
    assert message.startswith(f"rank {num_devices} (tensor-parallel rank {num_devices} of 3): this node has {said}")
    assert "set a smaller --tensor-parallel-size" in message and "--num-nodes" in message
