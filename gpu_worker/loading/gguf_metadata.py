"""The metadata of a GGUF file, checked as it is asked for."""

from __future__ import annotations

from typing import Any

from gpu_worker.loading.gguf_file import of_every_layer
from gpu_worker.loading.gguf_reader import GgufReader
from gpu_worker.loading.tensor_source import CheckpointError


class CheckedMetadata:
    """Keys are those under the architecture's own prefix."""

    def __init__(self, reader: GgufReader) -> None:
        self.reader = reader
        self.metadata = reader.file.metadata
        self.tensors = reader.file.tensors
        self.prefix = reader.architecture_name

    def fail(self, reason: str, tensor: str | None = None) -> CheckpointError:
        advice = "the file is of a variant that is not known: use the safetensors version of the model"
        return CheckpointError(self.reader.path, reason, tensor=tensor, advice=advice)

    def optional(self, key: str, kind: type, default: Any = None) -> Any:
        name = f"{self.prefix}.{key}"
        if name not in self.metadata:
            return default
        value = self.metadata[name]
        if kind is int:  # Granite 4's converter writes how many heads each layer has
            value = of_every_layer(value)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise self.fail(f"metadata key {name!r} is {value!r:.60} and not of the kind {kind.__name__}")
        return value

    def required(self, key: str, kind: type) -> Any:
        value = self.optional(key, kind)
        if value is None:
            raise self.fail(f"lacks the metadata key '{self.prefix}.{key}'")
        return value

    def shape(self, gguf_name: str) -> tuple[int, ...]:
        if gguf_name not in self.tensors:
            raise self.fail("is missing", gguf_name)
        return self.tensors[gguf_name].shape

    def rope_factors(self, gguf_name: str, count: int) -> list[float]:
        if self.shape(gguf_name) != (count,):
            raise self.fail(f"has the shape {list(self.shape(gguf_name))} and not {[count]}", gguf_name)
        tensor = self.tensors[gguf_name]
        values = tensor.ggml_type.decode(
            self.reader.file.read_rows(gguf_name).reshape(-1, tensor.ggml_type.block_bytes)
        )
        return [float(str(value)) for value in values.flatten().numpy()]
