"""What the CUDA worker says of models and devices that its kernels cannot serve. The device is only asked about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from gpu_worker.config import WorkerSettings
from gpu_worker.cuda import loading
from gpu_worker.model_spec import ModelConfigError
from gpu_worker.runner import TorchRunner
from tests.unit.gpu_worker.models.tiny_checkpoints import save_tiny

CUDA = torch.device("cuda", 0)


class PlainRunner:
    """Stands for the plain torch runner, which would go to the device."""


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What the device says of itself; the test may change it."""
    said = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: said[0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    monkeypatch.setattr(TorchRunner, "load", lambda settings: PlainRunner())
    return said


def settings(directory: Path, **changes: Any) -> WorkerSettings:
    return WorkerSettings(model=directory, device="cuda", **({"dtype": "float32"} | changes))


def load_with_warning(directory: Path, **changes: Any) -> dict[str, Any]:
    with capture_logs() as logs:
        assert isinstance(loading.load_cuda_runner(settings(directory, **changes), CUDA), PlainRunner)
    (warning,) = [entry for entry in logs if entry["log_level"] == "warning"]
    return dict(warning)


def test_a_head_size_without_a_kernel_runs_in_plain_torch_with_a_warning(
    capability: list[tuple[int, int]], tmp_path: Path
) -> None:
    save_tiny("qwen3", tmp_path)
    warning = load_with_warning(tmp_path)
    assert "plain torch" in warning["event"] and "slower" in warning["event"]
    assert warning["reason"] == "head size 18 is not one of 64, 80, 96, 128, 256"


def test_a_gpu_too_old_runs_in_plain_torch_with_a_warning(capability: list[tuple[int, int]], tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    capability[0] = (7, 5)
    assert load_with_warning(tmp_path)["reason"] == "Tesla T4 has compute capability 7.5, and the kernels need 8.0"


def test_deterministic_does_not_fall_back(
    capability: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain torch on a GPU picks its kernels by the batch: a warning would not be enough."""
    save_tiny("qwen3", tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr("gpu_worker.runner.resolve_device", lambda name: CUDA)
    with pytest.raises(ModelConfigError, match=r"--deterministic needs the kernels on cuda:0.*set --device cpu"):
        loading.load_cuda_runner(settings(tmp_path, deterministic=True), CUDA)
