"""Which device computes, in which element type, with how many threads."""

from __future__ import annotations

import ctypes
import platform
import sys
from pathlib import Path

import torch

from gpu_worker.errors import LoadError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class DeviceError(LoadError, RuntimeError):
    """The asked device cannot be used. The message says what to set instead."""


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto`, `cpu` or `cuda` as a device; a node's ranks take its CUDA devices one after another.

    Raises:
        DeviceError: `cuda` was asked for and this machine or this build of torch has none, or fewer than ranks.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise DeviceError(f"device {name!r} is not known: set --device auto, cpu or cuda")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        build = torch.version.cuda or "a CPU-only build"
        raise DeviceError(
            f"device is cuda, but torch {torch.__version__} ({build}) finds no CUDA device: "
            "set --device cpu, or check the driver with nvidia-smi"
        )
    num_devices = torch.cuda.device_count()
    if local_rank >= num_devices:
        raise DeviceError(
            f"this node has {num_devices} CUDA device{'' if num_devices == 1 else 's'}, and its rank number "
            f"{local_rank + 1} finds none: set a smaller "
            "--tensor-parallel-size or --pipeline-parallel-size, or spread the ranks with --num-nodes"
        )
    return torch.device("cuda", local_rank)


def resolve_dtype(name: str, device: torch.device, checkpoint_dtype: torch.dtype) -> torch.dtype:
    """The element type to compute in.

    `auto` on a CPU is bfloat16 where it has instructions for it (AMX or AVX512-BF16) and float32 elsewhere, whatever
    the checkpoint was saved in; on CUDA it is the checkpoint's own, with float32 checkpoints in bfloat16.
    """
    if name in _DTYPES:
        return _DTYPES[name]
    if name != "auto":
        raise DeviceError(f"dtype {name!r} is not known: set --dtype auto, {', '.join(_DTYPES)}")
    if device.type == "cpu":
        return torch.bfloat16 if cpu_computes_bfloat16() else torch.float32
    return torch.bfloat16 if checkpoint_dtype == torch.float32 else checkpoint_dtype


def cpu_computes_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware and torch's oneDNN uses it."""
    if not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def device_label(device: torch.device) -> str:
    """What `Describe` says of a device: `cpu Intel(R) Xeon(R) (2 threads)`, `cuda:0 NVIDIA H200`."""
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    return f"cpu {_cpu_name()} ({torch.get_num_threads()} threads)"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def available_host_bytes() -> int | None:
    """Memory that this machine can still give without swapping; None where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def return_freed_memory() -> None:
    """Give the system what has been freed and lies between what is in use; where the C library is not glibc, nothing.

    Tensors of a few MB come and go while weights are packed: as much as half of the model stayed with the process.
    """
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
