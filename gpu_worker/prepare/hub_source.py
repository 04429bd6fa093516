"""Downloads a model from the Hugging Face hub: weights as safetensors, and the small files beside them."""

from __future__ import annotations

from pathlib import Path

from gpu_worker.prepare.errors import PrepareError

_WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt"]
# Copies of the same weights in other layouts, which some repositories carry beside the one that is read.
_UNWANTED = ["consolidated*", "original/*", "onnx/*", "openvino/*", "*/*"]


def download(repo_id: str, revision: str | None, target: Path | None) -> Path:
    """The local directory of the repository; what was downloaded before is not downloaded again.

    Args:
        target: where to put the files; the hub's own cache when None.

    Raises:
        PrepareError: no such repository, no right to it, or no network.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as error:
        raise PrepareError(
            f"{repo_id!r} is no local path, and huggingface_hub is not installed: pip install 'stepwire[prepare]'"
        ) from error
    try:
        return Path(
            snapshot_download(
                repo_id, revision=revision, local_dir=target, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
            )
        )
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
