"""Typed reading of a Hugging Face `config.json`, in the dialects of transformers 4 and 5."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gpu_worker.layers.rope import yarn_factor
from gpu_worker.model_spec import LayerSpec, ModelConfigError, ModelSpec, RopeSpec

FULL = "full_attention"
SLIDING = "sliding_attention"

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STORED_DTYPES = ("float8_e4m3fn", "float8_e5m2", "int8", "uint8", "int4", "float4_e2m1fn_x2")
_ROPE_KINDS = ("default", "linear", "llama3", "yarn", "longrope", "proportional")


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
        return cls.read(directory / "config.json")

    @classmethod
    def read(cls, file: Path) -> HfConfig:
        """Read one JSON file; errors as those of `open`."""
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

    def count(self, field: str, default: int) -> int:
        """An integer that may be 0."""
        value = self._get(field, (int,), "an integer", default)
        if value < 0:
            raise self.error(field, f"is {value}, expected an integer from 0 on")
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
        """`dtype` (transformers 5) or `torch_dtype` (4); float32 where neither says one.

        Some tools that quantize name there what they store weights in: bfloat16 is computed in then.
        """
        given = (self.fields.get(field) for field in ("dtype", "torch_dtype"))
        name = next((str(name) for name in given if name and name != "auto"), "float32").removeprefix("torch.")
        if name in _STORED_DTYPES and self.is_quantized():
            return torch.bfloat16
        if name not in _DTYPES:
            raise self.error("dtype", f"is {name!r}, expected one of {', '.join(_DTYPES)}")
        return _DTYPES[name]

    def nested(self, field: str) -> HfConfig:
        """An object inside, with this config's dtype, end tokens and quantization where it has none of its own."""
        inner = self.fields.get(field)
        if not isinstance(inner, dict):
            raise self.error(field, f"is {inner!r}, expected an object")
        shared = ("dtype", "torch_dtype", "eos_token_id", "quantization_config", "compression_config")
        outer: dict[str, Any] = {name: self.fields[name] for name in shared if name in self.fields}
        return HfConfig(outer | inner, f"{self.file}: {field}")

    def optional_number(self, field: str, default: float | None = None) -> float | None:
        """A number; `default` where the field is missing, None where it is null."""
        if field not in self.fields:
            return default
        return None if self.fields[field] is None else self.number(field)

    def optional_integer(self, field: str, default: int | None = None) -> int | None:
        """A positive integer; `default` where the field is missing, None where it is null."""
        if field not in self.fields:
            return default
        return None if self.fields[field] is None else self.integer(field)

    def refuse(self, field: str, *accepted: Any) -> None:
        """Raise for a field with a value that asks for what is not done; missing and null are accepted."""
        value = self.fields.get(field)
        if value is not None and value not in accepted:
            raise self.error(
                field, f"is {value!r}, which is not supported (supported: {', '.join(map(repr, accepted))})"
            )

    def quantization_fields(self) -> Any:
        """`quantization_config` under its names of all times, of the whole or of the text part; None: there is none.

        `compression_config` is from before compressed-tensors was part of transformers, `quantization` is MLX's.
        """
        for part in (self.fields, self.fields.get("text_config"), self.fields.get("thinker_config")):
            for name in ("quantization_config", "compression_config", "quantization"):
                found = part.get(name) if isinstance(part, dict) else None
                if found and (name != "quantization" or (isinstance(found, dict) and "bits" in found)):
                    return found
        return None

    def is_quantized(self) -> bool:
        """Whether the checkpoint's weights are; tools that quantize store experts one by one."""
        return self.quantization_fields() is not None

    def num_labels(self) -> int:
        """Of a classification head: `id2label` has them all, and transformers' default is two."""
        labels = self.fields.get("id2label")
        return len(labels) if isinstance(labels, dict) else self.integer("num_labels", 2)

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

    def rope_parameters(self, layer_type: str | None = None) -> HfConfig:
        """What `rope_parameters` (transformers 5) and `rope_scaling` (4) say together, the type under `rope_type`.

        Where both are there, somebody has stretched the model by hand: `rope_scaling` wins, the base stays.
        """
        found: dict[str, dict[str, Any]] = {}
        for name in ("rope_parameters", "rope_scaling"):
            found[name] = self.fields.get(name) or {}
            if not isinstance(found[name], dict):
                raise self.error(name, f"is {found[name]!r:.60}, expected an object")
        parameters, scaling = found["rope_parameters"], found["rope_scaling"]
        by_layer = {kind: fields for kind, fields in parameters.items() if isinstance(fields, dict)}
        if by_layer:
            entries = [by_layer[layer_type]] if layer_type in by_layer else list(by_layer.values())
            if scaling or any(fields != entries[0] for fields in entries):
                raise self.error("rope_parameters", f"has {', '.join(by_layer)}: which is meant is not decidable here")
            parameters = entries[0]
        kinds = [fields.get("rope_type") or fields.get("type") for fields in (scaling, parameters)]
        merged = parameters | scaling | {"rope_type": next((kind for kind in kinds if kind), None)}
        return HfConfig(merged, f"{self.file}: {'rope_scaling' if scaling else 'rope_parameters'}")

    def rope(
        self,
        head_dim: int,
        default_theta: float = 10000.0,
        *,
        layer_type: str | None = None,
        rotates_partly: bool = False,
    ) -> RopeSpec:
        """Rope from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling` (4).

        `layer_type`: the entry to take where `rope_parameters` has one for every kind of layer.
        `rotates_partly`: the family knows `partial_rotary_factor`.
        """
        nested = self.rope_parameters(layer_type)
        kind = nested.text("rope_type", "default")
        if kind == "dynamic":
            nested.refuse("alpha")  # Hunyuan's, by which its base grows whatever the length
        # It stretches nothing within max_position_embeddings, which no sequence exceeds here.
        kind = {"su": "longrope", "dynamic": "default"}.get(kind, kind)
        if kind not in _ROPE_KINDS:
            raise nested.error("rope_type", f"is {kind!r}, supported are {', '.join(_ROPE_KINDS)}, dynamic")
        theta = nested.number("rope_theta", self.number("rope_theta", default_theta))
        share = nested.number("partial_rotary_factor", self.number("partial_rotary_factor", 1.0))
        rotated_share = 1.0
        if kind == "proportional":
            rotated_share, share = share, 1.0
        if share != 1.0 and not rotates_partly:
            # transformers' classes of the other families rotate whole heads, whatever the field says, and fail where
            # rope is scaled besides.
            if nested.fields["rope_type"] not in (None, "default"):
                raise self.error("partial_rotary_factor", f"is {share}, and this architecture rotates whole heads")
            share = 1.0
        # As in transformers: outside (Phi-3) before inside, and else what the model was made for.
        original = self.integer(
            "original_max_position_embeddings", nested.integer("original_max_position_embeddings", 0)
        )
        if kind in ("llama3", "yarn", "longrope") and not original:
            original = self.integer("max_position_embeddings", 0)
            if not original:
                raise nested.error("original_max_position_embeddings", f"is missing, and rope_type {kind} needs it")
        rope = RopeSpec(
            theta=theta,
            rotary_dim=int(head_dim * share),
            kind=kind,
            factor=nested.number("factor", 1.0 if kind == "proportional" else ...)
            if kind in ("linear", "llama3", "yarn", "proportional")
            else 1.0,
            original_max_position_embeddings=original,
            low_freq_factor=nested.number("low_freq_factor", 1.0),
            high_freq_factor=nested.number("high_freq_factor", 4.0),
            beta_fast=nested.number("beta_fast", 32.0),
            beta_slow=nested.number("beta_slow", 1.0),
            truncate=nested.boolean("truncate", True),
            attention_factor=nested.optional_number("attention_factor"),
            rotated_share=rotated_share,
        )
        if kind == "longrope":
            return self._longrope(nested, rope)
        mscale, all_dims = nested.optional_number("mscale"), nested.optional_number("mscale_all_dim")
        if kind == "yarn" and rope.attention_factor is None and mscale and all_dims:
            return replace(rope, attention_factor=yarn_factor(rope.factor, mscale) / yarn_factor(rope.factor, all_dims))
        return rope

    def _longrope(self, nested: HfConfig, rope: RopeSpec) -> RopeSpec:
        factors = {}
        for name in ("short_factor", "long_factor"):
            value = nested.fields.get(name)
            if not isinstance(value, list) or len(value) != rope.rotary_dim // 2:
                raise nested.error(
                    name, f"must be a list of {rope.rotary_dim // 2} numbers, half of the rotated dimensions"
                )
            factors[name] = tuple(float(number) for number in value)
        stretch = self.integer("max_position_embeddings") / rope.original_max_position_embeddings
        return replace(
            rope,
            factor=nested.number("factor", stretch),
            short_factors=factors["short_factor"],
            long_factors=factors["long_factor"],
        )

    def layer_types(self, is_windowed: Callable[[int], bool]) -> list[str]:
        """`layer_types`, or what `is_windowed` says of each layer where the config has none."""
        num_layers = self.integer("num_hidden_layers")
        kinds = self.fields.get("layer_types")
        if kinds is None:
            return [SLIDING if is_windowed(layer) else FULL for layer in range(num_layers)]
        if not isinstance(kinds, list) or len(kinds) != num_layers:
            raise self.error("layer_types", f"must have one entry for each of num_hidden_layers {num_layers}")
        unknown = set(kinds) - {FULL, SLIDING}
        if unknown:
            raise self.error("layer_types", f"has {sorted(unknown)}, supported are {FULL}, {SLIDING}")
        return [str(kind) for kind in kinds]

    def layers(
        self,
        rope: RopeSpec | Mapping[str, RopeSpec | None],
        sliding_window: int | None,
        is_windowed: Callable[[int], bool] = lambda layer: True,
    ) -> tuple[LayerSpec, ...]:
        """One entry a layer. `rope` is the one of all layers, or one for each kind of layer."""
        kinds = self.layer_types(lambda layer: sliding_window is not None and is_windowed(layer))
        if sliding_window is None and SLIDING in kinds:
            raise self.error("sliding_window", f"is missing, and layer_types has {SLIDING}")
        ropes = rope if isinstance(rope, Mapping) else {FULL: rope, SLIDING: rope}
        return tuple(LayerSpec(ropes[kind], sliding_window if kind == SLIDING else None) for kind in kinds)

    def decoder(self, architecture: str, layers: tuple[LayerSpec, ...], **fields: Any) -> ModelSpec:
        """A `ModelSpec` of the fields that every family reads alike; `fields` are the family's own, and win."""
        num_heads, num_kv_heads, head_dim = (
            (0, 0, 0) if "head_dim" in fields and "num_heads" in fields else self.heads()
        )
        common: dict[str, Any] = {
            "vocab_size": self.integer("vocab_size"),
            "hidden_size": self.integer("hidden_size"),
            "intermediate_size": self.integer("intermediate_size"),
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": self.integer("max_position_embeddings", 2048),
            "dtype": self.dtype(),
            "activation": self.text("hidden_act", "silu"),
            "tie_word_embeddings": self.boolean("tie_word_embeddings", False),
            "eos_token_ids": self.eos_token_ids(),
        }
        if "norm_eps" not in fields:
            common["norm_eps"] = self.number("rms_norm_eps", 1e-6)
        merged = common | fields
        merged["max_position_embeddings"] = max(merged["max_position_embeddings"], self._stretched_context())
        return ModelSpec(architecture=architecture, layers=layers, **merged)

    def _stretched_context(self) -> int:
        """What YaRN stretches the context to; 0: it does not.

        Who stretches a model by hand, as Qwen's model cards say, leaves `max_position_embeddings` as it was.
        """
        for name in ("rope_scaling", "rope_parameters"):
            rope = self.fields.get(name)
            if isinstance(rope, dict) and "yarn" in (rope.get("rope_type"), rope.get("type")):
                original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
                if isinstance(original, int) and isinstance(factor, int | float):
                    return int(original * factor)
        return 0
