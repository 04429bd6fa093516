"""Which architectures can be served: every module of this package is scanned once, and says so with `@register`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from functools import cache

import gpu_worker.models
from gpu_worker.model_spec import ModelConfigError
from gpu_worker.models.family import ModelFamily
from gpu_worker.models.headless import classifier, without_head
from gpu_worker.models.served_config import is_known
from gpu_worker.models.transformers_fallback import TransformersModel

_families: dict[str, type[ModelFamily]] = {}


def register(*architectures: str) -> Callable[[type[ModelFamily]], type[ModelFamily]]:
    """Class decorator: this family serves these `architectures` of `config.json`."""

    def add(family: type[ModelFamily]) -> type[ModelFamily]:
        for name in architectures:
            taken = _families.setdefault(name, family)
            if taken is not family:
                raise ValueError(f"{name} is registered by {taken.__name__} and by {family.__name__}")
        return family

    return add


@cache
def _scan() -> None:
    for module in pkgutil.iter_modules(gpu_worker.models.__path__):
        importlib.import_module(f"{gpu_worker.models.__name__}.{module.name}")


def known_architectures() -> list[str]:
    _scan()
    return sorted(_families)


def _pooled_family(architecture: str) -> tuple[str, type[ModelFamily]] | None:
    """A decoder that is stored without its output head, or with a classifier in its place."""
    for suffix, wrap in (
        ("TextModel", without_head),
        ("Model", without_head),
        ("ForSequenceClassification", classifier),
    ):
        causal = f"{architecture.removesuffix(suffix)}ForCausalLM"
        if architecture.endswith(suffix) and causal in _families:
            return causal, wrap(_families[causal])
    return None


def find_family(architectures: Sequence[str]) -> tuple[str, type[ModelFamily]]:
    """The first of a config's `architectures` that can be served, and its family; native code goes first.

    Capitals do not matter: the first conversions of Llama call it `LLaMAForCausalLM`.

    Raises:
        ModelConfigError: none can; the message lists those that can.
    """
    _scan()
    for name in architectures:
        if name in _families:
            return name, _families[name]
    by_small_letters = {name.lower(): name for name in _families}
    for name in architectures:
        if name.lower() in by_small_letters:
            known = by_small_letters[name.lower()]
            return known, _families[known]
    for name in architectures:
        pooled = _pooled_family(name)
        if pooled is not None:
            return pooled
    for name in architectures:
        if is_known(name):
            return name, TransformersModel
    asked = ", ".join(architectures) if architectures else "nothing"
    raise ModelConfigError(
        f"config.json names {asked} in architectures, which is not supported; "
        f"supported are {', '.join(sorted(_families))}, and causal language models that an installed transformers "
        "has code for"
    )
