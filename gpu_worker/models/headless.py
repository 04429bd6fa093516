"""Decoder checkpoints that draw no tokens: saved without an output head (`Qwen2Model`), or with a classifier instead
(`Qwen2ForSequenceClassification`).
"""

from __future__ import annotations

from dataclasses import replace

from gpu_worker.model_spec import ModelSpec
from gpu_worker.models.family import ModelFamily
from gpu_worker.models.hf_config import HfConfig


def without_head(family: type[ModelFamily]) -> type[ModelFamily]:
    """`family` for checkpoints of the trunk alone, whose names lack the `model.` that the whole has."""

    class Trunk(family):  # type: ignore[valid-type, misc]
        @classmethod
        def canonical_name(cls, name: str) -> str:
            return str(family.canonical_name(name if name.startswith("model.") else f"model.{name}"))

        @staticmethod
        def read_config(config: HfConfig, architecture: str) -> ModelSpec:
            return replace(family.read_config(config, architecture), has_output_head=False)

    Trunk.__name__ = Trunk.__qualname__ = f"{family.__name__}Trunk"
    return Trunk


def classifier(family: type[ModelFamily]) -> type[ModelFamily]:
    """`family` with transformers' classification head: a linear without bias on the last token."""

    class Classifier(family):  # type: ignore[valid-type, misc]
        name_rules = family.name_rules | {"score": {"": "score"}}

        @staticmethod
        def read_config(config: HfConfig, architecture: str) -> ModelSpec:
            spec = family.read_config(config, architecture)
            return replace(spec, has_output_head=False, num_labels=config.num_labels())

    Classifier.__name__ = Classifier.__qualname__ = f"{family.__name__}Classifier"
    return Classifier
