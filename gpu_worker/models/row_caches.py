"""Models of transformers that attend in ways of their own: a row after the other, each in transformers' own cache.

What the paged attention does not carry (masks that a model makes itself, several attentions over one cache, indexers,
compressed keys) runs as transformers has it, so no beginning is taken over from another row. A row's cache grows with
its tokens: they are counted in blocks like everybody's, of which nothing but the number is used. Whether a model goes
on from its cache as if it had seen everything at once is tried out when it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gpu_worker.models.kept_rows import KeptRows

# What models call the cache that they take and give.
_NAMES = ("past_key_values", "cache_params", "state")
# The first and the last are multiples of what models compress into one.
_MEASURED = (128, 255, 256)
# Of a try: the tokens that are given at once, then those that follow.
_TRY = (5, 4, 1, 1)
# What goes on from a cache errs by less than this share of what it errs without.
_OF_WHAT_IS_FORGOTTEN = 0.25
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3}


@dataclass(frozen=True, slots=True)
class RowCacheSize:
    """Of one row."""

    numbers_per_token: int
    state_bytes: int
    """Whatever its length."""


class RowCaches(KeptRows):
    """Runs a trunk row after row."""

    def __init__(self, trunk: Callable[..., Any]) -> None:
        super().__init__()
        self._trunk = trunk
        self._goes_on = True

    def new_cache(self) -> dict[str, Any]:
        """By the name that the trunk takes it by; empty: it makes one."""
        return {}

    def run(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        """Implements the trunk's forward pass: input_ids [1, num_tokens] -> what it gives, of all rows."""
        parts = input_ids.split([row.num_tokens for row in self._step], dim=1)
        outputs = [self._run_row(part, row.cache) for part, row in zip(parts, self._step, strict=True)]
        states = torch.cat([states for states, _ in outputs], dim=1)  # [1, num_tokens, hidden]
        return outputs[0][1](last_hidden_state=states)

    def _run_row(self, input_ids: torch.Tensor, cache: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        """Hidden states [1, num_tokens, hidden], and the type of what the trunk gives."""
        is_whole = self._goes_on or not cache
        outputs = [run_part(self._trunk, part, cache) for part in ([input_ids] if is_whole else input_ids.split(1, 1))]
        return torch.cat([output.last_hidden_state for output in outputs], dim=1), type(outputs[0])

    def try_out(self, vocab_size: int, device: torch.device) -> str | Any:
        """What the trunk gives of some text; or why this model cannot be served in parts.

        Whether several tokens may be given at once to a cache that holds some already is found out too.
        """
        ids = (torch.arange(sum(_TRY), device=device) * 37 + 11).remainder(vocab_size).unsqueeze(0)
        whole = run_part(self._trunk, ids, {})
        for self._goes_on in (True, False):
            cache: dict[str, Any] = {}
            states = [self._run_row(part, cache)[0] for part in ids.split(_TRY, dim=1)]
            if not cache:
                return "it keeps no cache of what it has seen"
            without = [self._run_row(part, {})[0] for part in ids.split(_TRY, dim=1)]
            if _is_near(torch.cat(states, 1), whole.last_hidden_state, torch.cat(without, 1)):
                return whole
        return "given a text in parts it does not compute what it computes of the whole"


def _is_near(states: torch.Tensor, whole: torch.Tensor, without: torch.Tensor) -> bool:
    error = (states - whole).float().norm()
    rounding = _ROUNDING.get(whole.dtype, 1.0)
    forgotten = (without - whole).float().norm()
    return bool(error <= rounding * whole.float().norm() and error <= _OF_WHAT_IS_FORGOTTEN * forgotten)


def run_part(trunk: Callable[..., Any], input_ids: torch.Tensor, cache: dict[str, Any]) -> Any:
    """One row's tokens, after those that `cache` holds; they are in it then."""
    output = trunk(input_ids=input_ids, use_cache=True, **cache)
    cache.update({name: getattr(output, name) for name in _NAMES if getattr(output, name, None) is not None})
    return output


def measure(trunk: Callable[..., Any], dtype: torch.dtype) -> RowCacheSize | None:
    """Of a model on device meta, by what it keeps of so many tokens and so many more; None: it keeps nothing.

    `dtype`: the model's, as it is there. Bytes of a token are counted as so many numbers of it.

    What is kept until it is compressed, and the last tokens of a window, do not grow: between two lengths that have as
    much of it nothing but what grows differs.
    """
    sizes = {}
    for num_tokens in _MEASURED:
        cache: dict[str, Any] = {}
        run_part(trunk, torch.zeros(1, num_tokens, dtype=torch.int64, device="meta"), cache)
        sizes[num_tokens] = sum(tensor.numel() * tensor.element_size() for tensor in tensors_within(cache))
    (few, least), *_, (many, most) = sizes.items()
    if not most:
        return None
    of_token = -(-(most - least) // ((many - few) * dtype.itemsize)) * dtype.itemsize
    state_bytes = max(size - num_tokens * of_token for num_tokens, size in sizes.items())
    return RowCacheSize(of_token // dtype.itemsize, max(state_bytes, 0))


def tensors_within(value: Any) -> Iterator[torch.Tensor]:
    """All tensors of a cache, whatever holds them; each once."""
    seen: set[int] = set()

    def walk(value: Any) -> Iterator[torch.Tensor]:
        if id(value) in seen or isinstance(value, torch.nn.Module | type | str | int | float):
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            for held in value.values():
                yield from walk(held)
        elif isinstance(value, list | tuple):
            for held in value:
                yield from walk(held)
        elif hasattr(value, "__dict__"):
            yield from walk(vars(value))

    return walk(value)
