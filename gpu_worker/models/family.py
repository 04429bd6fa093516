"""What a model file defines: how its config reads, what its checkpoint tensors are called, how it computes."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

import torch

from gpu_worker.attention.api import ModelAttention
from gpu_worker.layers.decoder import Decoder, HiddenStates
from gpu_worker.model_spec import ModelSpec
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.models.kept_rows import KeptRows
from gpu_worker.models.served_config import LANGUAGE_HEAD, LANGUAGE_MODEL
from gpu_worker.quant.api import RandomValues

MAX_MTP_LAYERS = 4
_OF_PART, _HEAD_OF_PART = re.compile(LANGUAGE_MODEL), re.compile(LANGUAGE_HEAD)
_OF_TRUNK = re.compile(r"(embed_tokens|layers\.\d+|norm)\.")
NameRules = dict[str, dict[str, str]]
"""Layer path -> part -> place of its tensors in the checkpoint; `{i}` stands for the layer's number.

`"layers.{i}.attention.qkv": {"q": "model.layers.{i}.self_attn.q_proj", ...}`: the part `q` of the fused linear is
filled from the tensors `model.layers.<i>.self_attn.q_proj.<tensor>`. `"q+k+v"` stands for parts that the checkpoint
has in one tensor, one below the other; `{e}` for the number of an expert.
"""


class ModelFamily(Decoder):
    """One family of architectures. A file in this package that defines one and registers it is all a model needs."""

    name_rules: ClassVar[NameRules]
    skipped_tensors: ClassVar[str] = ""
    """A pattern of checkpoint tensors that serving text does not need (a vision tower, say)."""
    is_encoder: ClassVar[bool] = False
    """Every token sees its whole sequence; nothing is cached."""
    host_plans_attention: ClassVar[bool] = False
    """Its attention is planned on the host for every step, which CUDA graphs leave no room for."""
    row_states: KeptRows | None = None
    """What it keeps for every row by itself."""

    @classmethod
    def for_config(cls, config: HfConfig) -> type[ModelFamily]:
        """The family of this very checkpoint, where the name of its architecture leaves that open.

        Raises:
            ModelConfigError: there is none.
        """
        return cls

    @classmethod
    def canonical_name(cls, name: str) -> str:
        """A checkpoint tensor's name as the rules have it, where releases differ."""
        # Saved from the trunk alone, under the architecture of the whole (Qwen3-Embedding), or cut out of a model that
        # sees as well, under the names that it had there.
        name = _OF_PART.sub("model.", _HEAD_OF_PART.sub("lm_head.", name))
        return f"model.{name}" if _OF_TRUNK.match(name) else name

    @classmethod
    def unused_tensors(cls, spec: ModelSpec) -> str:
        """A pattern of tensors, by their names in the rules, that this use of the model does not need."""
        return "" if spec.has_output_head else r"lm_head\."

    @staticmethod
    @abstractmethod
    def read_config(config: HfConfig, architecture: str) -> ModelSpec:
        """The family's `config.json` as a `ModelSpec`; `architecture` is the registered name that matched.

        Raises:
            ModelConfigError: a field is missing, of the wrong type, or asks for what the family does not do.
        """

    @staticmethod
    def in_dtype(spec: ModelSpec, directory: Path, dtype: torch.dtype) -> ModelSpec:
        """The spec of the model in `directory` where it runs in `dtype`, and not in its checkpoint's type."""
        return spec


def beyond_the_decoder(spec: ModelSpec) -> str:
    """A pattern of the layers behind the last one, by which some releases predict a second token ahead (MTP)."""
    first = spec.num_layers
    return rf"model\.layers\.({'|'.join(str(number) for number in range(first, first + MAX_MTP_LAYERS))})\."


class ReadsPairs(ABC):
    """A model that is told which text of a pair a token is of."""

    @abstractmethod
    def hidden_states(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        attention: ModelAttention,
        segments: torch.Tensor | None = None,
    ) -> HiddenStates:
        """segments [num_tokens]: 0 for the first text, 1 for the second; None: there is one text."""


class LoadsItself(ABC):
    """A family whose checkpoint is read by other code than the loader's."""

    @abstractmethod
    def check_checkpoint(self, path: Path) -> None:
        """Raises `CheckpointError` for what can be seen before anything is read."""

    @abstractmethod
    def load_checkpoint(self, path: Path) -> None:
        """Raises `CheckpointError`."""

    @abstractmethod
    def fill_random_weights(self, source: RandomValues, directory: Path) -> None:
        """load_format dummy: random weights for the config in `directory`."""
