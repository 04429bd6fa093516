"""Llama 3.2 Vision: Llama, with layers in between that attend to an image. Without one these do nothing at all."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

from gpu_worker.model_spec import ModelSpec
from gpu_worker.models.family import ModelFamily
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.models.llama import Llama
from gpu_worker.models.registry import register

# As in the class in transformers: of 40 layers.
_CROSS_LAYERS = [3, 8, 13, 18, 23, 28, 33, 38]
# Special tokens of images have rows behind those of the vocabulary.
_IMAGE_TOKENS = 8


@register("MllamaForCausalLM")
class Mllama(Llama):
    """What serves a checkpoint is one of its `for_config`, which knows where the layers for images are."""

    @classmethod
    def for_config(cls, config: HfConfig) -> type[ModelFamily]:
        return _without_layers(tuple(_cross_layers(config)))

    @staticmethod
    def read_config(config: HfConfig, architecture: str) -> ModelSpec:
        num_layers = config.integer("num_hidden_layers") - len(_cross_layers(config))
        text = HfConfig(
            {"rope_theta": 500_000.0, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5}
            | config.fields
            | {"num_hidden_layers": num_layers},
            config.file,
        )
        return replace(Llama.read_config(text, architecture), num_unused_embeddings=_IMAGE_TOKENS)


def _cross_layers(config: HfConfig) -> list[int]:
    layers = config.fields.get("cross_attention_layers", _CROSS_LAYERS)
    if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
        raise config.error("cross_attention_layers", f"is {layers!r:.60}, expected a list of layers")
    return sorted(set(layers) & set(range(config.integer("num_hidden_layers"))))


@cache
def _without_layers(left_out: tuple[int, ...]) -> type[ModelFamily]:
    """The family of checkpoints in which these layers are for images; the others count from 0 without a gap."""

    def renumbered(match: re.Match[str]) -> str:
        layer = int(match[1])
        return f"model.layers.{layer - sum(other < layer for other in left_out)}."

    class Text(Mllama):
        skipped_tensors = rf"(.*\.)?layers\.({'|'.join(map(str, left_out)) or '(?!)'})\."

        @classmethod
        def for_config(cls, config: HfConfig) -> type[ModelFamily]:
            return cls

        @classmethod
        def canonical_name(cls, name: str) -> str:
            return re.sub(r"^model\.layers\.(\d+)\.", renumbered, super().canonical_name(name))

    Text.__name__ = Text.__qualname__ = Mllama.__name__
    return Text
