"""A token's experts on CUDA: chosen when somebody reads them, since kernels of few tokens choose for themselves."""

from __future__ import annotations

from functools import cached_property

import torch
from stepwire_kernels.expert_routing import RouterLogits

from gpu_worker.layers.routing import Routing


class UnchosenRouting(Routing):
    """Implements `Routing` by one launch, when weights or experts are first asked for."""

    def __init__(self, routed: RouterLogits, *, pdl: bool) -> None:
        self.routed = routed
        self._pdl = pdl

    @cached_property
    def _chosen(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.routed.choose(pdl=self._pdl)

    @property
    def weights(self) -> torch.Tensor:
        return self._chosen[0]

    @property
    def experts(self) -> torch.Tensor:
        return self._chosen[1]
