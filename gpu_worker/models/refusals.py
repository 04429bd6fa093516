"""Why a model of transformers is not served, or not by paged attention."""

from __future__ import annotations

from gpu_worker.model_spec import ModelConfigError


class NotPaged(ModelConfigError):
    """Paged attention does not carry it; caches of its own may."""


def refused(architecture: str, reason: str) -> NotPaged:
    return NotPaged(_message(architecture, f"with paged attention: {reason}"))


def unserved(architecture: str, reason: str) -> ModelConfigError:
    """Neither would caches of its own do."""
    return ModelConfigError(_message(architecture, f"own: {reason}"))


def _message(architecture: str, reason: str) -> str:
    return f"{architecture} has no native code here, and cannot run through transformers' {reason}"


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
