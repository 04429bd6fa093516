"""What a stage of a pipeline exchanges with the others, on the device and inside the step's graph.

Hidden states go from stage to stage, a message with the step's tokens from the last stage to each of the others. Ranks
in the same place of their stages exchange with each other: with tensor parallel, every rank of the last stage draws the
same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from stepwire_kernels.mailbox import Mailbox, lay_out_mailbox, mailbox_words, receive_rows, send_rows
from stepwire_kernels.sampler import Sampled
from stepwire_kernels.step_input import RowState, StepInput
from stepwire_kernels.step_message import CHUNK_WORDS, apply_message, message_chunks, pack_message

from gpu_worker.parallel.peer_memory import map_peers
from gpu_worker.parallel.process_group import RankGroup

# How many steps a stage may run ahead of the next one.
HIDDEN_PLACES = 2
MESSAGE_PLACES = 4


@dataclass(frozen=True, slots=True)
class LinkSizes:
    """What the mailboxes are allocated for, the same on all stages."""

    num_stages: int
    max_tokens: int
    max_runs: int
    max_top: int
    hidden_size: int
    dtype: torch.dtype

    @property
    def hidden_words(self) -> int:
        """32-bit words of a row of hidden states; rows begin at 16 bytes."""
        return -(-self.hidden_size * self.dtype.itemsize // 16) * 4

    @property
    def chunks(self) -> int:
        return message_chunks(self.max_runs, self.max_runs, self.max_top)

    def parts(self) -> list[int]:
        """int32 words of a rank's region: hidden states' inbox, and acknowledgements of those it sent; the message's
        inbox, and acknowledgements of those sent to each stage."""
        inbox, acknowledged = mailbox_words(HIDDEN_PLACES, self.max_tokens, self.hidden_words)
        message_inbox, message_acknowledged = mailbox_words(MESSAGE_PLACES, self.chunks, CHUNK_WORDS)
        parts = [inbox, acknowledged, message_inbox, *[message_acknowledged] * (self.num_stages - 1)]
        return [-(-words // 4) * 4 for words in parts]

    @property
    def region_words(self) -> int:
        """int64 words of a rank's region."""
        return sum(self.parts()) // 2


class StageLink:
    """One rank's ends of the mailboxes.

    Args:
        stage: this rank's.
        regions: int64 [sizes.region_words] of the rank in the same place of every stage, as this rank maps them.
        stop: int32 [1], page-locked: not zero ends all waiting.
        held: what must live as long as the regions.
    """

    def __init__(
        self,
        stage: int,
        regions: Sequence[torch.Tensor],
        sizes: LinkSizes,
        stop: torch.Tensor,
        *,
        pdl: bool,
        held: object = None,
    ) -> None:
        self._sizes, self._pdl, self._stop, self._held = sizes, pdl, stop, held
        self._device = device = regions[stage].device
        self.is_first, self.is_last = stage == 0, stage == sizes.num_stages - 1
        parts = [region.view(torch.int32).split(sizes.parts()) for region in regions]
        self._message = torch.zeros(sizes.chunks, CHUNK_WORDS, dtype=torch.int32, device=device)

        def mailbox(sender: int, receiver: int, inbox: int, acknowledged: int) -> Mailbox:
            shape = (HIDDEN_PLACES, sizes.max_tokens, sizes.hidden_words)
            if inbox != 0:
                shape = (MESSAGE_PLACES, sizes.chunks, CHUNK_WORDS)
            at_receiver = parts[receiver][inbox][: mailbox_words(*shape)[0]]
            at_sender = parts[sender][acknowledged][: shape[1]]
            rounds = torch.zeros(shape[1], dtype=torch.int32, device=device)
            return lay_out_mailbox(at_receiver, at_sender, *shape, rounds, stop)

        last = sizes.num_stages - 1
        self._from_former = None if self.is_first else mailbox(stage - 1, stage, 0, 1)
        self._to_next = None if self.is_last else mailbox(stage, stage + 1, 0, 1)
        self._from_last = None if self.is_last else mailbox(last, stage, 2, 3 + stage)
        self._to_others = [mailbox(last, other, 2, 3 + other) for other in range(last)] if self.is_last else []

    def receive_hidden(self, num_tokens: int) -> torch.Tensor | None:
        """What the stage before gave for this step, [num_tokens, hidden]; None on the first."""
        if self._from_former is None:
            return None
        shape = (num_tokens, self._sizes.hidden_size)
        hidden = torch.empty(shape, dtype=self._sizes.dtype, device=self._device)
        # Launched without, so that the layers find the step's plan complete (see `dependent_launch`).
        return receive_rows(hidden, self._from_former, pdl=False)

    def send_hidden(self, hidden: torch.Tensor) -> None:
        """To the next stage, [num_tokens, hidden]."""
        if self._to_next is not None:
            send_rows(hidden, self._to_next, pdl=self._pdl)

    def send_tokens(self, sampled: Sampled, step: StepInput, num_runs: int) -> None:
        """From the last stage: what the first `num_runs` runs of a step have drawn."""
        max_top = sampled.top_ids.shape[1]
        pack_message(sampled, step, num_runs, self._message, self._sizes.max_runs, pdl=self._pdl)
        used = self._message[: message_chunks(num_runs, self._sizes.max_runs, max_top)]
        for mailbox in self._to_others:
            send_rows(used, mailbox, pdl=self._pdl)

    def take_tokens(self, rows: RowState, slot: torch.Tensor, num_runs: int, *, is_full: bool) -> None:
        """On the other stages: wait for a step's tokens, append them to their rows and write the slot of results."""
        if self._from_last is None:
            raise ValueError("the last stage draws the tokens: it has nobody to take them from")
        max_top = self._sizes.max_top if is_full else 0
        chunks = message_chunks(num_runs, self._sizes.max_runs, max_top)
        receive_rows(self._message[:chunks], self._from_last)
        apply_message(self._message, rows, slot, num_runs, self._sizes.max_runs, max_top)

    def give_up(self) -> None:
        """Let kernels that wait for another stage end. What they leave is worthless, and so is every later step."""
        self._stop.fill_(1)


def open_stage_link(group: RankGroup, device: torch.device, sizes: LinkSizes, *, pdl: bool) -> StageLink | None:
    """This rank's link; None: the stages cannot map each other's memory. All ranks call it at the same time."""
    layout, rank = group.layout, group.place.rank
    memory = map_peers(group, device, layout.column_ranks(rank), sizes.region_words, "stages")
    if memory is None:
        return None
    stop = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    return StageLink(layout.stage_of(rank), memory.regions, sizes, stop, pdl=pdl, held=memory)
