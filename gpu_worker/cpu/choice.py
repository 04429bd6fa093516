"""Whether a model's operations are the compiled kernels, and the thread team that they then run on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import structlog
import torch

from gpu_worker.cpu.compiling import are_kept, is_numba_installed, load_kernels
from gpu_worker.cpu.team import Team
from gpu_worker.device import cpu_computes_bfloat16
from gpu_worker.model_spec import ModelConfigError

log = structlog.get_logger(__name__)

CpuKernelsSetting = Literal["auto", "on", "off"]


def choose_team(
    setting: CpuKernelsSetting, device: torch.device, dtype: torch.dtype, cache_dir: Path | None = None
) -> Team | None:
    """As many threads as torch has, with their kernels; None: the model is computed by torch.

    Raises:
        ModelConfigError: the kernels are asked for and cannot be had.
    """
    if not wants_kernels(setting, device, dtype):
        return None
    try:
        kernels = load_kernels(cache_dir)
    except ImportError as error:
        _explain(setting, f"numba cannot be imported: {error}", notable=True)
        return None
    return Team(kernels, torch.get_num_threads())


def wants_kernels(setting: CpuKernelsSetting, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a model in `dtype` is to be computed by compiled kernels here.

    Raises:
        ModelConfigError: the kernels are asked for and cannot be had.
    """
    if setting == "off":
        return False
    if device.type != "cpu" or dtype != torch.bfloat16:
        _explain(setting, "they compute bfloat16 on a CPU: set --device cpu --dtype bfloat16")
        return False
    if setting == "auto" and cpu_computes_bfloat16():
        return False
    if not is_numba_installed():
        _explain(setting, "numba is not installed: pip install numba", notable=True)
        return False
    return True


def prepare_kernels(setting: CpuKernelsSetting, cache_dir: Path | None, note: Callable[[str], None]) -> None:
    """Compile the kernels before a worker wants them, unless they are kept already; `note` is told.

    Raises:
        ModelConfigError: the kernels are asked for and cannot be had.
    """
    if not wants_kernels(setting, torch.device("cpu"), torch.bfloat16) or are_kept(cache_dir):
        return
    note("Compiling kernels for bfloat16 on this CPU, once: about 20 s")
    try:
        load_kernels(cache_dir)
    except ImportError as error:
        _explain(setting, f"numba cannot be imported: {error}", notable=True)


def _explain(setting: CpuKernelsSetting, reason: str, *, notable: bool = False) -> None:
    if setting == "on":
        raise ModelConfigError(f"--cpu-kernels on: {reason}, or leave it at auto")
    if notable:
        log.warning(f"bfloat16 is slow on this CPU without compiled kernels; {reason}")
