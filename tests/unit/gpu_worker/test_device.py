"""Which device and element type are chosen, and what is said where there is none."""

from __future__ import annotations

import pytest
import torch

from gpu_worker.device import (
    DeviceError,
    cpu_computes_bfloat16,
    device_label,
    dtype_name,
    resolve_device,
    resolve_dtype,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_auto_on_a_cpu_is_bfloat16_where_the_cpu_has_it_whatever_the_checkpoint_is() -> None:
    expected = torch.bfloat16 if cpu_computes_bfloat16() else torch.float32
    assert {resolve_dtype("auto", CPU, dtype) for dtype in (torch.float16, torch.float32, torch.bfloat16)} == {expected}


def test_auto_on_cuda_is_the_checkpoint_s_own_but_not_float32() -> None:
    assert resolve_dtype("auto", CUDA, torch.float16) == torch.float16
    assert resolve_dtype("auto", CUDA, torch.float32) == torch.bfloat16


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_named_dtype_is_taken(name: str) -> None:
    assert dtype_name(resolve_dtype(name, CPU, torch.float32)) == name


def test_what_is_not_there_is_refused_with_advice() -> None:
    with pytest.raises(DeviceError, match=r"int3.*float32, bfloat16, float16"):
        resolve_dtype("int3", CPU, torch.float32)
    with pytest.raises(DeviceError, match=r"tpu.*auto, cpu or cuda"):
        resolve_device("tpu")
    if not torch.cuda.is_available():
        assert resolve_device("auto") == CPU
        with pytest.raises(DeviceError, match=r"cuda.*--device cpu"):
            resolve_device("cuda")


def test_the_label_of_a_cpu_names_it_and_its_threads() -> None:
    label = device_label(CPU)
    assert label.startswith("cpu ") and label.endswith(f"({torch.get_num_threads()} threads)")
