"""What some layers of transformers' models keep for a sequence beside keys and values: recurrent states (Mamba, gated
delta rules) and the last inputs of short convolutions.

Attention and everything that treats tokens one by one runs on all of a step's tokens at once. A layer that keeps such a
state runs row after row, with the row's own: its forward pass is given each row's part of the tokens. A row begins
without states at its sequence's first token, so that no row may take over what another has computed.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from gpu_worker.models.kept_rows import KeptRows
from gpu_worker.models.row_caches import tensors_within

# What such layers call the cache that they are given.
_CACHE_NAMES = ("cache_params", "past_key_values")
# What transformers hands down to layers and no layer's result depends on.
INDIFFERENT = {
    "dropout",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "layer_idx",
    "deterministic",
    "target_dtype",
    "logits_to_keep",
}
PLACES = {"position_ids", "position_embeddings", "cache_position"}
# A layer that goes on errs by rounding alone, and by less than this share of what it errs if it starts anew.
_ROUNDING = 1e-4
_OF_WHAT_IS_FORGOTTEN = 0.25


@dataclass(frozen=True, slots=True)
class _Like:
    """What a layer's hidden states are."""

    size: int
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, hidden: torch.Tensor) -> _Like:
        return cls(hidden.shape[-1], hidden.device, hidden.dtype)


class RowStates(KeptRows):
    """The states of one worker's rows, each in a cache of transformers."""

    def __init__(self, model: torch.nn.Module, mixers: Sequence[torch.nn.Module]) -> None:
        """`mixers`: modules of the model that keep a state; their forward passes are replaced."""
        super().__init__()
        self._make_cache = _cache_maker(model)
        # By class: layers of one differ in their weights alone.
        self._go_on: dict[tuple[type, _Like], bool] = {}
        for mixer in mixers:
            mixer.forward = self._row_by_row(mixer.forward, type(mixer))

    def new_cache(self) -> Any:
        return self._make_cache()

    def _row_by_row(self, forward: Callable[..., Any], kind: type) -> Callable[..., Any]:
        signature = inspect.signature(forward)
        hidden_name, cache_name, fixed = next(iter(signature.parameters)), _cache_name(forward), _insisted_on(signature)

        def run_part(part: torch.Tensor, cache: Any) -> Any:
            return forward(**{**fixed, hidden_name: part, str(cache_name): cache})

        def goes_on(like: _Like) -> bool:
            if (kind, like) not in self._go_on:
                self._go_on[kind, like] = _goes_on(run_part, like, self._make_cache)
            return self._go_on[kind, like]

        def run(*args: Any, **kwargs: Any) -> Any:
            hidden = signature.bind(*args, **kwargs).arguments[hidden_name]  # [1, num_tokens, hidden]
            outputs = []
            for part, row in zip(hidden.split([row.num_tokens for row in self._step], dim=1), self._step, strict=True):
                if row.begins or row.num_tokens == 1 or goes_on(_Like.of(part)):
                    outputs.append(run_part(part, row.cache))
                else:
                    outputs += [run_part(token, row.cache) for token in part.split(1, dim=1)]
            return _joined(outputs)

        return run


def _joined(outputs: list[Any]) -> Any:
    """What a layer gives for all rows, of what it gave for each.

    Of several outputs those that have a row for every token: the probe has seen that nobody reads others.
    """
    if not isinstance(outputs[0], tuple):
        return torch.cat(outputs, dim=1)
    return tuple(
        torch.cat(part, dim=1)
        if all(_is_by_token(value, one[0]) for value, one in zip(part, outputs, strict=True))
        else None
        for part in zip(*outputs, strict=True)
    )


def _is_by_token(value: Any, states: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 2 and value.shape[:2] == states.shape[:2]


def _states_of(output: Any) -> torch.Tensor:
    """The hidden states among what a layer gives."""
    states: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _goes_on(run_part: Callable[[torch.Tensor, Any], Any], like: _Like, new_cache: Callable[[], Any]) -> bool:
    """Whether a layer that is given several tokens starts from the state that its cache holds. Some do from none."""

    def run(part: torch.Tensor, cache: Any) -> torch.Tensor:
        return _states_of(run_part(part, cache))

    hidden = torch.randn(1, 6, like.size, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
    whole = run(hidden, new_cache())[:, 3:]
    begun = new_cache()
    run(hidden[:, :3], begun)
    error = (run(hidden[:, 3:], begun) - whole).norm()
    without = (run(hidden[:, 3:], new_cache()) - whole).norm()
    rounding = max(_ROUNDING, 4 * torch.finfo(like.dtype).eps)
    return bool(error <= rounding * whole.norm() and error <= _OF_WHAT_IS_FORGOTTEN * without)


class _Unread:
    """Stands for what a layer gives beside numbers for every token: whoever reads it fails."""

    def __getattribute__(self, name: str) -> Any:
        raise TypeError("what a layer that keeps a state gives beside numbers for every token is read")


class StateProbe:
    """Finds out in a forward pass which modules keep a state, by what they leave in a cache."""

    def __init__(self, model: torch.nn.Module, attending: Collection[torch.nn.Module]) -> None:
        """The modules asked are the innermost ones that take a cache, and do not attend nor hold one that does."""
        self._cache = _cache_maker(model)()
        self.kept: dict[str, int] = {}
        """Module -> bytes of a row's state."""
        taking = {name: module for name, module in model.named_modules() if _cache_name(module.forward) is not None}
        self.asked = {
            name: module
            for name, module in taking.items()
            if not any(other in attending for other in module.modules())
            and not any(other.startswith(f"{name}.") for other in taking)
        }
        for name, module in self.asked.items():
            module.forward = self._watched(name, module.forward)

    def _watched(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        signature, cache_name = inspect.signature(forward), str(_cache_name(forward))
        fixed = _insisted_on(signature)

        def run(*args: Any, **kwargs: Any) -> Any:
            bound, before = signature.bind(*args, **kwargs), _num_bytes(self._cache)
            given = set(bound.arguments) - {next(iter(signature.parameters)), cache_name}
            bound.arguments |= {**fixed, cache_name: self._cache}
            output = forward(*bound.args, **bound.kwargs)
            num_bytes = _num_bytes(self._cache) - before
            if num_bytes:
                self.kept[name] = num_bytes
                left_out = _told(signature.bind(*args, **kwargs), given)
                if left_out:
                    raise TypeError(f"a layer that keeps a state is given {', '.join(sorted(left_out))}")
                if isinstance(output, tuple):
                    return tuple(value if _is_by_token(value, output[0]) else _Unread() for value in output)
            return output

        return run


def _told(bound: inspect.BoundArguments, names: Collection[str]) -> set[str]:
    """Which of these arguments have a value that the layer may go by; it is run without them.

    Places are handed to everything: a layer may insist on them or take them among whatever else there is, unread.
    """
    parameters = bound.signature.parameters
    told = set()
    for name in names:
        value, parameter = bound.arguments[name], parameters[name]
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            told |= {one for one, given in value.items() if given is not None} - PLACES
        elif value is not None and not (name in PLACES and parameter.default is inspect.Parameter.empty):
            told.add(name)
    return told - INDIFFERENT


def _insisted_on(signature: inspect.Signature) -> dict[str, None]:
    """What a signature wants beside hidden states, and layers that keep states do without: a step has no padding to
    mask, and they know no positions."""
    _, *others = signature.parameters.values()
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {one.name: None for one in others if one.default is inspect.Parameter.empty and one.kind not in kinds}


def _cache_maker(model: Any) -> Callable[[], Any]:
    """Makes a row's cache: transformers' common one, or what the file of the model's class has of its own (MiniMax)."""
    from transformers import DynamicCache

    for kind in vars(sys.modules[type(model).__module__]).values():
        if isinstance(kind, type) and issubclass(kind, DynamicCache) and kind is not DynamicCache:
            return kind
    return partial(DynamicCache, config=model.config)


def _cache_name(forward: Callable[..., Any]) -> str | None:
    parameters = inspect.signature(forward).parameters
    return next((name for name in _CACHE_NAMES if name in parameters), None)


def _num_bytes(cache: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_within(cache))
