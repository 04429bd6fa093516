"""A CUDA device that is not there: the worker's own road to it, with kernels compiled for it and never launched.

Tensors have shapes and no memory, so models may have their real sizes. What a device of another kind would refuse shows
here: an instruction that it lacks, more shared memory than it has, a model that falls back to plain torch.

    python -m tests.unit.gpu_worker.cuda.absent_device 8.9 DIRECTORY [FIELD=VALUE ...]

prints each kernel once, as JSON lines; FIELD: a worker's setting. Triton decides at import whether it interprets, so
this is a process of its own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import KernelInterface

from gpu_worker.config import WorkerSettings
from gpu_worker.cuda import loading
from gpu_worker.cuda.runner import NO_RUN_RECORDS, CudaRunner

GPU = torch.device("cuda:0")
MEMORY = 80 << 30
_ZERO_POINT = torch.tensor(8)


@dataclass(frozen=True)
class AbsentDevice:
    """What kernels and launch shapes ask of a device. `shared_memory`: bytes that one program may have."""

    name: str
    capability: tuple[int, int]
    shared_memory: int
    num_multiprocessors: int


# Source: CUDA C++ programming guide, "Compute Capabilities"; NVIDIA's data sheets.
DEVICES = {
    "8.0": AbsentDevice("NVIDIA A100-SXM4-80GB", (8, 0), 163 << 10, 108),
    "8.6": AbsentDevice("NVIDIA A10", (8, 6), 99 << 10, 72),
    "8.9": AbsentDevice("NVIDIA L40S", (8, 9), 99 << 10, 142),
    "9.0": AbsentDevice("NVIDIA H100 80GB HBM3", (9, 0), 227 << 10, 132),
    "10.0": AbsentDevice("NVIDIA B200", (10, 0), 227 << 10, 148),
    "12.0": AbsentDevice("NVIDIA GeForce RTX 5090", (12, 0), 99 << 10, 170),
}


@dataclass(frozen=True)
class Launch:
    """One kernel as it would be launched; `error`: why it cannot be compiled."""

    kernel: str
    shared_memory: int
    num_warps: int
    error: str | None = None


class _TensorsWithoutMemory(TorchFunctionMode):
    """Tensors of the device lie on torch's device without memory, and say that they lie on the GPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return args[0].is_meta
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            device = func(*args)
            return GPU if device.type == "meta" else device
        # Values that nobody has: experts of a layer have one format, and random weights one zero point.
        if func is torch.equal:
            return True
        if func in (torch.Tensor.__bool__, torch.Tensor.__int__):
            return func(_ZERO_POINT)
        return func(*map(_placed, args), **{name: _placed(value) for name, value in kwargs.items()})


def _placed(value: Any) -> Any:
    is_on_gpu = isinstance(value, torch.device) and value.type == "cuda"
    return torch.device("meta") if is_on_gpu or (isinstance(value, str) and value.startswith("cuda")) else value


class _Driver:
    """Triton's view of the device: enough to compile for it."""

    def __init__(self, device: AbsentDevice) -> None:
        major, minor = device.capability
        self._target = GPUTarget("cuda", major * 10 + minor, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _Timeline:
    """Implements `Timeline`: nothing is ever under way."""

    compute = None

    def __init__(self, device: torch.device, capacity: int, result_words: int, slots: int) -> None:
        self.packed = torch.zeros(capacity, dtype=torch.int32, device=device)
        self.results = torch.zeros((slots, result_words), dtype=torch.int32, device=device)
        self._host = np.zeros((slots, capacity), dtype=np.int32)
        self.num_deltas = 0

    def host_buffer(self, slot: int) -> npt.NDArray[np.int32]:
        return self._host[slot]

    @contextmanager
    def step(self, slot: int, num_words: int) -> Iterator[None]:
        self.num_deltas += 1
        yield

    def mark_logits(self, slot: int) -> None:
        return None


@contextmanager
def absent(device: AbsentDevice) -> Iterator[set[Launch]]:
    """Inside, torch and Triton take the device to be there. What is launched is compiled and kept in the set."""
    launches: set[Launch] = set()

    def compile_instead(kernel: Any, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            try:
                compiled = kernel.run(*arguments, grid=grid, warmup=True, **options)
            except Exception as error:
                launches.add(Launch(kernel.__name__, 0, 0, f"{type(error).__name__}: {error}"))
            else:
                launches.add(Launch(kernel.__name__, compiled.metadata.shared, compiled.metadata.num_warps))

        return launch

    @contextmanager
    def one_after_another() -> Iterator[None]:
        yield

    facts = SimpleNamespace(
        multi_processor_count=device.num_multiprocessors,
        total_memory=MEMORY,
        shared_memory_per_block_optin=device.shared_memory,
    )
    answers = {
        "get_device_capability": device.capability,
        "get_device_properties": facts,
        "get_device_name": device.name,
        "mem_get_info": (MEMORY, MEMORY),
        "set_device": None,
        "synchronize": None,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "reset_peak_memory_stats": None,
        "empty_cache": None,
    }
    driver.set_active(_Driver(device))  # type: ignore[arg-type]
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, answer=answer: answer))
        stack.enter_context(mock.patch.object(loading, "CudaTimeline", _Timeline))
        stack.enter_context(mock.patch.object(loading, "compile_in_parallel", one_after_another))
        stack.enter_context(mock.patch.object(KernelInterface, "__getitem__", compile_instead))
        stack.enter_context(_TensorsWithoutMemory())
        yield launches


def compile_worker(device: AbsentDevice, directory: Path, **settings: Any) -> set[Launch]:
    """Load the model as a worker on the device would, and compile its first steps: prompts, decodes and both."""
    with absent(device) as launches:
        runner = loading.load_cuda_runner(
            WorkerSettings(
                model=directory, device="cuda", load_format="dummy", enforce_eager=True, max_model_len=8192, **settings
            ),
            GPU,
        )
        if not isinstance(runner, CudaRunner):
            raise RuntimeError(f"{directory.name} falls back to plain torch")
        shapes = [*map(runner._planner.decode_shape, (1, 8, 64, 256)), runner._planner._mixed_shape(16, 64)]
        for shape in shapes:
            with runner._unseen_step(NO_RUN_RECORDS) as slot:
                runner._launch_plain(shape, slot)
        return launches


def main() -> None:
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise SystemExit("kernels are compiled here: unset TRITON_INTERPRET")
    kind, directory, *settings = sys.argv[1:]
    fields = dict(setting.split("=", 1) for setting in settings)
    for launch in sorted(compile_worker(DEVICES[kind], Path(directory), **fields), key=lambda launch: launch.kernel):
        print(json.dumps(asdict(launch)))


if __name__ == "__main__":
    main()
