"""Sampling over ranks that each draw for some rows: what a rank has drawn as one line, and all lines as one step.

Row r of num_rows is drawn by rank r // rows_each, in its place r % rows_each, from whole logits, which are dealt out
for it (`all_gather.deal_rows`). A line holds everything that the sampler writes, part by part for up to max_rows_each
rows, in 32-bit words:

    token_ids, logprobs, faults  [max_rows_each] each
    top_ids, top_logprobs        [max_rows_each, max_top] each

The sampler writes into the line itself; the lines of all ranks, side by side, become one `Sampled`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream
from stepwire_kernels.sampler import Sampled


@dataclass(frozen=True)
class SampledLine:
    """One rank's line, and the sampler's view of it."""

    words: torch.Tensor  # int32 [1, line_words]
    sampled: Sampled


def line_words(max_rows_each: int, max_top: int) -> int:
    """Words of a line; a multiple of 4, so that lines begin at 16 bytes."""
    return -(-max_rows_each * (3 + 2 * max_top) // 4) * 4


def allocate_line(max_rows_each: int, max_top: int, device: torch.device | str) -> SampledLine:
    """An empty line."""
    words = torch.zeros(1, line_words(max_rows_each, max_top), dtype=torch.int32, device=device)
    top = max_rows_each * max_top
    sizes = [max_rows_each] * 3 + [top, top]
    ids, logprobs, faults, top_ids, top_logprobs = words[0, : sum(sizes)].split(sizes)
    sampled = Sampled(
        token_ids=ids,
        logprobs=logprobs.view(torch.float32),
        faults=faults,
        top_ids=top_ids.view(max_rows_each, max_top),
        top_logprobs=top_logprobs.view(torch.float32).view(max_rows_each, max_top),
    )
    return SampledLine(words, sampled)


@triton.jit
def _put_together_kernel(
    lines_ptr,
    token_ids_ptr,
    logprobs_ptr,
    faults_ptr,
    top_ids_ptr,
    top_logprobs_ptr,
    line_words,
    max_rows_each,
    rows_each,
    max_top,
    BLOCK_TOP: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    row = tl.program_id(0)
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    place = row % rows_each
    line = lines_ptr + (row // rows_each) * line_words
    tl.store(token_ids_ptr + row, tl.load(line + place))
    tl.store(logprobs_ptr + row, tl.load(line + max_rows_each + place).to(tl.float32, bitcast=True))
    tl.store(faults_ptr + row, tl.load(line + 2 * max_rows_each + place))
    if BLOCK_TOP > 0:
        places = tl.arange(0, BLOCK_TOP)
        mask = places < max_top
        top = line + 3 * max_rows_each + place * max_top + places
        tl.store(top_ids_ptr + row * max_top + places, tl.load(top, mask=mask, other=0), mask=mask)
        values = tl.load(top + max_rows_each * max_top, mask=mask, other=0).to(tl.float32, bitcast=True)
        tl.store(top_logprobs_ptr + row * max_top + places, values, mask=mask)


def put_together(
    lines: torch.Tensor, line: SampledLine, out: Sampled, num_rows: int, rows_each: int, *, pdl: bool = False
) -> Sampled:
    """Rows of all ranks into `out`; lines: int32 [1, size * line_words], `line`: this rank's own, for its shape.

    Top log-probabilities are taken where `out` has room for them, which is as much as a line has.

    Raises:
        ValueError: more rows than lines hold, or another number of top log-probabilities.
    """
    max_rows_each, max_top = line.sampled.top_ids.shape
    num_lines = lines.shape[1] // line.words.shape[1]
    if not 0 < rows_each <= max_rows_each or num_rows > num_lines * rows_each:
        raise ValueError(
            f"put_together: {num_rows} rows, {rows_each} of each rank, are more than {num_lines} lines of "
            f"{max_rows_each} hold"
        )
    if out.top_ids.shape[1] not in (0, max_top):
        raise ValueError(f"put_together: lines have {max_top} top log-probabilities, not {out.top_ids.shape[1]}")
    if num_rows == 0:
        return out
    wanted = out.top_ids.shape[1]
    _put_together_kernel[(num_rows,)](
        lines,
        out.token_ids,
        out.logprobs,
        out.faults,
        out.top_ids,
        out.top_logprobs,
        line.words.shape[1],
        max_rows_each,
        rows_each,
        max_top,
        BLOCK_TOP=triton.next_power_of_2(wanted) if wanted else 0,
        USE_PDL=pdl,
        num_warps=1,
        **launch_options(pdl),
    )
    return out
