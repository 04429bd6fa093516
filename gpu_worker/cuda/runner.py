"""The CUDA runner: a step is one packed copy and one graph, launched without ever waiting for the device.

`execute` checks the step against the host's mirror of the rows, packs what changed, and launches; the results are read
by the completion thread. Tokens never visit the host on their way into the next step.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from queue import Empty, SimpleQueue

import numpy as np
import numpy.typing as npt
import structlog
import torch

from gpu_worker.assembly import batch_limits
from gpu_worker.cuda.device_rows import DeviceRows, StagedChanges
from gpu_worker.cuda.pooled import PooledRows, pooled_runs
from gpu_worker.cuda.results import NO_RUNS, CudaPendingStep, RecordLayout, SampledRuns
from gpu_worker.cuda.step_graphs import CapturedStep, GraphCaptureError, GraphKey, GraphKind, StepGraphs
from gpu_worker.cuda.step_layout import StepLayout, StepPlanner, StepShape, pack, split_changes
from gpu_worker.cuda.step_program import StepMasks, StepProgram
from gpu_worker.cuda.timeline import Timeline
from gpu_worker.pooling import Pooler
from gpu_worker.prompt_logprobs import DescribedRun
from gpu_worker.row_table import IntArray, PromptRun
from gpu_worker.runner_api import RowFault, StepBatch, TokenMask, WorkerFacts

log = structlog.get_logger(__name__)

NO_RUN_RECORDS = np.zeros((0, 4), dtype=np.int32)
USES_BEFORE_CAPTURE = 2
# What measurements wait for.
GRAPHS_COMPLETE = "every shape of step has its graph"


class CudaRunner:
    """Implements `runner_api.Runner`; `gpu_worker.cuda.loading` builds it.

    Args:
        graphs: None launches every kernel by itself.
        compiler: context in which launches only compile their kernels.
        give_up: called at the end, before the device is waited for, and when another rank is lost; ends what waits for
            other ranks there.
        pooler: rows are worth a vector each, and no token is ever drawn; such steps are launched kernel by kernel.
        is_group: there are other ranks. They must lay every step out alike, so a row that got no token is not forgotten
            when its result is read, which is another moment on each: the control plane drops it.
    """

    def __init__(
        self,
        facts: WorkerFacts,
        program: StepProgram,
        planner: StepPlanner,
        timeline: Timeline,
        graphs: StepGraphs | None,
        device: torch.device,
        compiler: Callable[[], AbstractContextManager[None]] = nullcontext,
        give_up: Callable[[], None] | None = None,
        *,
        pooler: Pooler | None = None,
        is_group: bool = False,
    ) -> None:
        self._pooler = pooler
        self._give_up, self._is_group = give_up, is_group
        self._facts = facts
        self._program = program
        self._planner = planner
        self._timeline = timeline
        self._graphs = graphs
        self._device = device
        self._compiler = compiler
        self._rows = DeviceRows(batch_limits(facts))
        self._layout = RecordLayout(planner.max_runs, facts.max_num_logprobs)
        self._in_slot: list[CudaPendingStep | None] = [None] * len(timeline.results)
        # Slots of steps whose tokens another rank draws, oldest first, and the rows that get them.
        self._arriving: dict[int, IntArray] = {}
        self._next_slot = 0
        self._to_capture: GraphKey | None = None
        self._eager_uses: Counter[GraphKey] = Counter()
        self._capture_failed = False
        # Shapes whose capture was tried, and with several ranks the same on all of them.
        self._attempted: set[GraphKey] = set()
        self._uncaptured = deque(planner.graph_shapes())
        # (row, generation) of rows that got no token, found by the completion thread.
        self._failed: SimpleQueue[tuple[int, int]] = SimpleQueue()

    def describe(self) -> WorkerFacts:
        return self._facts

    def kv_caches(self) -> list[torch.Tensor]:
        """The KV cache's tensors, [num_blocks, num_kv_heads, block_size, head_dim] each: for measurements."""
        return self._program.kv_caches()

    def reset(self) -> None:
        # What the last session's steps drew is still under way: it must not be taken for the next one's.
        self._await_arrivals(list(self._arriving))
        self._rows.clear()
        if self._pooler is not None:
            self._pooler.clear()

    def give_up(self) -> None:
        if self._give_up is not None:
            self._give_up()

    def close(self) -> None:
        self._rows.clear()
        self.give_up()
        self._synchronize()
        if self._graphs is not None:
            self._graphs.clear()

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def has_pause_work(self) -> bool:
        return (
            self._graphs is not None
            and not self._capture_failed
            and len(self._uncaptured) > 0
            and all(pending is None or pending.is_over for pending in self._in_slot)
        )

    def idle(self) -> bool:
        """Use a pause: capture the next graph, small first. True: there is more to do in this pause."""
        # In a group the first rank decides, and all run the same steps: another's captures may have failed.
        if self._graphs is None or not (self._is_group or self.has_pause_work()):
            return False
        was_complete, has_captured = not self._uncaptured, False
        while self._uncaptured and not has_captured:
            key = GraphKey(self._uncaptured.popleft(), GraphKind.PLAIN)
            if key not in self._attempted and self._run_unseen([key.shape]):
                self._capture(key)
                has_captured = True
        if not self._uncaptured and not was_complete:
            log.info(GRAPHS_COMPLETE, graphs=len(self._attempted))
        return has_captured

    def warm_up(self, num_tokens: int, compiled_token_counts: Sequence[int] = ()) -> None:
        """Compile and load what the first requests need, before there are any: a decode step and prefills.

        `compiled_token_counts`: further prefills whose kernels are compiled and not run.
        """
        with self._unseen_step(NO_RUN_RECORDS) as slot, self._compiler():
            for count in compiled_token_counts:
                self._launch_plain(self._planner.prefill_shape(count), slot)
        shapes = [self._planner.decode_shape(1), self._planner.prefill_shape(num_tokens)]
        shapes += [shape for shape in self._planner.graph_shapes() if shape.num_tokens == num_tokens][-1:]
        self._run_unseen(shapes)
        if self._graphs is not None:
            self._capture(GraphKey(shapes[0], GraphKind.PLAIN))

    def _run_unseen(self, shapes: Sequence[StepShape]) -> bool:
        """Compile what these shapes need, and run them on the scratch row for nobody; False: one cannot be."""
        filled = [(shape, self._planner.unseen_runs(shape, self._facts.max_model_len)) for shape in shapes]
        with self._unseen_step(NO_RUN_RECORDS) as slot, self._compiler():
            for shape, _ in filled:
                self._launch_plain(shape, slot)
        for shape, runs in filled:
            if runs is not None:
                with self._unseen_step(runs) as slot:
                    self._launch_plain(shape, slot)
        # A slot's buffer is free once the device has read it, and that may wait for another rank.
        self._synchronize()
        return all(runs is not None for _, runs in filled)

    @contextmanager
    def _unseen_step(self, runs: npt.NDArray[np.int32]) -> Iterator[int]:
        slot = self._free_slot()
        with self._timeline.step(slot, pack(self._timeline.host_buffer(slot), (), runs, (), slot)):
            yield slot
        self._in_slot[slot] = None

    def _launch_plain(self, shape: StepShape, slot: int) -> None:
        if self._pooler is not None:
            self._program.hidden(shape)
            return
        logits = self._program.forward(shape)
        if logits is not None:
            self._program.sample(shape, logits, is_full=False)
        elif shape.num_logits and not self._program.draws:
            with self._timeline.arriving(slot):
                self._program.take_tokens(shape, slot, is_full=False)

    def _capture(self, key: GraphKey) -> None:
        """Capture a step whose kernels are compiled. If that fails, steps without a graph stay eager from then on."""
        self._attempted.add(key)
        if self._graphs is None or self._capture_failed:
            return

        def launch() -> torch.Tensor | None:
            logits = self._program.forward(key.shape)
            if logits is not None and key.kind is not GraphKind.FORWARD:
                self._program.sample(key.shape, logits, is_full=key.kind is GraphKind.FULL)
            return logits

        try:
            self._graphs.capture(key, launch)
        except GraphCaptureError as error:
            self._capture_failed = True
            log.warning(
                "no more CUDA graphs are captured: such steps launch kernel by kernel, slower", reason=str(error)
            )

    def execute(self, batch: StepBatch, wait_for_mask: Callable[[], TokenMask]) -> CudaPendingStep:
        begun = time.perf_counter_ns()
        self._forget_failed()
        faults: list[RowFault] = []
        sound = self._rows.take(batch, faults)
        slot = self._free_slot()
        self._await_arrivals(self._touched_by(batch))
        pooler = self._pooler
        to_run = batch if pooler is None else replace(batch, run_samples=np.zeros_like(batch.run_samples))
        layout = self._planner.lay_out(to_run, sound, self._rows) if len(sound) else None
        pooled: PooledRows | None = None
        sampled = NO_RUNS
        prompt_runs: tuple[PromptRun, ...] = ()
        prompts: list[DescribedRun] = []
        if layout is not None:
            contexts = layout.runs[:, 1] + layout.runs[:, 2]
            samples = (layout.runs[:, 3] & 1) != 0
            self._rows.advance(layout.runs[:, 0].astype(np.int64), contexts.astype(np.int64), samples)
            sampled = self._sampled_runs(layout)
            prompt_runs = self._prompt_runs(layout)
        num_words, recounts = self._pack(slot, layout)
        packed = time.perf_counter_ns()
        with self._timeline.step(slot, num_words):
            if layout is None:
                self._program.apply_changes()
                if recounts:
                    self._program.recount()
            elif pooler is not None:
                pooled = self._launch_pooling(pooler, layout, batch)
            else:
                prompts = self._launch(slot, layout, batch, wait_for_mask, recounts, prompt_runs)
        pending = CudaPendingStep(
            batch.step_id,
            slot,
            sampled,
            faults,
            self._layout,
            self._timeline,
            self._on_failed,
            packed - begun,
            prompts,
            pooled,
            awaits_prompts=bool(prompt_runs) and not self._program.draws,
        )
        self._in_slot[slot] = pending
        if self._to_capture is not None:
            self._capture(self._to_capture)
            self._to_capture = None
        return pending

    def _touched_by(self, batch: StepBatch) -> list[int]:
        """Slots of steps whose tokens must be there first: their rows run, or another sequence gets them."""
        if not self._arriving:
            return []
        rows = np.concatenate([batch.run_rows, batch.drop_rows, np.array([add.row for add in batch.adds], np.uint32)])
        return [slot for slot, sampled in self._arriving.items() if np.isin(sampled, rows).any()]

    def _await_arrivals(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._timeline.await_arrival(slot)
            del self._arriving[slot]

    def _on_failed(self, row: int, generation: int) -> None:
        if not self._is_group:
            self._failed.put((row, generation))

    def _forget_failed(self) -> None:
        while True:
            try:
                row, generation = self._failed.get_nowait()
            except Empty:
                return
            if self._rows.generations[row] == generation:
                # Its blocks need no cleaning: the kernels never let a masked key or value into the arithmetic.
                self._rows.forget(row)

    def _free_slot(self) -> int:
        slot = self._next_slot
        self._next_slot = following = (slot + 1) % len(self._in_slot)
        # The step after the slot's former reads when that one ended, from events that are about to be used again.
        for former in (self._in_slot[slot], self._in_slot[following]):
            if former is not None:
                former.collect()
        self._arriving.pop(slot, None)
        return slot

    def _sampled_runs(self, layout: StepLayout) -> SampledRuns:
        rows = layout.sampled_rows
        return SampledRuns(rows, layout.sampled_runs, self._rows.generations[rows], self._rows.num_logprobs[rows])

    def _prompt_runs(self, layout: StepLayout) -> tuple[PromptRun, ...]:
        counts = layout.runs[:, 2].astype(np.int64)
        rows, starts = layout.runs[:, 0].astype(np.int64), layout.runs[:, 1].astype(np.int64)
        return self._rows.prompt_runs(rows, starts, counts, np.cumsum(counts) - counts)

    def _pack(self, slot: int, layout: StepLayout | None) -> tuple[int, bool]:
        """Fill the slot's buffer; words used, and whether rows are to be recounted. What does not fit goes ahead."""
        runs = NO_RUN_RECORDS if layout is None else layout.runs
        out = self._timeline.host_buffer(slot)
        parts = list(split_changes(self._rows.take_changes(), runs.size, len(out)))
        for part in parts[:-1]:
            with self._timeline.step(slot, pack(out, part.writes, NO_RUN_RECORDS, (), slot)):
                self._program.apply_changes()
            out = self._timeline.host_buffer(slot)
        last: StagedChanges = parts[-1]
        return pack(out, last.writes, runs, last.recounts, slot), bool(last.recounts)

    def _launch(
        self,
        slot: int,
        layout: StepLayout,
        batch: StepBatch,
        wait_for_mask: Callable[[], TokenMask],
        recounts: bool,
        prompt_runs: Sequence[PromptRun],
    ) -> list[DescribedRun]:
        shape, rows = layout.shape, layout.sampled_rows
        needs_masks = len(batch.mask_rows) > 0 or any(row in self._rows.allowed_bits for row in rows.tolist())
        is_full = (
            recounts
            or bool(self._rows.has_penalties[layout.runs[:, 0]].any())
            or bool((self._rows.num_logprobs[rows] > 0).any())
        )
        # The same on stages that do not draw, whose graphs hold no more for it: all ranks capture in step.
        kind = GraphKind.FORWARD if needs_masks else GraphKind.FULL if is_full else GraphKind.PLAIN
        # A graph keeps the states of no token but the sampled ones.
        has_graph = self._graphs is not None and shape.has_graph and not prompt_runs
        captured = self._captured(GraphKey(shape, kind)) if has_graph else None
        prompts: list[DescribedRun] = []
        if captured is not None:
            captured.graph.replay()
            logits = captured.logits
        else:
            hidden = self._program.hidden(shape)
            if self._program.draws:
                prompts = self._program.describe_prompts(prompt_runs, hidden)
            logits = self._program.logits(shape, hidden)
        if not self._program.draws:
            self._take_drawn(slot, layout, batch, wait_for_mask, is_full=is_full)
        elif captured is None or needs_masks:
            self._timeline.mark_logits(slot)
            if logits is not None:
                masks = self._masks(layout, wait_for_mask() if len(batch.mask_rows) else None) if needs_masks else None
                self._program.sample(shape, logits, is_full=is_full, masks=masks)
            elif recounts:
                self._program.recount()
        return prompts

    def _launch_pooling(self, pooler: Pooler, layout: StepLayout, batch: StepBatch) -> PooledRows | None:
        hidden = self._program.hidden(layout.shape)
        rows, vectors = pooler.pool(pooled_runs(layout, batch), hidden)
        return None if vectors is None else PooledRows.begin_copy(rows, self._rows.generations[rows], vectors)

    def _take_drawn(
        self,
        slot: int,
        layout: StepLayout,
        batch: StepBatch,
        wait_for_mask: Callable[[], TokenMask],
        *,
        is_full: bool,
    ) -> None:
        """What another stage draws in this step."""
        if len(batch.mask_rows):
            # The last stage applies it; a step that gets none draws nothing.
            wait_for_mask()
        if layout.shape.num_logits:
            with self._timeline.arriving(slot):
                self._program.take_tokens(layout.shape, slot, is_full=is_full)
            self._arriving[slot] = layout.sampled_rows

    def _captured(self, key: GraphKey) -> CapturedStep | None:
        """The step's graph; None at its first two uses, after which it is captured: its kernels are compiled then."""
        captured = self._graphs.get(key) if self._graphs is not None else None
        if captured is None:
            self._eager_uses[key] += 1
            if self._eager_uses[key] >= USES_BEFORE_CAPTURE:
                self._to_capture = key
        return captured

    def _masks(self, layout: StepLayout, mask: TokenMask | None) -> StepMasks:
        """The step's token masks on the device: a request's grammar, its allowed tokens, or what both allow."""
        words: list[npt.NDArray[np.uint32]] = []
        mask_rows = np.full(layout.shape.num_logits, -1, dtype=np.int32)  # [num_logits]
        late = {} if mask is None else {int(row): mask.bitmask[index] for index, row in enumerate(mask.rows)}
        for row, run in zip(layout.sampled_rows.tolist(), layout.sampled_runs.tolist(), strict=True):
            asked = [bits for bits in (late.get(row), self._rows.allowed_bits.get(row)) if bits is not None]
            if asked:
                mask_rows[run] = len(words)
                words.append(np.bitwise_and.reduce(asked))
        on_host = np.stack(words) if words else np.zeros((1, -(-self._facts.vocab_size // 32)), dtype=np.uint32)
        return StepMasks(self._to_device(on_host.view(np.int32)), self._to_device(mask_rows))

    def _to_device(self, array: npt.NDArray[np.int32]) -> torch.Tensor:
        host = torch.from_numpy(array)
        if self._device.type == "cuda":
            host = host.pin_memory()
        return host.to(self._device, non_blocking=True)
