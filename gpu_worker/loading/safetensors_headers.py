"""Finds the safetensors files of a model and checks their headers, without torch, which takes seconds to import.

Format: 8 bytes little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}}`, then the data
(https://huggingface.co/docs/safetensors). Every header is checked against its file before anything is read, so that a
missing or truncated shard is found before memory is allocated for the model.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from gpu_worker.loading.tensor_source import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}

_SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_MAY_BE_STALE = re.compile(r"(^|\.)(lm_head\.weight|rotary_emb\.inv_freq)$")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_PICKLE_ADVICE = (
    "pickle files can run code when they are opened, so they are never read: use a safetensors version of the model "
    "(most repositories have one; `transformers`' save_pretrained writes one)"
)
_DOWNLOAD_ADVICE = "download or copy the file again"


class HeaderEntry(NamedTuple):
    """One tensor: where its data lies in the file, counted from the end of the header."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    begin: int
    end: int


def read_headers(path: Path) -> dict[str, HeaderEntry]:
    """The tensors of a directory with `model.safetensors`, with shards and an index, or of a single file, by name.

    Raises:
        CheckpointError: anything about the files is not as it must be.
    """
    index: dict[str, Path] | None = None
    if path.is_dir():
        files, index = _find_files(path)
    else:
        _refuse_pickle(path)
        files = [path]
    entries: dict[str, HeaderEntry] = {}
    for file in files:
        for entry in read_header(file):
            known = entries.setdefault(entry.name, entry)
            if known is not entry:
                raise CheckpointError(
                    file,
                    f"is also in {known.file.name}: which of the two is meant is not decidable",
                    tensor=entry.name,
                    advice="remove the file that does not belong to the model",
                )
    if index is not None:
        _check_index(path / INDEX_NAME, index, entries)
    return entries


def _check_index(index_file: Path, index: dict[str, Path], entries: dict[str, HeaderEntry]) -> None:
    """Every tensor of the index must be there, in whichever of its files: tools move tensors, and copy indexes.

    Tensors the index leaves out are listed like the others: the strict accounting of the model builder decides about
    them, and about those that an index has from before their module was packed or the head was tied.
    """
    modules = {name.rpartition(".")[0] for name in entries} - {""}
    for name, file in index.items():
        if name in entries or name.rpartition(".")[0] in modules or _MAY_BE_STALE.search(name):
            continue
        raise CheckpointError(
            file,
            f"{INDEX_NAME} says that this tensor is in this file, and it is not",
            tensor=name,
            advice=f"the shards and {index_file} are of different versions: download all of them again",
        )


def read_header(file: Path) -> list[HeaderEntry]:
    """The tensors of one file in the order of their data, after checking that the file holds all of it."""
    header, data_start, file_size = _load_header(file)
    entries: list[HeaderEntry] = []
    for name, fields in header.items():
        if name == "__metadata__":
            continue
        entries.append(_parse_entry(file, name, fields))
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    position = 0
    data_size = file_size - data_start
    for entry in entries:
        if entry.end > data_size:
            raise CheckpointError(
                file,
                f"the file is truncated: its data ends at byte {data_start + entry.end:,}, the file at {file_size:,}",
                tensor=entry.name,
                advice=_DOWNLOAD_ADVICE,
            )
        if entry.begin != position:
            what = "overlaps the tensor before it" if entry.begin < position else "leaves a gap before it"
            raise CheckpointError(
                file,
                f"its data begins at {entry.begin:,} and {what} (which ends at {position:,})",
                tensor=entry.name,
                advice=_DOWNLOAD_ADVICE,
            )
        position = entry.end
    if position != data_size:
        raise CheckpointError(
            file, f"holds {data_size - position:,} bytes after its last tensor", advice=_DOWNLOAD_ADVICE
        )
    return entries


def _load_header(file: Path) -> tuple[dict[str, Any], int, int]:
    """The JSON header, the offset where data begins, and the file's size."""
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    file,
                    f"is truncated or no safetensors file: its header is {length:,} bytes long, the file {size:,}",
                    advice=_DOWNLOAD_ADVICE + _lfs_hint(file, size),
                )
            raw = stream.read(length)
    except FileNotFoundError as error:
        raise CheckpointError(file, "does not exist", advice=_DOWNLOAD_ADVICE) from error
    except OSError as error:
        raise CheckpointError(file, f"cannot be read ({error.strerror})") from error

    def reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            for name, _ in pairs:
                if name in seen:
                    raise CheckpointError(file, "is listed twice in the header", tensor=name, advice=_DOWNLOAD_ADVICE)
                seen.add(name)
        return result

    try:
        header = json.loads(raw, object_pairs_hook=reject_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(file, f"its header is not JSON ({error})", advice=_DOWNLOAD_ADVICE) from error
    if not isinstance(header, dict):
        raise CheckpointError(file, "its header is not a JSON object", advice=_DOWNLOAD_ADVICE)
    return header, 8 + length, size


def _lfs_hint(file: Path, size: int) -> str:
    """A clone without git-lfs leaves small text files in place of the weights: say so, it is a common surprise."""
    with file.open("rb") as stream:
        pointer = size < 1024 and stream.read(40).startswith(b"version https://git-lfs")
    return " (it is a git-lfs pointer: run `git lfs pull`)" if pointer else ""


def _parse_entry(file: Path, name: str, fields: Any) -> HeaderEntry:
    def fail(reason: str) -> CheckpointError:
        return CheckpointError(file, reason, tensor=name, advice=_DOWNLOAD_ADVICE)

    if not isinstance(fields, dict):
        raise fail("its header entry is not a JSON object")
    dtype_name, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype_name, str) or dtype_name not in ITEM_BYTES:
        known = ", ".join(ITEM_BYTES)
        raise CheckpointError(file, f"has the unknown dtype {dtype_name!r}", tensor=name, advice=f"known are: {known}")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise fail(f"has the bad shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(o) is int and o >= 0 for o in offsets):
        raise fail(f"has the bad data_offsets {offsets!r}")
    wanted = math.prod(shape) * ITEM_BYTES[dtype_name]
    begin, end = offsets
    if end - begin != wanted:
        raise fail(f"{dtype_name} {shape} needs {wanted:,} bytes, its data_offsets give {end - begin:,}")
    return HeaderEntry(name, tuple(shape), dtype_name, file, begin, end)


def _find_files(directory: Path) -> tuple[list[Path], dict[str, Path] | None]:
    """The files that make up the model, and the index (tensor name to file) if there is one."""
    single = directory / SINGLE_NAME
    if (directory / INDEX_NAME).exists():
        index = _load_index(directory)
        # Tools that quantize copy the index of the model that they read, whose shards are not those that they write.
        are_others = single.exists() or any(map(_SHARD_NAME.fullmatch, (file.name for file in _weights_in(directory))))
        if not are_others or any(file.exists() for file in index.values()):
            _check_shards(index)
            return sorted(set(index.values())), index
    if single.exists():
        return [single], None
    found = _weights_in(directory)
    shards = [match for file in found if (match := _SHARD_NAME.fullmatch(file.name))]
    if shards:
        return _check_shards_without_index(directory, shards), None
    if any(file.name.startswith("consolidated") for file in found):
        raise CheckpointError(
            directory,
            "holds only consolidated*.safetensors, whose tensor names are Mistral's own",
            advice=f"get the files of the Hugging Face layout too ({SINGLE_NAME} or {INDEX_NAME} with its shards)",
        )
    if any(file.name.startswith("adapter_") for file in found):
        raise CheckpointError(
            directory, "holds an adapter and not a model", advice="give the directory of its base model"
        )
    if len(found) == 1:
        return found, None
    if found:
        names = ", ".join(file.name for file in found)
        raise CheckpointError(
            directory, f"holds several safetensors files and no {INDEX_NAME}: {names}", advice="give one of the files"
        )
    for file in sorted(directory.iterdir()):
        _refuse_pickle(file)
    ggufs = ", ".join(file.name for file in sorted(directory.glob("*.gguf")))
    raise CheckpointError(
        directory,
        "holds no *.safetensors file",
        advice=f"give the path of a .gguf file in it: {ggufs}" if ggufs else "is the download complete?",
    )


def _weights_in(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def _load_index(directory: Path) -> dict[str, Path]:
    file = directory / INDEX_NAME
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(file, f"is not readable JSON ({error})", advice=_DOWNLOAD_ADVICE) from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(file, "has no weight_map", advice=_DOWNLOAD_ADVICE)
    index: dict[str, Path] = {}
    for name, shard in weight_map.items():
        # a shard name with a directory in it would let an index point at any file of the machine
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
            raise CheckpointError(file, f"its file name {shard!r} is not the plain name of a file", tensor=name)
        _refuse_pickle(directory / shard)
        index[name] = directory / shard
    return index


def _check_shards(index: dict[str, Path]) -> None:
    for shard_file in sorted(set(index.values())):
        if not shard_file.exists():
            example = next(name for name, where in index.items() if where == shard_file)
            raise CheckpointError(
                shard_file,
                f"this shard, named by {INDEX_NAME}, does not exist",
                tensor=example,
                advice=_DOWNLOAD_ADVICE,
            )


def _check_shards_without_index(directory: Path, shards: list[re.Match[str]]) -> list[Path]:
    """Numbered shards say how many there must be, so a gap shows without an index too."""
    stems = {match["stem"] for match in shards}
    counts = {int(match["count"]) for match in shards}
    if len(stems) > 1 or len(counts) > 1:
        names = ", ".join(match.string for match in shards)
        raise CheckpointError(
            directory, f"holds shards of different models and no {INDEX_NAME}: {names}", advice="keep one model in it"
        )
    count = counts.pop()
    present = {int(match["number"]) for match in shards}
    for number in range(1, count + 1):
        if number not in present:
            file = directory / f"{shards[0]['stem']}-{number:05d}-of-{count:05d}.safetensors"
            raise CheckpointError(file, f"this shard ({number} of {count}) does not exist", advice=_DOWNLOAD_ADVICE)
    return [directory / match.string for match in shards]


def _refuse_pickle(file: Path) -> None:
    if file.name.endswith(_PICKLE_SUFFIXES):
        raise CheckpointError(file, "is a pickle file", advice=_PICKLE_ADVICE)
