"""What some layers of transformers' models keep for a sequence beside keys and values: recurrent states (Mamba, gated
delta rules) and the last inputs of short convolutions.

Attention and everything that treats tokens one by one runs on all of a step's tokens at once. A layer that keeps such a
state runs row after row, with the row's own: its forward pass is given each row's part of the tokens. A row begins
without states at its sequence's first token, so that no row may take over what another has computed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gpu_worker.attention.api import StepMetadata

# What such layers call the cache that they are given.
_CACHE_NAMES = ("cache_params", "past_key_values")
# A layer that goes on errs by rounding alone, and by less than this share of what it errs if it starts anew.
_ROUNDING = 1e-4
_OF_WHAT_IS_FORGOTTEN = 0.25


@dataclass(frozen=True, slots=True)
class _Run:
    """A row's part of a step."""

    num_tokens: int
    cache: Any
    begins: bool


@dataclass(frozen=True, slots=True)
class _Like:
    """What a layer's hidden states are."""

    size: int
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, hidden: torch.Tensor) -> _Like:
        return cls(hidden.shape[-1], hidden.device, hidden.dtype)


class RowStates:
    """The states of one worker's rows, each in a cache of transformers."""

    def __init__(self, config: Any, mixers: Sequence[torch.nn.Module]) -> None:
        """`mixers`: modules of the model that keep a state; their forward passes are replaced."""
        self._config = config
        self._caches: dict[int, Any] = {}
        self._step: list[_Run] = []
        # By class: layers of one differ in their weights alone.
        self._go_on: dict[tuple[type, _Like], bool] = {}
        for mixer in mixers:
            mixer.forward = self._row_by_row(mixer.forward, type(mixer))

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
                self._caches[row] = self._new_cache()
            elif row not in self._caches:
                raise RuntimeError(f"row {row} begins at token {context - num_tokens}, and has no state from before")
            self._step.append(_Run(num_tokens, self._caches[row], context == num_tokens))

    def clear(self) -> None:
        self._caches.clear()
        self._step = []

    def num_bytes(self) -> int:
        """Of all rows that have states."""
        tensors = [tensor for cache in self._caches.values() for tensor in _tensors(cache)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self._config)

    def _row_by_row(self, forward: Callable[..., Any], kind: type) -> Callable[..., torch.Tensor]:
        signature = inspect.signature(forward)
        hidden_name, *others = signature.parameters
        cache_name = _cache_name(forward)
        # What a signature insists on; such layers take no notice of positions, and a step has no padding to mask.
        fixed = {
            name: None
            for name in others
            if signature.parameters[name].default is inspect.Parameter.empty
            and signature.parameters[name].kind is not inspect.Parameter.VAR_KEYWORD
        }

        def run_part(part: torch.Tensor, cache: Any) -> torch.Tensor:
            output = forward(**{**fixed, hidden_name: part, str(cache_name): cache})
            if not isinstance(output, torch.Tensor):
                raise TypeError("a layer that keeps a state gives more than hidden states")
            return output

        def goes_on(like: _Like) -> bool:
            if (kind, like) not in self._go_on:
                self._go_on[kind, like] = _goes_on(run_part, like, self._new_cache)
            return self._go_on[kind, like]

        def run(*args: Any, **kwargs: Any) -> torch.Tensor:
            hidden = signature.bind(*args, **kwargs).arguments[hidden_name]  # [1, num_tokens, hidden]
            outputs = []
            for part, row in zip(hidden.split([row.num_tokens for row in self._step], dim=1), self._step, strict=True):
                if row.begins or row.num_tokens == 1 or goes_on(_Like.of(part)):
                    outputs.append(run_part(part, row.cache))
                else:
                    outputs += [run_part(token, row.cache) for token in part.split(1, dim=1)]
            return torch.cat(outputs, dim=1)

        return run


def _goes_on(run: Callable[[torch.Tensor, Any], torch.Tensor], like: _Like, new_cache: Callable[[], Any]) -> bool:
    """Whether a layer that is given several tokens starts from the state that its cache holds. Some do from none."""
    hidden = torch.randn(1, 6, like.size, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
    whole = run(hidden, new_cache())[:, 3:]
    begun = new_cache()
    run(hidden[:, :3], begun)
    error = (run(hidden[:, 3:], begun) - whole).norm()
    without = (run(hidden[:, 3:], new_cache()) - whole).norm()
    rounding = max(_ROUNDING, 4 * torch.finfo(like.dtype).eps)
    return bool(error <= rounding * whole.norm() and error <= _OF_WHAT_IS_FORGOTTEN * without)


def find_mixers(model: torch.nn.Module, attending: Collection[torch.nn.Module]) -> list[tuple[str, torch.nn.Module]]:
    """Modules that take a cache and do not attend, nor hold one that does, with their names: the innermost ones."""
    taking = {name: module for name, module in model.named_modules() if _cache_name(module.forward) is not None}
    return [
        (name, module)
        for name, module in taking.items()
        if not any(other in attending for other in module.modules())
        and not any(other.startswith(f"{name}.") for other in taking)
    ]


def _cache_name(forward: Callable[..., Any]) -> str | None:
    parameters = inspect.signature(forward).parameters
    return next((name for name in _CACHE_NAMES if name in parameters), None)


def _tensors(cache: Any) -> Iterator[torch.Tensor]:
    """All that a cache's layers hold, whatever they call it."""
    for layer in cache.layers:
        for value in vars(layer).values():
            held = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
            yield from (tensor for tensor in held if isinstance(tensor, torch.Tensor))
