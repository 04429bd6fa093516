"""The JSON files of a model directory that the frontend reads: names of special tokens, end-of-sequence ids, defaults.

Weights are never opened here. A file that is damaged stops the start with a message that names file and field; a file
that is absent only means that nothing is set there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# Sampling settings that generation_config.json may set: (smallest, largest), both allowed.
_DEFAULT_RANGES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "temperature": (0.0, 2.0),
        "top_p": (0.0, 1.0),
        "top_k": (0, 2**31 - 1),
        "min_p": (0.0, 1.0),
        "repetition_penalty": (1e-3, 100.0),
    }
)


class ModelFilesError(Exception):
    """A model directory that cannot be served as it is; the message says which file and what to do."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What the JSON files of one model directory say."""

    directory: Path | None
    eos_token_ids: frozenset[int] = frozenset()
    # Names as chat templates know them: "bos_token" -> "<s>".
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    # Subset of temperature, top_p, top_k, min_p, repetition_penalty.
    sampling_defaults: Mapping[str, float] = field(default_factory=dict)
    chat_template: str | None = None

    @property
    def tokenizer_file(self) -> Path | None:
        """None where the directory has no tokenizer: the server then takes and gives token ids only."""
        if self.directory is None:
            return None
        path = self.directory / "tokenizer.json"
        return path if path.is_file() else None


def read_model_files(directory: Path | None, chat_template_file: Path | None = None) -> ModelFiles:
    """Read what a model directory says; without one only the chat template, if any.

    Raises:
        ModelFilesError: the directory does not exist, or a file in it is damaged.
    """
    template_override = None if chat_template_file is None else _read_text(chat_template_file, "--chat-template")
    if directory is None:
        return ModelFiles(None, chat_template=template_override)
    if not directory.is_dir():
        raise ModelFilesError(
            f"--model {directory}: not a directory. Give the directory that holds the model's config.json and "
            "tokenizer.json (`stepwire prepare` makes one of a .gguf file or a hub id)."
        )
    config = _read_json(directory / "config.json")
    generation_config = _read_json(directory / "generation_config.json")
    tokenizer_config = _read_json(directory / "tokenizer_config.json")
    special_tokens_map = _read_json(directory / "special_tokens_map.json")

    eos_token_ids = (
        _eos_token_ids(config, directory / "config.json")
        | _eos_token_ids(config.get("text_config") or {}, directory / "config.json")
        | _eos_token_ids(generation_config, directory / "generation_config.json")
    )
    return ModelFiles(
        directory=directory,
        eos_token_ids=eos_token_ids,
        special_tokens=_special_tokens(special_tokens_map) | _special_tokens(tokenizer_config),
        sampling_defaults=_sampling_defaults(generation_config, directory / "generation_config.json"),
        chat_template=template_override or _chat_template(directory, tokenizer_config),
    )


def _read_text(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFilesError(f"{what} {path}: cannot be read as UTF-8 text: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path, "model file"))
    except ValueError as error:
        raise ModelFilesError(f"{path}: not valid JSON ({error}); copy the file again from its source.") from error
    if not isinstance(value, dict):
        raise ModelFilesError(f"{path}: a JSON object was expected, not {type(value).__name__}.")
    return value


def _eos_token_ids(config: Mapping[str, Any], path: Path) -> frozenset[int]:
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
            raise ModelFilesError(f"{path}: eos_token_id must be a token id or a list of them, not {value!r}.")
    return frozenset(ids)


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Each name is a string, or an object with the string as `content`."""
    tokens: dict[str, str] = {}
    for name in SPECIAL_TOKEN_NAMES:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[name] = text
    return tokens


def _sampling_defaults(config: Mapping[str, Any], path: Path) -> dict[str, float]:
    """`do_sample` is not a default of ours: who wants greedy decoding asks for temperature 0."""
    defaults: dict[str, float] = {}
    for name, (low, high) in _DEFAULT_RANGES.items():
        value = config.get(name)
        if value is None or (name == "top_k" and value == -1):  # two ways to say that there is none
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not low <= value <= high or (name == "top_p" and value == 0):
            raise ModelFilesError(f"{path}: {name} must be a number from {low:g} to {high:g}, not {value!r}.")
        defaults[name] = value
    return defaults


def _chat_template(directory: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """`chat_template.jinja` wins; tokenizer_config.json has one string, or several under names.

    Models that see or hear had theirs in chat_template.json until 2025, some of them nowhere else.
    """
    file = directory / "chat_template.jinja"
    if file.is_file():
        return _read_text(file, "chat template")
    path, value = directory / "tokenizer_config.json", tokenizer_config.get("chat_template")
    if not value:
        path = directory / "chat_template.json"
        value = _read_json(path).get("chat_template")
    if value is None or isinstance(value, str):
        return value or None
    try:
        named = {str(entry["name"]): str(entry["template"]) for entry in value}
    except (TypeError, KeyError) as error:
        raise ModelFilesError(f"{path}: chat_template must be a string or a list of {{name, template}}.") from error
    if "default" in named:
        return named["default"]
    if len(named) == 1:
        return next(iter(named.values()))
    raise ModelFilesError(
        f"{path}: chat_template has no entry named 'default' (there are: {', '.join(sorted(named)) or 'none'}); "
        "choose one with --chat-template FILE."
    )
