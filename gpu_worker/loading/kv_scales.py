"""Scales of a float8 KV cache that a checkpoint brings: a cached value is float8(x / scale).

Keys are scaled after rotation, values as they are. The tensors have different names in different tools; all hold one
number a layer. Without them the scale is 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from gpu_worker.loading.tensor_source import CheckpointError, TensorInfo, TensorSource

# compressed-tensors, and as vLLM has it in memory; AutoFP8, ModelOpt and Quark; a fused projection; Hunyuan; one for
# both, long ago.
_NAME = re.compile(
    r".*\blayers\.(?P<layer>\d+)\.self_attn\."
    r"(?:(?:attn\.)?(?P<own>[kv])_scale|(?P<proj>[kv])_proj\.(?:[kv]_scale|output_scale)|qkv_proj\.(?P<fused>[kv])_scale"
    r"|(?P<cache>[kv])_cache\.scale|(?P<both>kv_scale))"
)
# Of queries and of probabilities: attention here multiplies in 16 bits.
_UNUSED = re.compile(
    r".*\.self_attn\.(?:(?:attn\.)?q_(?:scale|zero_point)|prob_(?:output_)?scale|q_proj\.(?:q_scale|output_scale)|q\.scale)"
)
# Of symmetric quantization, which all of these are: zeros.
_ZERO_POINT = re.compile(r".*\.self_attn\.(?:(?:attn\.)?[kv]_zero_point|[kv]_proj\.(?:[kv]_|output_)zero_point)")


@dataclass(frozen=True, slots=True)
class KVScales:
    """One layer's."""

    key: float = 1.0
    value: float = 1.0


def is_kv_scale(name: str) -> bool:
    return any(pattern.fullmatch(name) is not None for pattern in (_NAME, _UNUSED, _ZERO_POINT))


def check_kv_scales(infos: Iterable[TensorInfo], num_layers: int) -> None:
    """Raises `CheckpointError` for scales that are not one a layer, or of a layer that does not exist."""
    for info in infos:
        match = _NAME.fullmatch(info.name)
        if match is None:
            continue
        if int(match["layer"]) >= num_layers:
            raise CheckpointError(
                info.file,
                f"belongs to a layer that a model of {num_layers} layers does not have",
                tensor=info.name,
                advice="config.json and the weights are not of one model: download both again",
            )
        if info.num_elements != 1:
            raise CheckpointError(
                info.file,
                f"has the shape {list(info.shape)}",
                tensor=info.name,
                advice="only one scale for a layer's keys and one for its values are supported",
            )


def read_kv_scales(source: TensorSource, infos: Iterable[TensorInfo], num_layers: int) -> tuple[KVScales, ...] | None:
    """One entry a layer; None where the checkpoint has no scales.

    Raises:
        CheckpointError: a scale that is not a positive number.
    """
    found: dict[tuple[int, str], float] = {}
    for info in infos:
        match = _NAME.fullmatch(info.name)
        if match is None:
            if _ZERO_POINT.fullmatch(info.name) and source.read(info.name).float().any():
                raise CheckpointError(info.file, "is not 0: only symmetric scales are supported", tensor=info.name)
            continue
        layer = int(match["layer"])
        scale = float(source.read(info.name).float().reshape(()))
        if not 0 < scale < float("inf"):
            raise CheckpointError(info.file, f"is {scale}, not a positive number", tensor=info.name)
        for kind in "kv" if match["both"] else (match["own"] or match["proj"] or match["fused"] or match["cache"]):
            found[layer, kind] = scale
    if not found:
        return None
    return tuple(KVScales(found.get((layer, "k"), 1.0), found.get((layer, "v"), 1.0)) for layer in range(num_layers))
