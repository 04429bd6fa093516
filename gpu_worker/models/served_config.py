"""What transformers is asked to build for a checkpoint: a causal language model, or one within a model of more."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_worker.model_spec import ModelConfigError
from gpu_worker.models.refusals import first_line, unserved

HOLD_A_MODEL = ("Gemma3nForConditionalGeneration",)
"""Without images and sound they compute as the language model within them, which is what runs."""
LANGUAGE_MODEL = r"^(thinker\.)?(model\.language_model|model\.text_model|language_model\.model)\."
LANGUAGE_HEAD = r"^(thinker\.|language_model\.|model\.)lm_head\."
"""How the tensors of a language model are called in a checkpoint that holds other models too."""
PREDICTS_AHEAD = r"^((model|language_model)\.)*mtp(_\w+)?\."
"""Tensors of what predicts a second token ahead, where it does not come as layers behind the last."""


def is_known(architecture: str) -> bool:
    """Whether transformers itself has this causal language model, or holds one in this; False without transformers."""
    return architecture in _causal().values() or _is_multimodal(architecture)


def is_known_part(kind: Any) -> bool:
    """Whether transformers has text parts of this `model_type` as causal language models."""
    return kind in _causal()


def causal_class(kind: Any) -> str | None:
    """The class of the causal language model of a `model_type`; None: transformers has none, or is not installed."""
    return _causal().get(kind) if isinstance(kind, str) else None


def auto_class(architecture: str) -> Any:
    """What builds models of this class."""
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    return AutoModelForCausalLM if architecture in _causal().values() else AutoModelForMultimodalLM


def model_class(architecture: str) -> Any:
    """The class of transformers that is called so."""
    import transformers

    return getattr(transformers, architecture)


def _causal() -> dict[str, str]:
    """`model_type` -> class of a causal language model; empty without transformers."""
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    except ImportError:
        return {}
    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _is_multimodal(architecture: str) -> bool:
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    except ImportError:
        return False
    return architecture in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.values()


@dataclass(frozen=True, slots=True)
class ServedConfig:
    """What transformers builds."""

    config: Any
    architecture: str
    is_part: bool
    """A language model within a checkpoint that holds others as well."""

    @classmethod
    def of(cls, directory: Path, architecture: str) -> ServedConfig:
        """The language model alone, where transformers has it by itself and its tensors' names are known; else the
        whole, other parts and all.

        Raises:
            ModelConfigError: it holds no language model.
        """
        config = _open_config(directory)
        text = config.get_text_config()
        is_whole = _causal().get(config.model_type) == architecture
        if text is config or (is_whole and architecture not in HOLD_A_MODEL):
            return cls(config, architecture, is_part=False)
        causal = _causal().get(text.model_type)
        if causal is None or not _names_are_known(architecture):
            if getattr(config, "is_encoder_decoder", False):
                raise unserved(architecture, "it is an encoder with a decoder, of which neither is served alone")
            if not _is_multimodal(architecture):
                raise unserved(architecture, f"its text part {text.model_type!r} is no language model of transformers")
            return cls(config, architecture, is_part=False)
        if getattr(config, "tie_word_embeddings", None) is not None:
            text.tie_word_embeddings = config.tie_word_embeddings
        return cls(text, causal, is_part=True)


def _names_are_known(architecture: str) -> bool:
    from gpu_worker.models.registry import known_architectures

    return architecture in (*HOLD_A_MODEL, *known_architectures())


def _open_config(directory: Path) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise ModelConfigError(
            f"{directory / 'config.json'}: transformers cannot read it ({first_line(error)})"
        ) from error
    for part in (config, config.get_text_config()):
        # Packed weights are unpacked here, and not by transformers.
        part.__dict__.pop("quantization_config", None)
    # Only to be warned of padding, which a step has none of; looking for it reads token ids back from the device.
    # Some classes insist on a number.
    with contextlib.suppress(Exception):
        config.get_text_config().pad_token_id = None
    return config
