"""Checkpoints of methods whose stored tensors a linear's rows and columns cannot be cut out of."""

from __future__ import annotations

from gpu_worker.loading.bitsandbytes_source import BitsAndBytesSource
from gpu_worker.loading.hqq_source import HqqSource
from gpu_worker.loading.tensor_source import TensorSource
from gpu_worker.quant.bitsandbytes import METHOD as BITSANDBYTES
from gpu_worker.quant.config import QuantConfig
from gpu_worker.quant.hqq import METHOD as HQQ


def row_by_row(quant: QuantConfig, source: TensorSource) -> TensorSource:
    """`source` with such tensors in the order that the method's formats, or plain linears, read.

    Raises:
        CheckpointError: a packed weight whose parts do not fit each other.
    """
    if quant.method == BITSANDBYTES:
        return BitsAndBytesSource(source)
    return HqqSource(source) if quant.method == HQQ else source
