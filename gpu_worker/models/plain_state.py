"""A quantized checkpoint as the plain weights that transformers' own code computes with.

They are dequantized while they are loaded, so that the model takes the memory of its release that is not quantized.
"""

from __future__ import annotations

from pathlib import Path

import torch

from gpu_worker.loading.bitsandbytes_source import BitsAndBytesSource
from gpu_worker.loading.dequantized import DequantizedSource
from gpu_worker.loading.kv_scales import is_kv_scale
from gpu_worker.loading.safetensors_reader import SafetensorsReader
from gpu_worker.loading.tensor_source import TensorSource
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.quant.bitsandbytes import METHOD as BITSANDBYTES
from gpu_worker.quant.formats import WeightFormat
from gpu_worker.quant.scheme import module_format, read_quantization


def plain_state(path: Path, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
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
            return None
        known = quant

        def format_of(module: str) -> WeightFormat | None:
            return module_format(known, module, module, names)

        modules = {name.rpartition(".")[0] for name in names}
        source: TensorSource = BitsAndBytesSource(reader) if quant.method == BITSANDBYTES else reader
        plain = DequantizedSource(source, format_of, {f"{module}.weight" for module in modules}, dtype)
        state = {info.name: plain.read(info.name) for info in plain.names() if not is_kv_scale(info.name)}
        for module in modules:
            stored, bias = format_of(module), state.get(f"{module}.bias")
            if bias is not None and stored is not None and stored.may_have_stray_bias and not bias.any():
                del state[f"{module}.bias"]
        return state
    finally:
        reader.close()
