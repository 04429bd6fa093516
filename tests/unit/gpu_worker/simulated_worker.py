"""What the tests of the simulated worker share: its size, and a step's answer."""

from __future__ import annotations

from gpu_worker.runner_api import RowFaultCode, StepBatch, StepResult, TokenMask
from gpu_worker.simulated import SimulatedRunner, SimulationSpec

SPEC = SimulationSpec(
    num_blocks=64,
    block_size=4,
    max_num_seqs=8,
    max_model_len=64,
    max_num_batched_tokens=64,
    vocab_size=100,
)
U64 = 2**64


def no_mask() -> TokenMask:
    raise AssertionError("no row of this step waits for a mask")


def execute(runner: SimulatedRunner, batch: StepBatch, mask: TokenMask | None = None) -> StepResult:
    return runner.execute(batch, no_mask if mask is None else lambda: mask).result()


def tokens_of(result: StepResult) -> dict[int, int]:
    assert result.offsets.tolist() == list(range(len(result.rows) + 1))
    return dict(zip(result.rows.tolist(), result.token_ids.tolist(), strict=True))


def faults_of(result: StepResult) -> list[tuple[int, RowFaultCode, str]]:
    assert not {fault.row for fault in result.faults} & set(result.rows.tolist())
    return [(fault.row, fault.code, fault.message) for fault in result.faults]
