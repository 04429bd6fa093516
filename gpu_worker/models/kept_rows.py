"""What a model keeps for every row by itself, beside the paged keys and values or instead of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gpu_worker.attention.api import StepMetadata


@dataclass(frozen=True, slots=True)
class RowRun:
    """A row's part of a step."""

    num_tokens: int
    cache: Any
    begins: bool


class KeptRows(ABC):
    """A row begins with nothing at its sequence's first token: none may take over what another has computed."""

    def __init__(self) -> None:
        self._caches: dict[int, Any] = {}
        self._step: list[RowRun] = []

    @abstractmethod
    def new_cache(self) -> Any:
        """What a row begins with."""

    def plan(self, metadata: StepMetadata) -> None:
        """Before a step's forward pass.

        Raises:
            RuntimeError: a row begins in the middle of its sequence.
        """
        if metadata.rows is None:
            raise RuntimeError("a model that keeps states for rows is not told which rows run")
        self._step = []
        runs = zip(metadata.rows.tolist(), metadata.query_lengths.tolist(), metadata.context_lengths, strict=True)
        for row, num_tokens, context in runs:
            if context == num_tokens:
                self._caches[row] = self.new_cache()
            elif row not in self._caches:
                raise RuntimeError(f"row {row} begins at token {context - num_tokens}, and has no state from before")
            self._step.append(RowRun(num_tokens, self._caches[row], context == num_tokens))

    def drop(self, rows: Iterable[int]) -> None:
        """These rows are free: their memory is too."""
        for row in rows:
            self._caches.pop(row, None)

    def clear(self) -> None:
        self._caches.clear()
        self._step = []
