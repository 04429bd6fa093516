from __future__ import annotations

import pytest
import torch
from stepwire_kernels.mailbox import Mailbox, lay_out_mailbox, mailbox_words, receive_rows, send_rows
from stepwire_kernels.sampler import Sampled
from stepwire_kernels.step_input import allocate_row_state, allocate_step_input
from stepwire_kernels.step_message import CHUNK_WORDS, apply_message, message_chunks, pack_message
from stepwire_kernels.step_result import pack_result, result_slot_words

from tests.unit.kernels.checks import poison

MAX_ROWS, ROW_WORDS, PLACES = 6, 24, 2


def both_ends(device: str) -> tuple[Mailbox, Mailbox]:
    at_receiver, at_sender = (
        torch.zeros(words, dtype=torch.int32, device=device) for words in mailbox_words(PLACES, MAX_ROWS, ROW_WORDS)
    )
    stop = torch.zeros(1, dtype=torch.int32)

    def end() -> Mailbox:
        rounds = torch.zeros(MAX_ROWS, dtype=torch.int32, device=device)
        return lay_out_mailbox(at_receiver, at_sender, PLACES, MAX_ROWS, ROW_WORDS, rounds, stop)

    return end(), end()


@pytest.mark.parametrize(
    ("dtype", "columns"), [(torch.float32, 24), (torch.bfloat16, 10), (torch.float16, 48), (torch.int32, 1)]
)
def test_rows_arrive_in_order_as_far_ahead_as_there_are_places(device: str, dtype: torch.dtype, columns: int) -> None:
    sender, receiver = both_ends(device)
    # Row counts that differ: rows are in different rounds.
    sent = [torch.randn(rows, columns, device=device).mul(100).to(dtype) for rows in (3, 6, 1, 2, 6)]
    for number, x in enumerate(sent):
        send_rows(x, sender)
        if number >= PLACES - 1:
            wanted = sent[number - PLACES + 1]
            got = poison(*wanted.shape, dtype=dtype, device=device)
            assert torch.equal(receive_rows(got, receiver), wanted)
    # The last ones that were sent.
    wanted = sent[-1]
    assert torch.equal(receive_rows(torch.empty_like(wanted), receiver), wanted)


def test_no_rows(device: str) -> None:
    sender, receiver = both_ends(device)
    send_rows(torch.zeros(0, 8, device=device), sender)
    assert receive_rows(torch.zeros(0, 8, device=device), receiver).shape == (0, 8)


@pytest.mark.parametrize("shape", [(MAX_ROWS + 1, 4), (1, ROW_WORDS + 1)])
def test_what_does_not_fit_is_refused(device: str, shape: tuple[int, int]) -> None:
    sender, _ = both_ends(device)
    with pytest.raises(ValueError, match=rf"at most {MAX_ROWS} rows of at most {ROW_WORDS}"):
        send_rows(torch.zeros(shape, device=device), sender)


@pytest.mark.parametrize("max_top", [0, 3])
def test_a_message_gives_other_ranks_the_tokens_and_the_results(device: str, max_top: int) -> None:
    max_runs, num_runs, room = 5, 4, 3
    step = allocate_step_input(max_runs, max_runs, device)
    step.run_rows[:num_runs] = torch.tensor([2, 0, 3, 1], device=device)
    step.run_flags[:num_runs] = torch.tensor([1, 0, 1, 1], device=device)
    step.sample_positions[:num_runs] = torch.tensor([4, 5, 7, 8], device=device)
    step.faults[:num_runs] = torch.tensor([0, 0, 1, 0], device=device)
    sampled = Sampled(
        token_ids=torch.arange(100, 100 + max_runs, dtype=torch.int32, device=device),
        logprobs=torch.randn(max_runs, device=device),
        faults=torch.tensor([0, 0, 0, 2, 0], dtype=torch.int32, device=device),
        top_ids=torch.arange(max_runs * max_top, dtype=torch.int32, device=device).view(max_runs, max_top),
        top_logprobs=torch.randn(max_runs, max_top, device=device),
    )
    buffer = torch.zeros(8, dtype=torch.int32, device=device)
    expected = torch.zeros(1, result_slot_words(max_runs, room), dtype=torch.int32, device=device)
    pack_result(buffer, sampled, step, num_runs, expected, max_runs)

    message = torch.zeros(message_chunks(num_runs, max_runs, max_top), CHUNK_WORDS, dtype=torch.int32, device=device)
    pack_message(sampled, step, num_runs, message, max_runs)
    rows = allocate_row_state(max_runs, 8, 4, 50, device)
    rows.tokens.fill_(-5)
    slot = torch.zeros_like(expected[0])
    apply_message(message, rows, slot, num_runs, max_runs, max_top)

    assert torch.equal(slot, expected[0])
    wanted = torch.full_like(rows.tokens, -5)
    # Row 0 does not sample, and row 1 is full.
    wanted[2, 4], wanted[3, 7] = 100, 102
    assert torch.equal(rows.tokens, wanted)
    assert rows.lengths.tolist() == [0, 0, 5, 8, 0]


def test_chunks() -> None:
    assert message_chunks(1, 300, 0) == message_chunks(256, 300, 0) == 1
    assert message_chunks(257, 300, 0) == 2
    assert message_chunks(1, 257, 20) == -(-257 * 48 // CHUNK_WORDS)
