"""Checks a model directory, and adds a `tokenizer.json` to one that has only an older form of tokenizer."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpu_worker.loading.safetensors_headers import read_headers
from gpu_worker.loading.weight_files import gguf_in
from gpu_worker.prepare.atomic_directory import exclusive, fill_directory
from gpu_worker.prepare.errors import PrepareError, explained_os_errors
from gpu_worker.prepare.progress import Progress
from gpu_worker.prepare.stamp import is_current, sha256_of, write_stamp

TOKENIZER_NAME = "tokenizer.json"
_LATER_PART = re.compile(r".+-(?!00001)\d{5}-of-\d{5}\.gguf")
# Any of these sets of files can be turned into a tokenizer.json.
_TEKKEN_NAME = "tekken.json"
"""Mistral's own form, which some of its repositories have alone."""
_OLDER_FORMS = ((_TEKKEN_NAME,), ("tokenizer.model",), ("vocab.json", "merges.txt"))
_TOKENIZER_FILES = (
    _TEKKEN_NAME,
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_CONVERTED_FILES = (TOKENIZER_NAME, "tokenizer_config.json")


def check_directory(directory: Path, *, weights_required: bool = True) -> None:
    """Raises if the config or the weights cannot be used.

    Raises:
        PrepareError: `config.json` is missing or damaged.
        CheckpointError: the weights are missing or damaged.
    """
    _refuse_other_layouts(directory)
    config = _read_object(directory / "config.json", "give a directory with a model in the Hugging Face layout")
    if not config.get("architectures") and not config.get("model_type"):
        raise PrepareError(
            f"{directory / 'config.json'} names neither architectures nor model_type: it is no model's config"
        )
    for name in ("generation_config.json", "tokenizer_config.json"):
        if (directory / name).exists():
            _read_object(directory / name, "download it again")
    if weights_required:
        _check_weights(directory)


def _check_weights(directory: Path) -> None:
    """Every header against its file. Raises `CheckpointError`."""
    packed = gguf_in(directory)
    if packed is None:
        read_headers(directory)
        return
    # torch, which takes seconds to import, knows what blocks hold.
    from gpu_worker.loading.gguf_reader import GgufReader

    GgufReader(packed).close()


def _refuse_other_layouts(directory: Path) -> None:
    """What people take for a model, by the files that it has in place of config.json."""
    if (directory / "config.json").exists():
        return
    if (directory / "adapter_config.json").exists():
        base = _read_object(directory / "adapter_config.json", "download it again").get("base_model_name_or_path")
        raise PrepareError(
            f"{directory} holds an adapter (PEFT) and not a model: give the model that it was trained on"
            + (f", {base}" if base else "")
        )
    if (directory / "params.json").exists():
        raise PrepareError(
            f"{directory} holds a model in its maker's own layout (params.json): give a directory with the Hugging "
            "Face layout of it, which has config.json and model*.safetensors"
        )
    if (directory / "model_index.json").exists():
        raise PrepareError(f"{directory} holds a pipeline that makes images (model_index.json) and no language model")


def only_gguf(directory: Path) -> Path | None:
    """The GGUF model in a directory that has no config; None: there is none.

    Raises:
        PrepareError: there are several.
    """
    models = [
        file
        for file in sorted(directory.glob("*.gguf"))
        if not file.name.startswith("mmproj") and not _LATER_PART.fullmatch(file.name)
    ]
    if len(models) > 1:
        names = ", ".join(file.name for file in models)
        raise PrepareError(f"{directory} holds several models: give the path of one of {names}")
    return models[0] if models else None


def _read_object(file: Path, advice: str) -> Mapping[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise PrepareError(f"{file} does not exist: {advice}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise PrepareError(f"{file} is not readable JSON ({error}): {advice}") from error
    if not isinstance(content, dict):
        raise PrepareError(f"{file} holds no JSON object: {advice}")
    return content


def with_tokenizer(directory: Path, cache_dir: Path, progress: Progress) -> tuple[Path, bool]:
    """The directory to serve from, and whether it has a tokenizer.

    A directory without `tokenizer.json` is not written to: a directory in `cache_dir` is made with links to its files
    and the converted tokenizer.

    Raises:
        PrepareError: there is a tokenizer and it cannot be used.
    """
    if (directory / TOKENIZER_NAME).exists():
        _check_tokenizer(directory / TOKENIZER_NAME)
        return directory, True
    if any(all((directory / name).exists() for name in form) for form in _OLDER_FORMS):
        return _convert_tokenizer(directory, cache_dir, progress), True
    for form in _OLDER_FORMS:
        present = [name for name in form if (directory / name).exists()]
        if present:
            missing = ", ".join(name for name in form if name not in present)
            raise PrepareError(f"{directory} has {present[0]} and lacks {missing}: download {missing} too")
    progress.note(
        f"{directory} has no tokenizer ({TOKENIZER_NAME}, tokenizer.model, or vocab.json with merges.txt): "
        "the server will take and give token ids only"
    )
    return directory, False


def _check_tokenizer(file: Path) -> None:
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception for everything
        raise PrepareError(f"{file} cannot be used ({error}): download it again, or upgrade tokenizers") from error


def _convert_tokenizer(directory: Path, cache_dir: Path, progress: Progress) -> Path:
    sources = [directory / name for name in _TOKENIZER_FILES if (directory / name).exists()]
    digest = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:8]
    target = cache_dir / f"{directory.resolve().name}-tokenizer-{digest}"
    options = {"links_to": str(directory.resolve())}

    def fill(partial: Path) -> None:
        progress.note(f"Converting the tokenizer of {directory} to {TOKENIZER_NAME}")
        _save_fast_tokenizer(directory, partial, progress)
        for file in directory.resolve().iterdir():
            if file.name not in _CONVERTED_FILES:
                (partial / file.name).symlink_to(file)
        hashes = {path.name: sha256_of(path) for path in sources}
        write_stamp(partial, sources, options, [name for name in _CONVERTED_FILES if (partial / name).exists()], hashes)

    with explained_os_errors(target), exclusive(target):
        if not is_current(target, sources, options):
            fill_directory(target, fill)
    return target


def _save_fast_tokenizer(directory: Path, target: Path, progress: Progress) -> None:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise PrepareError(
            f"{directory} has no {TOKENIZER_NAME}, and making one needs transformers: pip install 'stepwire[prepare]'"
        ) from error
    advice = "save it once with transformers' save_pretrained, which writes a tokenizer.json, and give that directory"
    try:
        if (directory / _TEKKEN_NAME).exists():
            tokenizer = read_tekken(directory / _TEKKEN_NAME)
        else:
            tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # anything can go wrong in a conversion, and every reason means the same to the reader
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PrepareError(f"the tokenizer of {directory} cannot be converted ({reason}): {advice}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise PrepareError(f"the tokenizer of {directory} has no fast form ({type(tokenizer).__name__}): {advice}")
    if (directory / _TEKKEN_NAME).exists() and not tokenizer.chat_template:
        progress.note(
            f"{directory} has no chat template: give one with --chat-template, or install mistral-common, which makes "
            "one"
        )
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        for name in _CONVERTED_FILES:
            saved = Path(scratch) / name
            if saved.exists():
                (target / name).write_bytes(saved.read_bytes())
    template = Path(directory) / "chat_template.jinja"
    if tokenizer.chat_template and not template.exists():
        _keep_chat_template(target / "tokenizer_config.json", tokenizer.chat_template)


def read_tekken(file: Path) -> Any:
    """transformers' fast tokenizer of a `tekken.json`; a text begins with the token that Mistral's own begin with.

    The chat template is in a file beside it, or what mistral-common makes of it where that is installed.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers.integrations.mistral import convert_tekken_tokenizer

    beside = file.parent / "tokenizer_config.json"
    template = _read_object(beside, "download it again").get("chat_template") if beside.exists() else None
    tokenizer = convert_tekken_tokenizer(str(file), template if isinstance(template, str) else None)
    begin, number = tokenizer.bos_token, tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, number)]
    )
    return tokenizer


def _keep_chat_template(file: Path, template: str | dict[str, str]) -> None:
    """transformers 5 saves the template in a file of its own; the one that came in the config stays there."""
    config = json.loads(file.read_text("utf-8"))
    config["chat_template"] = (
        template if isinstance(template, str) else [{"name": name, "template": text} for name, text in template.items()]
    )
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
