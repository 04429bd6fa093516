"""Whether a model's operations are the compiled kernels, and the thread team that they then run on."""

from __future__ import annotations

from typing import Literal

import structlog
import torch

from gpu_worker.cpu.compiling import is_numba_installed, load_kernels
from gpu_worker.cpu.team import Team
from gpu_worker.device import cpu_computes_bfloat16
from gpu_worker.model_spec import ModelConfigError

log = structlog.get_logger(__name__)

CpuKernelsSetting = Literal["auto", "on", "off"]


def choose_team(setting: CpuKernelsSetting, device: torch.device, dtype: torch.dtype) -> Team | None:
    """As many threads as torch has, with their kernels; None: the model is computed by torch.

    Raises:
        ModelConfigError: the kernels are asked for and cannot be had.
    """
    if setting == "off":
        return None
    if device.type != "cpu" or dtype != torch.bfloat16:
        _explain(setting, "they compute bfloat16 on a CPU: set --device cpu --dtype bfloat16")
        return None
    if setting == "auto" and cpu_computes_bfloat16():
        return None
    if not is_numba_installed():
        _explain(setting, "numba is not installed: pip install numba", notable=True)
        return None
    try:
        kernels = load_kernels()
    except ImportError as error:
        _explain(setting, f"numba cannot be imported: {error}", notable=True)
        return None
    return Team(kernels, torch.get_num_threads())


def _explain(setting: CpuKernelsSetting, reason: str, *, notable: bool = False) -> None:
    if setting == "on":
        raise ModelConfigError(f"--cpu-kernels on: {reason}, or leave it at auto")
    if notable:
        log.warning(f"bfloat16 is slow on this CPU without compiled kernels; {reason}")
