"""Typed reading of a Hugging Face `config.json`, in the dialects of transformers 4 and 5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from gpu_worker.model_spec import LayerSpec, ModelConfigError, RopeSpec

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ROPE_KINDS = ("default", "linear", "llama3", "yarn")


class HfConfig:
    """The fields of one `config.json`; every error names the file and the field."""

    def __init__(self, fields: dict[str, Any], file: str = "config.json") -> None:
        self.fields = fields
        self.file = file

    @classmethod
    def open(cls, directory: Path) -> HfConfig:
        """Read `directory/config.json`.

        Raises:
            ModelConfigError: there is none, or it is not a JSON object.
        """
        file = directory / "config.json"
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ModelConfigError(
                f"{file}: {error.strerror}; --model must name a directory with config.json and *.safetensors"
            ) from error
        except ValueError as error:
            raise ModelConfigError(f"{file}: not valid JSON ({error}); copy the file again") from error
        if not isinstance(fields, dict):
            raise ModelConfigError(f"{file}: holds a JSON {type(fields).__name__}, not an object")
        return cls(fields, str(file))

    def error(self, field: str, problem: str) -> ModelConfigError:
        return ModelConfigError(f"{self.file}: {field} {problem}")

    def _get(self, field: str, kinds: tuple[type, ...], what: str, default: Any) -> Any:
        value = self.fields.get(field)
        if value is None:
            if default is ...:
                raise self.error(field, "is missing")
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self.error(field, f"is {value!r}, expected {what}")
        return value

    def integer(self, field: str, default: Any = ...) -> int:
        """A positive integer."""
        value = self._get(field, (int,), "an integer", default)
        if value is not default and value <= 0:
            raise self.error(field, f"is {value}, expected an integer above 0")
        return int(value)

    def number(self, field: str, default: Any = ...) -> float:
        return float(self._get(field, (int, float), "a number", default))

    def boolean(self, field: str, default: bool) -> bool:
        return bool(self._get(field, (bool,), "true or false", default))

    def text(self, field: str, default: Any = ...) -> str:
        return str(self._get(field, (str,), "a string", default))

    def architectures(self) -> list[str]:
        value = self._get("architectures", (list,), "a list of names", [])
        return [str(name) for name in value]

    def dtype(self) -> torch.dtype:
        """`dtype` (transformers 5) or `torch_dtype` (4); float32 where neither is given."""
        name = self.fields.get("dtype") or self.fields.get("torch_dtype") or "float32"
        if name not in _DTYPES:
            raise self.error("dtype", f"is {name!r}, expected one of {', '.join(_DTYPES)}")
        return _DTYPES[name]

    def eos_token_ids(self) -> tuple[int, ...]:
        value = self.fields.get("eos_token_id")
        if value is None:
            return ()
        return tuple(int(token) for token in (value if isinstance(value, list) else [value]))

    def heads(self) -> tuple[int, int, int]:
        """`(num_heads, num_kv_heads, head_dim)`; head_dim may be explicit and differ from hidden / heads."""
        num_heads = self.integer("num_attention_heads")
        num_kv_heads = self.integer("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise self.error(
                "num_attention_heads", f"{num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
            )
        head_dim = self.fields.get("head_dim")
        if head_dim is None:
            hidden_size = self.integer("hidden_size")
            if hidden_size % num_heads:
                raise self.error(
                    "hidden_size",
                    f"{hidden_size} is not a multiple of num_attention_heads {num_heads}, and head_dim is missing",
                )
            return num_heads, num_kv_heads, hidden_size // num_heads
        return num_heads, num_kv_heads, self.integer("head_dim")

    def rope(self, head_dim: int, default_theta: float = 10000.0) -> RopeSpec:
        """Rope from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling` (4)."""
        parameters = self.fields.get("rope_parameters") or self.fields.get("rope_scaling") or {}
        if not isinstance(parameters, dict):
            raise self.error("rope_parameters", f"is {parameters!r}, expected an object")
        nested = HfConfig(parameters, f"{self.file}: rope_parameters")
        kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
        if kind not in _ROPE_KINDS:
            raise nested.error("rope_type", f"is {kind!r}, supported are {', '.join(_ROPE_KINDS)}")
        theta = nested.number("rope_theta", self.number("rope_theta", default_theta))
        share = nested.number("partial_rotary_factor", self.number("partial_rotary_factor", 1.0))
        original = nested.integer(
            "original_max_position_embeddings", self.integer("original_max_position_embeddings", 0)
        )
        if kind in ("llama3", "yarn") and not original:
            raise nested.error("original_max_position_embeddings", f"is missing, and rope_type {kind} needs it")
        attention_factor = parameters.get("attention_factor")
        return RopeSpec(
            theta=theta,
            rotary_dim=int(head_dim * share),
            kind=kind,
            factor=nested.number("factor") if kind != "default" else 1.0,
            original_max_position_embeddings=original,
            low_freq_factor=nested.number("low_freq_factor", 1.0),
            high_freq_factor=nested.number("high_freq_factor", 4.0),
            beta_fast=nested.number("beta_fast", 32.0),
            beta_slow=nested.number("beta_slow", 1.0),
            truncate=nested.boolean("truncate", True),
            attention_factor=None if attention_factor is None else float(attention_factor),
        )

    def layers(self, sliding_window: int | None, first_windowed_layer: int = 0) -> tuple[LayerSpec, ...]:
        """One entry a layer: `layer_types` where the config has it, else windows from `first_windowed_layer` on."""
        num_layers = self.integer("num_hidden_layers")
        kinds = self.fields.get("layer_types")
        if kinds is None:
            kinds = ["full_attention"] * num_layers
            if sliding_window is not None:
                kinds[first_windowed_layer:] = ["sliding_attention"] * (num_layers - first_windowed_layer)
        if not isinstance(kinds, list) or len(kinds) != num_layers:
            raise self.error("layer_types", f"must have one entry for each of num_hidden_layers {num_layers}")
        unknown = set(kinds) - {"full_attention", "sliding_attention"}
        if unknown:
            raise self.error("layer_types", f"has {sorted(unknown)}, supported are full_attention, sliding_attention")
        if sliding_window is None and "sliding_attention" in kinds:
            raise self.error("sliding_window", "is missing, and layer_types has sliding_attention")
        return tuple(LayerSpec(sliding_window if kind == "sliding_attention" else None) for kind in kinds)
