"""Builds a model from its directory: config, layers, then weights streamed from the checkpoint into them.

Every tensor goes from the file into its place in one copy, cut to this rank's share, and a layer is brought into its
final layout as soon as its last tensor has come. Host memory peaks at the model plus about one layer's tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import structlog
import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from gpu_worker.device import return_freed_memory
from gpu_worker.loading.kv_scales import read_kv_scales
from gpu_worker.model_spec import ModelConfigError, ModelSpec
from gpu_worker.models.checkpoint_places import PlacedTensor
from gpu_worker.models.family import LoadsItself, ModelFamily
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.models.matched_checkpoint import matched_checkpoint
from gpu_worker.models.registry import find_family, known_architectures
from gpu_worker.models.served_config import causal_class
from gpu_worker.quant.scheme import read_quantization

log = structlog.get_logger(__name__)

RANDOM_BLOCK_SIZE = 1 << 20
# Read between two times that freed memory goes back to the system.
_TRIM_AFTER_BYTES = 128 << 20


def read_spec(directory: Path) -> tuple[ModelSpec, type[ModelFamily]]:
    """What the model in `directory` is, from its config.json alone.

    Raises:
        ModelConfigError: not there, not supported, or contradicting itself.
    """
    config = HfConfig.open(directory)
    architecture, family = _find_family(config)
    family = family.for_config(config)
    read_quantization(config)
    return family.read_config(config, architecture), family


def _find_family(config: HfConfig) -> tuple[str, type[ModelFamily]]:
    """Many repositories of architectures known here carry code for older transformers as well: that is not needed."""
    architectures = config.architectures()
    if not architectures:
        # Not every tool writes them; what makes one model of a `model_type` is known then.
        architectures = [name for name in (causal_class(config.fields.get("model_type")),) if name]
    try:
        return find_family([*architectures, *_otherwise_called(architectures, config.fields.get("model_type"))])
    except ModelConfigError:
        if not config.fields.get("auto_map"):
            raise
        raise config.error(
            "auto_map",
            f"asks to run the repository's own code for {', '.join(config.architectures()) or 'its architecture'}, "
            f"which is never done; architectures that need none: {', '.join(known_architectures())}",
        ) from None


def _otherwise_called(architectures: list[str], kind: Any) -> list[str]:
    """transformers' class for what a repository's own code calls after the same `model_type` (Phi-3.5-MoE, MPT)."""
    known = causal_class(kind)
    own = f"{kind}forcausallm".replace("_", "")
    return [known] if known is not None and any(name.lower() == own for name in architectures) else []


def check_weights(model: ModelFamily, path: Path) -> None:
    """Whether the checkpoint at `path` fills `model`, which may be built on the meta device: no memory is taken.

    Raises:
        CheckpointError: damaged, or its tensors are not those of the config; names file and tensor.
    """
    if isinstance(model, LoadsItself):
        model.check_checkpoint(path)
        return
    with matched_checkpoint(model, path):
        return


def load_weights(model: ModelFamily, path: Path) -> None:
    """Fill `model` from the checkpoint at `path`.

    Raises:
        CheckpointError: damaged, or its tensors are not those of the config; names file and tensor.
    """
    if isinstance(model, LoadsItself):
        model.load_checkpoint(path)
        return_freed_memory()
        return
    with matched_checkpoint(model, path) as matched:
        left = matched.count_by_layer()
        with matched.reader as reader:
            infos = list(reader.names())
            with _progress(sum(info.num_bytes for info in infos)) as progress:
                num_bytes_since = 0
                for info in infos:
                    if num_bytes_since > _TRIM_AFTER_BYTES:
                        num_bytes_since = 0
                        return_freed_memory()
                    num_bytes_since += info.num_bytes
                    for place in matched.places[info.name]:
                        place.layer.load(place.part, place.tensor, PlacedTensor.of(reader, info, place))
                        left[place.path] -= 1
                        if left[place.path] == 0:
                            place.layer.finish()
                    progress.advance(info.num_bytes)
        model.kv_scales = read_kv_scales(matched.source, matched.kv_scale_infos, model.spec.num_layers)
    model.finish()
    return_freed_memory()


class _RandomBlock:
    """Fills tensors from one block of normal values, so that billions of weights take a second.

    A block is repeated from another offset for every tensor: good enough to compute with, useless as a model.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)
        # Drawn on the host, so that a seed means the same weights on every device; filled where the weights are.
        self._block = torch.randn(RANDOM_BLOCK_SIZE, generator=generator).to(device)
        self._offset = 0

    def fill(self, target: torch.Tensor, std: float) -> None:
        flat = target.view(-1)
        # An odd stride through the block: no two tensors of a model begin at the same value.
        self._offset = (self._offset + 7919) % RANDOM_BLOCK_SIZE
        block = (self._block.roll(-self._offset) * std).to(target.dtype)
        num_whole = flat.numel() // RANDOM_BLOCK_SIZE * RANDOM_BLOCK_SIZE
        flat[:num_whole].view(-1, RANDOM_BLOCK_SIZE).copy_(block)
        flat[num_whole:].copy_(block[: flat.numel() - num_whole])


def fill_random(model: ModelFamily, directory: Path | None, seed: int) -> None:
    """Random weights (load_format dummy) for the config in `directory`, the same for the same seed."""
    if isinstance(model, LoadsItself) and directory is not None:
        model.fill_random_weights(_RandomBlock(seed, torch.device("cpu")), directory)
        return
    random = _RandomBlock(seed, model.device)
    for _, layer in model.weighted():
        layer.fill_random(random)
        layer.finish()
    model.finish()


class _Advance(Protocol):
    def advance(self, num_bytes: int) -> None: ...


class _LoggedProgress:
    """A line at every quarter, for logs."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._next = total, 0, 0.25

    def advance(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._done >= self._next * self._total:
            log.info("loading weights", percent=round(100 * self._done / self._total), mib=self._done >> 20)
            self._next = self._done / self._total + 0.25


class _BarProgress:
    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task("loading weights", total=total)

    def advance(self, num_bytes: int) -> None:
        self._progress.advance(self._task, num_bytes)


@contextmanager
def _progress(total: int) -> Iterator[_Advance]:
    """A bar on a terminal, lines otherwise."""
    if not sys.stderr.isatty():
        yield _LoggedProgress(total)
        return
    from rich.console import Console

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield _BarProgress(progress, total)
