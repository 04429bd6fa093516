"""Lines that ranks draw apart become what one sampler writes."""

from __future__ import annotations

import pytest
import torch
from stepwire_kernels.all_gather import deal_rows, gather_buffers, gather_region_words
from stepwire_kernels.dealt_sampling import SampledLine, allocate_line, line_words, put_together
from stepwire_kernels.sampler import Sampled, allocate_sampled

MAX_TOP = 3
FIELDS = ("token_ids", "logprobs", "faults", "top_ids", "top_logprobs")


def drawn(num_rows: int) -> Sampled:
    """What a sampler might have written, another number in every place."""
    numbers = torch.arange(num_rows * (3 + 2 * MAX_TOP)).split([num_rows] * 3 + [num_rows * MAX_TOP] * 2)
    return Sampled(
        numbers[0].int(),
        -numbers[1].float() / 7,
        numbers[2].int(),
        numbers[3].int().view(num_rows, MAX_TOP),
        -numbers[4].float().view(num_rows, MAX_TOP) / 7,
    )


@pytest.mark.parametrize(("num_rows", "max_rows_each", "size"), [(1, 1, 2), (6, 3, 2), (6, 5, 2), (7, 3, 3), (5, 4, 4)])
@pytest.mark.parametrize("with_top", [False, True])
def test_lines_of_all_ranks_are_one_step(num_rows: int, max_rows_each: int, size: int, with_top: bool) -> None:
    whole, rows_each = drawn(num_rows), -(-num_rows // size)
    lines: list[SampledLine] = []
    for rank in range(size):
        line = allocate_line(max_rows_each, MAX_TOP, "cpu")
        for name in FIELDS:
            own = getattr(whole, name)[rank * rows_each : (rank + 1) * rows_each]
            getattr(line.sampled, name)[: len(own)] = own
        lines.append(line)
    out = allocate_sampled(num_rows + 1, MAX_TOP if with_top else 0, "cpu")
    put_together(torch.cat([line.words for line in lines], dim=1), lines[0], out, num_rows, rows_each)
    for name in FIELDS if with_top else FIELDS[:3]:
        assert torch.equal(getattr(out, name)[:num_rows], getattr(whole, name)), name


def test_lines_begin_at_sixteen_bytes() -> None:
    assert all(line_words(rows, top) % 4 == 0 for rows in range(9) for top in range(4))


def test_what_lines_do_not_hold_is_refused() -> None:
    line, out = allocate_line(2, MAX_TOP, "cpu"), allocate_sampled(8, MAX_TOP, "cpu")
    lines = torch.cat([line.words, line.words], dim=1)
    with pytest.raises(ValueError, match="5 rows, 2 of each rank"):
        put_together(lines, line, out, 5, 2)
    with pytest.raises(ValueError, match="3 of each rank"):
        put_together(lines, line, out, 4, 3)
    with pytest.raises(ValueError, match="have 3 top log-probabilities, not 2"):
        put_together(lines, line, allocate_sampled(8, 2, "cpu"), 4, 2)


def test_rows_that_are_nobodys_are_refused() -> None:
    words = gather_region_words(2, 4, 2, torch.float32)
    regions = [torch.zeros(words, dtype=torch.int64) for _ in range(2)]
    buffers = gather_buffers(0, regions, 4, 2, torch.float32, torch.ones(1, dtype=torch.int32))
    with pytest.raises(ValueError, match="3 rows are more than 1 for each of 2 ranks"):
        deal_rows(torch.zeros(3, 2), buffers, 1)
