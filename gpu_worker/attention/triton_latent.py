"""Latent attention by the Triton kernels: one compressed vector a token in the paged cache, shared by all heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from stepwire_kernels.attention_latent import (
    default_latent_decode_tuning,
    default_latent_prefill_tuning,
    latent_decode_attention,
    latent_policy,
    latent_prefill_attention,
    latent_tile_tokens,
)
from stepwire_kernels.latent_kv import rotate_and_write_latent
from stepwire_kernels.work_list import SharePolicy

from gpu_worker.attention.api import AttentionSpec, MixedHeads, for_each_kind
from gpu_worker.attention.triton_backend import ALL_TOKENS, AttentionLimits, PlannedAttention, TritonAttention
from gpu_worker.layers.ops import StepPositions
from gpu_worker.loading.kv_scales import KVScales


class TritonLatentAttention(PlannedAttention):
    """Attention over `kv_caches`, one a layer: [1, num_blocks, 1, block_size, kv_rank + rope_dim].

    A float8 cache's values are its keys, so their scale is the keys'.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        kv_caches: list[torch.Tensor],
        limits: AttentionLimits,
        *,
        dtype: torch.dtype,
        pdl: bool,
        kv_scales: Sequence[KVScales] | None = None,
    ) -> None:
        """`dtype`: of the queries."""
        if spec.value_dim is None:
            raise ValueError("keys are no values here: TritonAttention serves this model")
        self._kv_rank, self._num_heads = spec.value_dim, spec.num_heads
        self._share_policy = latent_policy(
            spec.num_heads, default_latent_decode_tuning(spec.num_heads, dtype, kv_caches[0].device)
        )
        self._prefill_tuning = default_latent_prefill_tuning(dtype, kv_caches[0].device)
        super().__init__(
            spec,
            kv_caches,
            limits,
            tile_tokens=latent_tile_tokens(spec.num_heads, self._prefill_tuning),
            value_dim=spec.value_dim,
            pdl=pdl,
            kv_scales=kv_scales,
        )

    def _policy(self, num_runs: int, only_decodes: bool) -> SharePolicy:
        return self._share_policy

    def rotate_and_write(self, query: torch.Tensor, cached: torch.Tensor, layer: int, positions: StepPositions) -> None:
        """Rotate the queries' ends in place, and write this step's vectors into the cache.

        query [num_tokens, num_heads, kv_rank + rope_dim], cached [num_tokens, kv_rank + rope_dim].
        """
        rotate_and_write_latent(
            query,
            cached,
            self._kv_caches[layer][0],
            positions.positions,
            self._planned().inputs.slots,
            positions.tables.cos,
            positions.tables.sin,
            interleaved=positions.tables.interleaved,
            scale=self._kv_scales[layer].key,
            pdl=self._pdl,
        )

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: int,
        *,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if k is not None or v is not None or sinks is not None:
            raise ValueError("latent attention reads the cache, and knows no sinks: call rotate_and_write")
        step, scale = self._planned(), self._kv_scales[layer].key
        # [num_tokens, num_heads, kv_rank]
        out = torch.empty((*q.shape[:2], self._kv_rank), dtype=q.dtype, device=q.device)
        arguments = (q, self._kv_caches[layer][0], step.block_tables)
        if self._prefill_work is not None:
            latent_prefill_attention(
                *arguments,
                self._prefill_work,
                self.spec.scale,
                out,
                cache_scale=scale,
                tuning=self._prefill_tuning,
                pdl=self._pdl,
            )
        if self._decode_work:
            latent_decode_attention(
                *arguments,
                self._decode_work[ALL_TOKENS],
                self._workspace,
                self.spec.scale,
                out,
                cache_scale=scale,
                pdl=self._pdl,
            )
        return out.flatten(1)


DeviceAttention = TritonAttention | TritonLatentAttention | MixedHeads[TritonAttention]


def make_attention(
    spec: AttentionSpec,
    kv_caches: list[torch.Tensor],
    limits: AttentionLimits,
    *,
    dtype: torch.dtype,
    pdl: bool,
    kv_scales: Sequence[KVScales] | None = None,
    deterministic: bool = False,
) -> DeviceAttention:
    """The attention of a model; `dtype` is that of its activations, the rest as in `PlannedAttention`."""
    if spec.value_dim is not None:
        if deterministic:
            raise ValueError("latent attention has no fixed shapes yet")
        return TritonLatentAttention(spec, kv_caches, limits, dtype=dtype, pdl=pdl, kv_scales=kv_scales)

    def of_kind(kind: AttentionSpec, layers: list[int]) -> TritonAttention:
        caches = [kv_caches[layer] for layer in layers]
        scales = None if kv_scales is None else [kv_scales[layer] for layer in layers]
        return TritonAttention(kind, caches, limits, pdl=pdl, kv_scales=scales, deterministic=deterministic)

    return for_each_kind(spec, of_kind)
