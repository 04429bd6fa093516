"""What a step launches, from the step buffer to the sampled tokens: the same for a capture as for eager launches.

    apply the delta - build the inputs - work lists - decoder - logits  |  recount - sample - write back - results

Every kernel reads shapes from the host and content from the device, so that a captured program serves any step of its
shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from stepwire_kernels import sampler, step_input, step_result
from stepwire_kernels.dealt_sampling import allocate_line, put_together
from stepwire_kernels.gather import gather_last_hidden
from stepwire_kernels.sampler import Sampled
from stepwire_kernels.step_input import RowState, StepInput

from gpu_worker.attention.api import backends_of
from gpu_worker.attention.triton_backend import DeviceStep, TritonAttention
from gpu_worker.attention.triton_latent import DeviceAttention, TritonLatentAttention
from gpu_worker.cuda.device_rows import MAX_BIASES
from gpu_worker.cuda.stage_link import StageLink
from gpu_worker.cuda.step_layout import StepShape
from gpu_worker.layers.decoder import HiddenStates
from gpu_worker.models.family import ModelFamily
from gpu_worker.parallel.shares import ParallelContext
from gpu_worker.prompt_logprobs import DescribedRun, describe_run, num_rows_at_a_time
from gpu_worker.row_table import PromptRun

# From so many rows of logits on, the ranks of a stage each draw for some of them: their logits and the sampler's work
# are divided, and what was drawn is one more exchange of a few microseconds. On two H100 a step of 256 rows takes
# 0.24 ms less (15.56 to 15.32), one of 32 as long as before.
DEALT_ROWS = 64


@dataclass(frozen=True, slots=True)
class ProgramLimits:
    """What the program's buffers are allocated for."""

    max_num_seqs: int
    max_model_len: int
    max_runs: int
    max_tokens: int
    block_size: int
    vocab_size: int
    max_top: int


@dataclass(frozen=True, slots=True)
class ProgramBuffers:
    """Everything that lives from step to step beside weights and KV cache."""

    rows: RowState
    inputs: StepInput
    sampler_workspace: sampler.SamplerWorkspace
    sampled: Sampled

    @classmethod
    def allocate(cls, limits: ProgramLimits, device: torch.device) -> ProgramBuffers:
        rows = step_input.allocate_row_state(
            # One more: the scratch row, for steps that are nobody's.
            limits.max_num_seqs + 1,
            limits.max_model_len,
            limits.block_size,
            limits.vocab_size,
            device,
            max_biases=MAX_BIASES,
        )
        return cls(
            rows=rows,
            inputs=step_input.allocate_step_input(limits.max_runs, limits.max_tokens, device),
            sampler_workspace=sampler.allocate_sampler_workspace(limits.max_runs, limits.vocab_size, device),
            sampled=sampler.allocate_sampled(limits.max_runs, limits.max_top, device),
        )


@dataclass(frozen=True, slots=True)
class StepMasks:
    """Token masks of one step, on the device."""

    words: torch.Tensor  # int32 [num_masks, ceil(vocab_size / 32)]
    rows: torch.Tensor  # int32 [num_samples]: the run's row of `words`, or -1


class StepProgram:
    """Launches a step's kernels on the current stream.

    Args:
        link: to the other stages of a pipeline, if there are any.
        parallel: this rank among those of its stage.
        dealt_rows: from so many rows of logits on, each of these ranks draws for some of them.
    """

    def __init__(
        self,
        model: ModelFamily,
        attention: DeviceAttention,
        buffers: ProgramBuffers,
        packed: torch.Tensor,
        results: torch.Tensor,
        limits: ProgramLimits,
        *,
        pdl: bool,
        link: StageLink | None = None,
        parallel: ParallelContext | None = None,
        dealt_rows: int = DEALT_ROWS,
    ) -> None:
        self._link = link
        self._parallel = parallel or ParallelContext()
        self._dealt_rows = dealt_rows
        self._model = model
        self._attention = attention
        self._buffers = buffers
        self._packed = packed
        self._results = results
        self._limits = limits
        self._pdl = pdl
        rows = buffers.rows
        # What the plain sampler sees: the same rows, without token counts.
        self._rows_without_counts = RowState(
            rows.tokens, rows.lengths, rows.block_tables, rows.parameters, rows.biases, rows.token_counts[:0]
        )
        self._sampled_without_top = _without_top(buffers.sampled)
        max_own = self._parallel.rows_each(limits.max_num_seqs)
        self._line = allocate_line(max_own if self._parallel.size > 1 else 0, limits.max_top, packed.device)
        self._line_without_top = _without_top(self._line.sampled)

    @property
    def draws(self) -> bool:
        """Whether this rank draws a step's tokens; else it takes them from the last stage."""
        return self._link is None or self._link.is_last

    def kv_caches(self) -> list[torch.Tensor]:
        backends: tuple[TritonAttention | TritonLatentAttention, ...] = backends_of(self._attention)
        return [cache for backend in backends for cache in backend.kv_caches()]

    def apply_changes(self) -> None:
        """Only the delta, for changes that come without runs or do not fit one buffer."""
        step_input.apply_delta(self._packed, self._buffers.rows)

    def recount(self) -> None:
        """Token counts of the rows that the step buffer names."""
        step_input.recount_tokens(self._packed, self._buffers.rows)

    @torch.inference_mode()
    def forward(self, shape: StepShape) -> torch.Tensor | None:
        """Delta, inputs and this stage of the model; logits as of `logits`."""
        return self.logits(shape, self.hidden(shape))

    @torch.inference_mode()
    def hidden(self, shape: StepShape) -> HiddenStates:
        """Delta, inputs and this stage's blocks: states of all tokens, [num_tokens, hidden]."""
        rows, inputs = self._buffers.rows, self._inputs(shape)
        self.apply_changes()
        step_input.build_step_input(
            self._packed, rows, inputs, self._limits.block_size, one_token_runs=shape.is_decode, pdl=self._pdl
        )
        step = DeviceStep(inputs, rows.block_tables, shape.has_decodes, not shape.is_decode)
        self._attention.plan(step)
        if self._model.states is not None:
            self._model.states.plan(step)
        received = None if self._link is None else self._link.receive_hidden(shape.num_tokens)
        return self._model.hidden_states(inputs.input_ids, inputs.positions, self._attention, received)

    @torch.inference_mode()
    def logits(self, shape: StepShape, hidden: HiddenStates) -> torch.Tensor | None:
        """[num_logits, vocab_size] of the first runs, or of those that this rank draws for, if they are dealt out.

        `hidden` may be overwritten. None where none samples, and where another stage has them: it is sent the states.
        """
        if self._link is not None and not self._link.is_last:
            self._link.send_hidden(hidden.added())
            return None
        inputs = self._inputs(shape)
        if shape.num_logits == 0:
            return None
        if not shape.is_decode:
            starts = inputs.query_starts[: shape.num_logits + 1]
            hidden = hidden.of(
                gather_last_hidden(hidden.output, starts, pdl=self._pdl),
                gather_last_hidden(hidden.residual, starts, pdl=self._pdl),
            )
        return self._model.logits(hidden, deals=self._deals(shape))

    def _deals(self, shape: StepShape) -> bool:
        return self._parallel.size > 1 and shape.num_logits >= self._dealt_rows

    @torch.inference_mode()
    def describe_prompts(self, runs: Sequence[PromptRun], hidden: HiddenStates) -> list[DescribedRun]:
        """Logprobs of prompts, on their way to the host; plain torch, so never a part of a graph."""
        max_rows = num_rows_at_a_time(self._limits.vocab_size)
        return [describe_run(run, hidden, self._model.logits, max_rows).begin_copy() for run in runs]

    @torch.inference_mode()
    def sample(self, shape: StepShape, logits: torch.Tensor, *, is_full: bool, masks: StepMasks | None = None) -> None:
        """Draw tokens, append them to their rows, and write the results for the host.

        `is_full`: with penalties, top log-probabilities and recounting; what nobody asked for is not paid for.
        """
        inputs = self._inputs(shape)
        rows = self._buffers.rows if is_full else self._rows_without_counts
        sampled = self._buffers.sampled if is_full else self._sampled_without_top
        if is_full:
            self.recount()
        if self._deals(shape):
            own = self._parallel.own_rows(shape.num_logits)
            drawn = self._line.sampled if is_full else self._line_without_top
            self._draw(logits, inputs, own, rows, drawn, masks)
            lines = self._parallel.all_gather(self._line.words)  # [1, size * line_words]
            num_rows, rows_each = shape.num_logits, self._parallel.rows_each(shape.num_logits)
            put_together(lines, self._line, sampled, num_rows, rows_each, pdl=self._pdl)
        else:
            self._draw(logits, inputs, slice(0, shape.num_logits), rows, sampled, masks)
        step_input.write_back_tokens(sampled.token_ids[: shape.num_runs], inputs, rows, pdl=self._pdl)
        step_result.pack_result(
            self._packed, sampled, inputs, shape.num_logits, self._results, self._limits.max_runs, pdl=self._pdl
        )
        if self._link is not None:
            self._link.send_tokens(sampled, inputs, shape.num_logits)

    def _draw(
        self,
        logits: torch.Tensor,
        inputs: StepInput,
        runs: slice,
        rows: RowState,
        out: Sampled,
        masks: StepMasks | None,
    ) -> None:
        """logits: of these runs."""
        if runs.start == runs.stop:
            return
        sampler.sample(
            logits,
            inputs.run_rows[runs],
            inputs.sample_positions[runs],
            rows,
            self._buffers.sampler_workspace,
            out,
            masks=None if masks is None else masks.words,
            mask_rows=None if masks is None else masks.rows[runs],
            pdl=self._pdl,
        )

    @torch.inference_mode()
    def take_tokens(self, shape: StepShape, slot: int, *, is_full: bool) -> None:
        """What `sample` does, on a stage that does not draw: wait for the tokens, append them, write the results."""
        if self._link is not None:
            self._link.take_tokens(self._buffers.rows, self._results[slot], shape.num_logits, is_full=is_full)

    def _inputs(self, shape: StepShape) -> StepInput:
        """The step's part of the input buffers."""
        whole, num_runs, num_tokens = self._buffers.inputs, shape.num_runs, shape.num_tokens
        return StepInput(
            input_ids=whole.input_ids[:num_tokens],
            positions=whole.positions[:num_tokens],
            slots=whole.slots[:num_tokens],
            query_starts=whole.query_starts[: num_runs + 1],
            kv_lens=whole.kv_lens[:num_runs],
            run_rows=whole.run_rows[:num_runs],
            run_flags=whole.run_flags[:num_runs],
            sample_positions=whole.sample_positions[:num_runs],
            faults=whole.faults[:num_runs],
        )


def _without_top(sampled: Sampled) -> Sampled:
    return Sampled(
        sampled.token_ids, sampled.logprobs, sampled.faults, sampled.top_ids[:, :0], sampled.top_logprobs[:, :0]
    )
