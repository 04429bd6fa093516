"""A quantized checkpoint as the plain weights that transformers' own code computes with.

Each is dequantized when transformers asks for it, and goes to its place at once: the model takes the memory of its
release that is not quantized, and nothing is held twice.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpu_worker.loading.dequantized import DequantizedSource
from gpu_worker.loading.kv_scales import is_kv_scale
from gpu_worker.loading.safetensors_reader import SafetensorsReader
from gpu_worker.loading.tensor_source import TensorInfo, TensorSource
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.quant.formats import WeightFormat
from gpu_worker.quant.scheme import module_format, read_quantization
from gpu_worker.quant.sources import row_by_row

# transformers has no argument for it.
_IN_ORDER = "HF_DEACTIVATE_ASYNC_LOAD"


@dataclass(frozen=True, slots=True)
class UnreadTensor:
    """What transformers takes for one of safetensors' slices: its value is read by `tensor[...]`."""

    source: TensorSource
    info: TensorInfo

    @property
    def dtype(self) -> torch.dtype:
        return self.info.dtype

    def get_shape(self) -> list[int]:
        return list(self.info.shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.source.read(self.info.name)[index]


@contextmanager
def plain_state(path: Path, dtype: torch.dtype) -> Iterator[dict[str, UnreadTensor] | None]:
    """Every tensor of the checkpoint by its name, packed ones as weights in `dtype`; None: nothing in it is quantized.

    Scales of a KV cache are left out, and biases of zeros beside packed weights, which the class may have no place for.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ModelConfigError: its variant is not supported.
    """
    reader = SafetensorsReader(path)
    try:
        names = frozenset(info.name for info in reader.names())
        quant = read_quantization(HfConfig.open(path), names)
        if quant is None:
            yield None
            return
        known = quant

        def format_of(module: str) -> WeightFormat | None:
            return module_format(known, module, module, names)

        modules = {name.rpartition(".")[0] for name in names}
        source = row_by_row(quant, reader)
        plain = DequantizedSource(source, format_of, {f"{module}.weight" for module in modules}, dtype)
        state = {info.name: UnreadTensor(plain, info) for info in plain.names() if not is_kv_scale(info.name)}
        for module in modules:
            stored, bias = format_of(module), state.get(f"{module}.bias")
            if bias is not None and stored is not None and stored.may_have_stray_bias and not bias[...].any():
                del state[f"{module}.bias"]
        yield state
    finally:
        reader.close()


@contextmanager
def one_after_another() -> Iterator[None]:
    """transformers reads the tensors of a layer when it comes to it.

    Its threads run ahead otherwise, and have all experts of a model read before the first layer's are put together.
    """
    before = os.environ.get(_IN_ORDER)  # noqa: TID251
    os.environ[_IN_ORDER] = "1"  # noqa: TID251
    try:
        yield
    finally:
        if before is None:
            del os.environ[_IN_ORDER]  # noqa: TID251
        else:
            os.environ[_IN_ORDER] = before  # noqa: TID251
