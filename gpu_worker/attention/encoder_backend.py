"""Attention of encoders: every token of a row sees the whole row. Nothing is cached, so a row runs in one step."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

from gpu_worker.attention.api import AttentionSpec, StepMetadata


class EncoderAttention:
    """Rows are attended one by one, rows of one length together."""

    def __init__(self, spec: AttentionSpec) -> None:
        self.spec = spec
        self._num_tokens = 0
        # (tokens of the step that the rows are made of, [num_rows * length], and their length)
        self._groups: list[tuple[torch.Tensor, int]] = []

    def supports(self, spec: AttentionSpec) -> str | None:
        if any(window is not None for window in spec.windows) or spec.softcap is not None or spec.has_sinks:
            return "windows, soft caps and sinks are decoders' affair"
        return None

    def plan(self, step: StepMetadata) -> None:
        if (step.query_lengths != step.context_lengths).any():
            raise ValueError("an encoder's row was cut into several steps")
        ends = np.cumsum(step.query_lengths)
        by_length: dict[int, list[int]] = {}
        for start, end in pairwise([0, *ends.tolist()]):
            by_length.setdefault(end - start, []).append(start)
        self._groups = [
            (torch.from_numpy((np.array(starts)[:, None] + np.arange(length)).ravel()), length)
            for length, starts in by_length.items()
        ]

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: int,
        *,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `AttentionBackend.run`."""
        if k is None or v is None:
            raise ValueError("an encoder has no cache that keys and values could be in")
        if len(self._groups) == 1 and len(self._groups[0][0]) == self._groups[0][1]:
            return self._attend(q, k, v, q.shape[0])
        out = torch.empty(q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
        for tokens, length in self._groups:
            chosen = tokens.to(q.device)
            query, key, value = (tensor.index_select(0, chosen) for tensor in (q, k, v))
            out.index_copy_(0, chosen, self._attend(query, key, value, length))
        return out

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: int) -> torch.Tensor:
        """[num_rows * length, heads, head_dim] each -> [num_rows * length, heads * head_dim]."""
        query, key, value = (tensor.unflatten(0, (-1, length)).transpose(1, 2) for tensor in (q, k, v))
        is_grouped = q.shape[1] != k.shape[1]
        attended = F.scaled_dot_product_attention(query, key, value, scale=self.spec.scale, enable_gqa=is_grouped)
        return attended.transpose(1, 2).reshape(q.shape[0], -1)
