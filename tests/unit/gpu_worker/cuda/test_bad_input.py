"""What the CUDA worker says of models and devices that its kernels cannot serve. The device is only asked about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from structlog.testing import capture_logs

from gpu_worker.config import WorkerSettings
from gpu_worker.cuda import loading
from gpu_worker.device import DeviceError, resolve_dtype
from gpu_worker.model_spec import ModelConfigError
from gpu_worker.runner import TorchRunner
from tests.unit.gpu_worker.cuda.test_runner import save_model
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
    monkeypatch.setattr(TorchRunner, "load", lambda settings, group: PlainRunner())
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
    assert warning["reason"] == "head size 18 is not one of 64, 80, 96, 128, 256, 512"


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
    monkeypatch.setattr("gpu_worker.runner.resolve_device", lambda name, index: CUDA)
    with pytest.raises(ModelConfigError, match=r"--deterministic needs the kernels on cuda:0.*set --device cpu"):
        loading.load_cuda_runner(settings(tmp_path, deterministic=True), CUDA)


def test_a_float8_cache_on_a_gpu_that_cannot_read_it(capability: list[tuple[int, int]], tmp_path: Path) -> None:
    save_model(tmp_path, "llama", num_heads=2)
    capability[0] = (8, 6)
    expected = r"Tesla T4 has compute capability 8\.6, and the kernels need 8\.9 for it: set --kv-cache-dtype auto"
    with pytest.raises(ModelConfigError, match=expected):
        loading.load_cuda_runner(settings(tmp_path, kv_cache_dtype="fp8"), CUDA)


def test_a_float8_cache_has_no_plain_torch_to_fall_back_to(
    capability: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("qwen3", tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr("gpu_worker.runner.resolve_device", lambda name, index: CUDA)
    with pytest.raises(ModelConfigError, match=r"fp8 needs the CUDA kernels.*set --kv-cache-dtype auto"):
        loading.load_cuda_runner(settings(tmp_path, kv_cache_dtype="fp8"), CUDA)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_every_dtype_of_the_setting_goes_to_the_kernels(
    dtype: str, capability: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which the kernels' own tests run in; a float32 checkpoint is computed in bfloat16 unless float32 is asked for."""
    save_model(tmp_path, "llama", num_heads=2)
    chosen: list[torch.dtype] = []

    def supported(settings: WorkerSettings, *rest: Any) -> None:
        chosen.append(next(each for each in rest if isinstance(each, torch.dtype)))

    monkeypatch.setattr(loading, "_load_supported", supported)
    loading.load_cuda_runner(settings(tmp_path, dtype=dtype), CUDA)
    assert chosen == [torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)]


def test_other_dtypes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"'auto', 'float32', 'bfloat16' or 'float16'"):
        settings(tmp_path, dtype="float64")
    with pytest.raises(DeviceError, match=r"'float64' is not known: set --dtype auto, float32, bfloat16, float16"):
        resolve_dtype("float64", CUDA, torch.float32)
    save_model(tmp_path, "llama", num_heads=2)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float64"}))
    with pytest.raises(ModelConfigError, match=r"dtype.*'float64', expected one of"):
        loading.load_cuda_runner(settings(tmp_path), CUDA)
