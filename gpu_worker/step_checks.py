"""What can be wrong with a step before any row is looked at: lengths, ranges and repeated ids.

A step that fails is refused as a whole with a `StepError` that names the field and the numbers. What is wrong with a
single row's history, blocks or tokens is for the runner to say, as a `RowFault`.
"""

from __future__ import annotations

import math

import numpy as np

from gpu_worker.runner_api import RowAdd, RowSampling, StepBatch, StepError, UInt32Array, WorkerFacts


def num_mask_words(vocab_size: int) -> int:
    """Words of 32 bits that hold one bit a token."""
    return (vocab_size + 31) // 32


def check_step(batch: StepBatch, facts: WorkerFacts) -> None:
    """Raises `StepError` if the step is malformed or exceeds what the worker announced."""
    num_runs = len(batch.run_rows)
    for name in ("run_start_positions", "run_num_tokens", "run_samples", "run_num_new_blocks"):
        if len(getattr(batch, name)) != num_runs:
            raise StepError(f"{name} has {len(getattr(batch, name))} entries, and run_rows has {num_runs}")
    _check_rows(batch.drop_rows, "drop_rows", facts)
    _check_rows(batch.run_rows, "run_rows", facts)
    for index, add in enumerate(batch.adds):
        _check_add(add, index, facts)
    if len(batch.adds) > 1:
        _check_distinct(np.array([add.row for add in batch.adds], dtype=np.uint32), "add[].row")
    _check_blocks(batch)
    _check_tokens(batch, facts)
    if len(batch.mask_rows):
        _check_mask_rows(batch, facts)


def _check_rows(rows: UInt32Array, name: str, facts: WorkerFacts) -> None:
    if len(rows) == 0:
        return
    if rows.max() >= facts.max_num_seqs:
        index = int(np.argmax(rows))
        raise StepError(f"{name}[{index}] is {rows[index]}: rows are below max_num_seqs {facts.max_num_seqs}")
    _check_distinct(rows, name)


def _check_distinct(rows: UInt32Array, name: str) -> None:
    counts = np.bincount(rows)
    if counts.max() > 1:
        raise StepError(f"{name} holds row {int(np.argmax(counts))} {counts.max()} times: once is possible")


def _check_blocks(batch: StepBatch) -> None:
    num_new_blocks = int(batch.run_num_new_blocks.sum(dtype=np.uint64))
    if num_new_blocks != len(batch.new_block_ids):
        raise StepError(
            f"run_num_new_blocks sums to {num_new_blocks}, but new_block_ids has {len(batch.new_block_ids)}"
        )


def _check_tokens(batch: StepBatch, facts: WorkerFacts) -> None:
    if len(batch.run_rows) == 0:
        if batch.bucket != 0:
            raise StepError(f"bucket is {batch.bucket} in a step without runs: it must be 0")
        return
    if not batch.run_num_tokens.all():
        index = int(np.argmin(batch.run_num_tokens))
        raise StepError(f"run_num_tokens[{index}] is 0 (row {batch.run_rows[index]}): a run has at least one token")
    num_tokens = int(batch.run_num_tokens.sum(dtype=np.uint64))
    if num_tokens > facts.max_num_batched_tokens:
        raise StepError(
            f"run_num_tokens sums to {num_tokens}, more than max_num_batched_tokens {facts.max_num_batched_tokens}"
        )
    if not facts.buckets:
        if batch.bucket != 0:
            raise StepError(f"bucket is {batch.bucket}, but this worker announced no buckets: it must be 0")
    elif batch.bucket not in facts.buckets:
        raise StepError(f"bucket {batch.bucket} is not one of the announced {list(facts.buckets)}")
    elif batch.bucket < num_tokens:
        raise StepError(f"bucket {batch.bucket} is smaller than the step's {num_tokens} tokens")


def _check_mask_rows(batch: StepBatch, facts: WorkerFacts) -> None:
    if not facts.can_mask_tokens:
        raise StepError("mask_rows is not empty, but this worker did not announce CAPABILITY_TOKEN_MASK")
    _check_rows(batch.mask_rows, "mask_rows", facts)
    stray = ~np.isin(batch.mask_rows, batch.run_rows[batch.run_samples])
    if stray.any():
        raise StepError(f"mask_rows holds row {batch.mask_rows[stray][0]}, which does not sample in this step")


def _check_add(add: RowAdd, index: int, facts: WorkerFacts) -> None:
    name = f"add[{index}] (row {add.row})"
    num_tokens, num_computed = len(add.token_ids), add.num_computed_tokens
    if add.row >= facts.max_num_seqs:
        raise StepError(f"add[{index}].row is {add.row}: rows are below max_num_seqs {facts.max_num_seqs}")
    if not 1 <= num_tokens <= facts.max_model_len:
        raise StepError(
            f"{name}.token_ids has {num_tokens} tokens: 1 to max_model_len {facts.max_model_len} are possible"
        )
    if not 1 <= add.num_prompt_tokens <= num_tokens:
        raise StepError(
            f"{name}.num_prompt_tokens is {add.num_prompt_tokens}: 1 to all {num_tokens} tokens are possible"
        )
    if num_computed >= num_tokens:
        raise StepError(f"{name}.num_computed_tokens is {num_computed}: it must be less than the {num_tokens} tokens")
    if num_computed % facts.block_size:
        raise StepError(
            f"{name}.num_computed_tokens is {num_computed}: it must be a multiple of block_size {facts.block_size}"
        )
    max_num_blocks = -(-facts.max_model_len // facts.block_size)
    if len(add.block_ids) > max_num_blocks:
        raise StepError(
            f"{name}.block_ids has {len(add.block_ids)} blocks: max_model_len needs {max_num_blocks} at most"
        )
    _check_sampling(add.sampling, f"{name}.sampling", facts)


def _check_sampling(sampling: RowSampling, name: str, facts: WorkerFacts) -> None:
    # Written so that NaN is refused: every comparison with it is false.
    if not 0 <= sampling.temperature < math.inf:
        raise StepError(f"{name}.temperature is {sampling.temperature}: it must be 0 or more")
    if not 0 < sampling.top_p <= 1:
        raise StepError(f"{name}.top_p is {sampling.top_p}: it must be above 0 and at most 1 (1 keeps all)")
    if not 0 <= sampling.min_p <= 1:
        raise StepError(f"{name}.min_p is {sampling.min_p}: it must be from 0 to 1 (0 keeps all)")
    if not 0 < sampling.repetition_penalty < math.inf:
        raise StepError(f"{name}.repetition_penalty is {sampling.repetition_penalty}: it must be above 0 (1 is none)")
    for field in ("presence_penalty", "frequency_penalty"):
        if not math.isfinite(getattr(sampling, field)):
            raise StepError(f"{name}.{field} is {getattr(sampling, field)}: it must be finite")
    for field in ("bias_token_ids", "suppressed_token_ids", "allowed_token_ids"):
        token_ids: UInt32Array = getattr(sampling, field)
        if len(token_ids) and token_ids.max() >= facts.vocab_size:
            raise StepError(
                f"{name}.{field} holds token {token_ids.max()}: tokens are below vocab_size {facts.vocab_size}"
            )
    if len(sampling.bias_values) != len(sampling.bias_token_ids):
        counts = f"{len(sampling.bias_values)} entries, and bias_token_ids has {len(sampling.bias_token_ids)}"
        raise StepError(f"{name}.bias_values has {counts}")
    wrong = ~(sampling.bias_values < np.inf)
    if wrong.any():
        index = int(np.argmax(wrong))
        raise StepError(
            f"{name}.bias_values[{index}] is {sampling.bias_values[index]}: it must be a number below infinity"
        )
