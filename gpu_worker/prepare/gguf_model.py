"""Turns one GGUF file into a model directory: config, tokenizer, and safetensors or the file itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gpu_worker.loading.gguf_config import build_config
from gpu_worker.loading.gguf_reader import GgufReader
from gpu_worker.loading.tensor_source import TensorInfo
from gpu_worker.loading.weight_files import GGUF_NAME
from gpu_worker.prepare.atomic_directory import exclusive, fill_directory
from gpu_worker.prepare.errors import PrepareError, explained_os_errors, format_size
from gpu_worker.prepare.gguf_tokenizer import GgufTokenizer, build_tokenizer
from gpu_worker.prepare.progress import Progress
from gpu_worker.prepare.safetensors_writer import plan_shards, write_shards
from gpu_worker.prepare.stamp import is_prepared, sha256_of, write_stamp
from gpu_worker.prepare.written_dtypes import PACKED

PIECE_ELEMENTS = 8 << 20  # decoded at a time: 32 MB as float32
_OTHER_FILES_BYTES = 100_000_000  # room for the tokenizer and the JSON files


def prepare_gguf(source: Path, target: Path, dtype: str, progress: Progress) -> bool:
    """Makes `target` from the GGUF file `source`; gives False if it was there already. `dtype` may be `PACKED`.

    Raises:
        CheckpointError: the file is damaged or of a kind that is not known.
        PrepareError: the result cannot be written.
    """
    with explained_os_errors(target), exclusive(target):
        if is_prepared(source, target, dtype):  # another process made it while this one waited
            return False
        with GgufReader(source) as reader:
            conversion = _Conversion(reader, dtype, progress)
            conversion.check_room(target.parent)
            fill_directory(target, conversion.fill)
    return True


class _Conversion:
    """One run; everything that can be wrong with the file is found before anything is written."""

    def __init__(self, reader: GgufReader, dtype: str, progress: Progress) -> None:
        self._reader = reader
        self._dtype = dtype
        self._progress = progress
        self._config = build_config(reader, "bfloat16" if dtype == PACKED else dtype)
        if dtype == PACKED:
            self._config["quantization_config"] = {"quant_method": "gguf"}
        self._tokenizer: GgufTokenizer = build_tokenizer(
            reader.path, reader.file.metadata, self._config["max_position_embeddings"]
        )
        self._infos = [
            replace(info, dtype=getattr(torch, dtype)) for info in (() if dtype == PACKED else reader.names())
        ]
        self._num_bytes = sum(info.num_bytes for info in self._infos)

    def check_room(self, directory: Path) -> None:
        free = shutil.disk_usage(directory).free
        needed = self._num_bytes + _OTHER_FILES_BYTES
        if free < needed:
            raise PrepareError(
                f"{directory} has {format_size(free)} of free space, {format_size(needed)} are needed: "
                "make room, or name another directory with --cache-dir"
            )

    def fill(self, directory: Path) -> None:
        for note in self._tokenizer.notes:
            self._progress.note(note)
        with explained_os_errors(directory, self._num_bytes):
            self._write_json(directory, "config.json", self._config)
            self._write_json(directory, "generation_config.json", self._generation_config())
            self._write_json(directory, "tokenizer_config.json", self._tokenizer.config)
            (directory / "tokenizer.json").write_text(self._tokenizer.tokenizer.to_str(pretty=False), "utf-8")
            weights = self._keep_file(directory) if self._dtype == PACKED else self._write_weights(directory)
            outputs = ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", *weights]
            sources = self._reader.file.parts
            hashes = {path.name: sha256_of(path) for path in sources}
            write_stamp(directory, sources, {"dtype": self._dtype}, outputs, hashes)

    def _write_weights(self, directory: Path) -> list[str]:
        title = f"Converting {self._reader.path.name} to {self._dtype}"
        with self._progress.task(title, self._num_bytes) as advance:
            return write_shards(directory, plan_shards(self._infos), self._pieces, advance)

    def _keep_file(self, directory: Path) -> list[str]:
        """A second name of each file, which costs no space; a link where it lies on another disk."""
        parts = self._reader.file.parts
        names = [GGUF_NAME]
        if len(parts) > 1:
            stem = GGUF_NAME.removesuffix(".gguf")
            names = [f"{stem}-{number:05d}-of-{len(parts):05d}.gguf" for number in range(1, len(parts) + 1)]
        for name, part in zip(names, parts, strict=True):
            kept, source = directory / name, part.resolve()
            try:
                kept.hardlink_to(source)
            except OSError:
                kept.symlink_to(source)
        return names

    def _write_json(self, directory: Path, name: str, content: dict[str, Any]) -> None:
        (directory / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")

    def _generation_config(self) -> dict[str, Any]:
        eos = self._tokenizer.eos_token_ids
        config: dict[str, Any] = {
            key: self._config[key] for key in ("bos_token_id", "pad_token_id") if self._config.get(key) is not None
        }
        if eos:
            config["eos_token_id"] = eos[0] if len(eos) == 1 else eos
        return config

    def _pieces(self, info: TensorInfo) -> Iterator[torch.Tensor]:
        """The tensor a few rows at a time, so that even a large embedding is never whole in memory."""
        row_elements = info.num_elements // info.shape[0]
        rows_at_once = max(1, PIECE_ELEMENTS // row_elements)
        for start in range(0, info.shape[0], rows_at_once):
            stop = min(start + rows_at_once, info.shape[0])
            yield self._reader.read(info.name, (slice(start, stop),)).to(info.dtype)
