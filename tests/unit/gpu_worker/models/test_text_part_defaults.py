"""Configs of text parts leave fields out: they mean what transformers' classes have for them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gpu_worker.models.hf_config import HfConfig
from gpu_worker.models.multimodal import TEXT_PARTS, Multimodal, text_config
from gpu_worker.models.text_part_defaults import WHOLE_DEFAULTS

# Of Qwen3-Omni the class's own defaults do not fit together, and its releases have every field.
NO_DEFAULTS = ("qwen3_omni_moe_text",)


def text_class(kind: str) -> Any:
    if kind in CONFIG_MAPPING:
        return type(CONFIG_MAPPING[kind]().get_text_config())
    return type(CONFIG_MAPPING[kind.removesuffix("_text")]().get_text_config())


@pytest.mark.parametrize("kind", sorted(set(TEXT_PARTS) - set(NO_DEFAULTS)))
def test_a_config_without_fields_is_the_class_s_own(kind: str) -> None:
    fields = json.loads(json.dumps(text_class(kind)().to_dict(), default=str))
    whole = text_config(HfConfig({"text_config": fields | {"model_type": kind}}))
    bare = HfConfig({"text_config": {"model_type": kind, "eos_token_id": fields.get("eos_token_id")}})
    family = Multimodal.for_config(bare)
    assert family.read_config(bare, "Some") == family.read_config(HfConfig({"text_config": whole.fields}), "Some")


@pytest.mark.parametrize("kind", WHOLE_DEFAULTS)
def test_some_wholes_have_defaults_of_their_own(kind: str) -> None:
    whole = CONFIG_MAPPING[kind](text_config={"model_type": "llama"})
    outer = {"model_type": kind, "tie_word_embeddings": False}
    bare = HfConfig(outer | {"text_config": {"model_type": "llama"}})
    fields = json.loads(json.dumps(whole.get_text_config().to_dict(), default=str))
    said = HfConfig(outer | {"text_config": fields | {"eos_token_id": None}})
    family = Multimodal.for_config(bare)
    assert family.read_config(bare, "Some") == family.read_config(said, "Some")
