"""Downloads a model from the Hugging Face hub: weights as safetensors, and the small files beside them, or one of the
GGUF files that a repository has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gpu_worker.prepare.errors import PrepareError
from gpu_worker.prepare.progress import Progress

_WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt"]
# Copies of the same weights in other layouts, which some repositories carry beside the one that is read.
_UNWANTED = ["consolidated*", "original/*", "onnx/*", "openvino/*", "*/*"]
HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+|[\w.-]+)(?::(?P<kind>[\w.-]+))?")
"""`org/name`, or `org/name:Q4_K_M` for one GGUF file of several."""
USUAL_KIND = "Q4_K_M"
"""Taken of several GGUF files where none is named: what most people download."""
_PART = re.compile(r"-(?P<number>\d{5})-of-(?P<count>\d{5})$")


@dataclass(frozen=True, slots=True)
class Downloaded:
    """A directory in the Hugging Face layout, or a GGUF file, the first one of several parts."""

    path: Path
    is_gguf: bool


def download(
    repo_id: str, revision: str | None, target: Path | None, *, kind: str | None = None, progress: Progress
) -> Downloaded:
    """What was downloaded before is not downloaded again.

    Args:
        target: where to put the files of a directory; the hub's own cache when None.
        kind: of which quantization a GGUF file is wanted; None: safetensors where the repository has them.

    Raises:
        PrepareError: no such repository, no right to it, no network, or no one file to take.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise PrepareError(
            f"{repo_id!r} is no local path, and huggingface_hub is not installed: pip install 'stepwire[prepare]'"
        ) from error
    with _explained(repo_id, revision):
        files = _list_files(repo_id, revision, needed=kind is not None)
        if kind is None and (not any(name.endswith(".gguf") for name in files) or _has_layout(files)):
            path = snapshot_download(
                repo_id, revision=revision, local_dir=target, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
            )
            return Downloaded(Path(path), is_gguf=False)
        parts = choose_gguf(repo_id, files, kind)
        if kind is None:
            progress.note(f"Taking {parts[0]} of {repo_id}: another of its files would be {repo_id}:KIND")
        directory = Path(snapshot_download(repo_id, revision=revision, allow_patterns=parts))
        return Downloaded(directory / parts[0], is_gguf=True)


def _has_layout(files: list[str]) -> bool:
    return "config.json" in files and any("/" not in name and name.endswith(".safetensors") for name in files)


def _list_files(repo_id: str, revision: str | None, *, needed: bool) -> list[str]:
    """Of the repository; where the hub cannot be reached of what an earlier download left, if it left anything."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return [file.rfilename for file in HfApi().model_info(repo_id, revision=revision).siblings or ()]
    except (HfHubHTTPError, HFValidationError):
        raise
    except Exception:  # no network, in the words of whatever client the library has
        try:
            directory = Path(snapshot_download(repo_id, revision=revision, local_files_only=True, allow_patterns=[""]))
        except LocalEntryNotFoundError:
            if needed:
                raise
            return []
        return [str(file.relative_to(directory)) for file in directory.rglob("*") if not file.is_dir()]


def choose_gguf(repo_id: str, files: list[str], kind: str | None) -> list[str]:
    """The files of one model, in the order of their parts.

    `kind` is a piece of the name, whatever its case, or the whole name; without it a single model is taken, and of
    several the one of `USUAL_KIND`.

    Raises:
        PrepareError: there is none of that kind, or there are several; the message lists what there is.
    """
    models: dict[str, list[str]] = {}
    for name in sorted(files):
        stem = name.removesuffix(".gguf")
        # Vision towers, and the statistics that files are quantized with.
        if name.endswith(".gguf") and not re.search(r"mmproj|imatrix", PurePosixPath(name).name, re.IGNORECASE):
            models.setdefault(_PART.sub("", stem), []).append(name)
    wanted = kind or (USUAL_KIND if len(models) > 1 else "")
    exact = [stem for stem in models if kind in (stem, PurePosixPath(stem).name)]
    # An underscore would go on with the name of a kind: Q6_K is not Q6_K_L.
    piece = re.compile(rf"(^|[./_-]){re.escape(wanted)}($|[./-])", re.IGNORECASE)
    found = exact or [stem for stem in models if not wanted or piece.search(stem)]
    if len(found) != 1:
        problem = "has no GGUF file" if not models else f"has {len(found) or 'no'} GGUF files of kind {wanted}"
        listed = f": name one of {', '.join(models)} as {repo_id}:KIND, where KIND is a piece of its name"
        raise PrepareError(f"{repo_id!r} {problem}{listed if models else ''}")
    return _whole(repo_id, models[found[0]])


def _whole(repo_id: str, parts: list[str]) -> list[str]:
    match = _PART.search(parts[0].removesuffix(".gguf"))
    count = int(match["count"]) if match else 1
    if len(parts) != count:
        raise PrepareError(f"{repo_id!r} has {len(parts)} of {count} parts of {parts[0]}: the upload is not complete")
    return parts


@contextmanager
def _explained(repo_id: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except HFValidationError as error:
        raise PrepareError(f"{repo_id!r} is neither a path that exists nor a Hugging Face id") from error
    except GatedRepoError as error:
        raise PrepareError(
            f"{repo_id!r} is gated: accept its terms on the page of the model, then log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise PrepareError(
            f"{repo_id!r} is neither a path that exists nor a repository you can see on the Hugging Face hub: "
            "check the spelling, or log in with `hf auth login` if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise PrepareError(f"{repo_id!r} has no revision {revision!r}: check --revision") from error
    except LocalEntryNotFoundError as error:
        raise PrepareError(
            f"{repo_id!r} is not on this machine, and the Hugging Face hub cannot be reached: check the network, or "
            "download the model elsewhere and give its directory"
        ) from error
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[0]
        raise PrepareError(f"downloading {repo_id!r} failed ({reason}): try again later") from error
    except ConnectionError as error:
        raise PrepareError(f"downloading {repo_id!r} failed ({error}): check the network, then run it again") from error
