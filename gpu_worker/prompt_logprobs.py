"""Log-probabilities of a prompt's own tokens: what each position says of the token that follows it.

For a position with raw logits l and the next token t: logprob = l[t] - logsumexp(l); rank = 1 + how many logits are
larger than l[t]. The logits of a whole prompt would be large ([num_tokens, vocab_size]), so they are made, used and
dropped a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gpu_worker.layers.decoder import HiddenStates
from gpu_worker.row_table import PromptRun
from gpu_worker.runner_api import PromptLogprobs

# Logits that exist at a time.
MAX_LOGITS = 2**23
# In the model's dtype, in float32, and twice in float32 within a reduction.
PROMPT_LOGITS_BYTES = 16 * MAX_LOGITS


@dataclass(frozen=True, slots=True)
class DescribedRun:
    """A run's numbers on their way to the host."""

    run: PromptRun
    logprobs: torch.Tensor  # float32 [num_predicted]
    ranks: torch.Tensor  # int32 [num_predicted]
    top_token_ids: torch.Tensor  # int32 [num_predicted, num_top]
    top_logprobs: torch.Tensor  # float32 [num_predicted, num_top]

    def begin_copy(self) -> DescribedRun:
        """The same in page-locked memory, to be read once the device has come so far."""
        tensors = (self.logprobs, self.ranks, self.top_token_ids, self.top_logprobs)
        return DescribedRun(self.run, *(_begin_copy(tensor) for tensor in tensors))

    def result(self) -> PromptLogprobs:
        """Waits for the device if the tensors are still there."""
        logprobs, ranks, top_token_ids, top_logprobs = (
            tensor.cpu().numpy() for tensor in (self.logprobs, self.ranks, self.top_token_ids, self.top_logprobs)
        )
        return PromptLogprobs(
            row=self.run.row,
            start_position=self.run.start_position,
            logprobs=logprobs,
            ranks=ranks.view("uint32"),
            top_token_ids=top_token_ids.view("uint32"),
            top_logprobs=top_logprobs,
        )


def _begin_copy(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def num_rows_at_a_time(vocab_size: int) -> int:
    return max(1, MAX_LOGITS // vocab_size)


def describe_run(
    run: PromptRun,
    hidden: HiddenStates,
    to_logits: Callable[[HiddenStates], torch.Tensor],
    max_rows: int,
) -> DescribedRun:
    """hidden: of all the step's tokens, [num_tokens, hidden]; it is left as it is. max_rows: logits at a time."""
    device = hidden.output.device
    tokens = torch.arange(run.first_token, run.first_token + len(run.targets), device=device)
    on_host = torch.from_numpy(run.targets)
    targets = (on_host.pin_memory() if device.type == "cuda" else on_host).to(device, non_blocking=True)
    parts = [
        _describe(to_logits(hidden.select(some)).float(), those, run.num_top)
        for some, those in zip(tokens.split(max_rows), targets.split(max_rows), strict=True)
    ]
    return DescribedRun(run, *(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _describe(
    logits: torch.Tensor, targets: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits: float32 [num_rows, vocab_size]; targets: [num_rows]."""
    if logits.device.type == "cpu":
        # Row by row, as the sampler does it: a sum must not depend on how many rows stand beside it.
        normalisers = torch.stack([torch.logsumexp(row, dim=0) for row in logits])
    else:
        normalisers = torch.logsumexp(logits, dim=-1)
    own = logits.gather(1, targets[:, None])  # [num_rows, 1]
    ranks = (logits > own).sum(dim=-1, dtype=torch.int32) + 1
    top = torch.topk(logits, min(num_top, logits.shape[-1]), dim=-1)
    logprobs = own[:, 0] - normalisers
    return logprobs, ranks, top.indices.to(torch.int32), top.values - normalisers[:, None]
