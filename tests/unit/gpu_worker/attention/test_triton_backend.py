"""Which kernels the Triton backend computes a step with, and that it is the same step either way."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from stepwire_kernels.step_input import StepInput, allocate_step_input

from gpu_worker.attention.api import AttentionSpec
from gpu_worker.attention.triton_backend import AttentionLimits, DeviceStep, TritonAttention
from gpu_worker.layers.ops import AttentionHeads, StepPositions
from gpu_worker.layers.rope import RotaryTables
from tests.unit.kernels.checks import assert_close, repair_interpreter
from tests.unit.kernels.test_rope_kv import tables

repair_interpreter()

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK_SIZE, HEAD_DIM = 16, 64
WINDOWS = (None, 40)
LENS = [70, 1, 33, 16, 129, 64, 50]


@dataclass
class Decodes:
    """One token of every row, and what is cached of the tokens before it."""

    num_heads: int
    num_kv_heads: int
    lens: list[int]

    def __post_init__(self) -> None:
        per_row = -(-max(self.lens) // BLOCK_SIZE)
        num_rows = len(self.lens)
        order = torch.randperm(num_rows * per_row) + 1
        self.block_tables = order.view(num_rows, per_row).int().to(DEVICE)
        shape = (2, num_rows * per_row + 1, self.num_kv_heads, BLOCK_SIZE, HEAD_DIM)
        self.caches = [torch.randn(shape, device=DEVICE) for _ in WINDOWS]
        width = (self.num_heads + 2 * self.num_kv_heads) * HEAD_DIM
        self.qkv = torch.randn(num_rows, width, device=DEVICE)

    def inputs(self) -> StepInput:
        num_rows = len(self.lens)
        inputs = allocate_step_input(num_rows, num_rows, DEVICE)
        lens = torch.tensor(self.lens, dtype=torch.int32, device=DEVICE)
        inputs.kv_lens.copy_(lens)
        inputs.positions.copy_(lens - 1)
        inputs.query_starts.copy_(torch.arange(num_rows + 1))
        inputs.run_rows.copy_(torch.arange(num_rows))
        blocks = self.block_tables[torch.arange(num_rows), (lens - 1) // BLOCK_SIZE]
        inputs.slots.copy_(blocks * BLOCK_SIZE + (lens - 1) % BLOCK_SIZE)
        return inputs

    def attend(self, *, has_prefills: bool = False, deterministic: bool = False) -> tuple[list[torch.Tensor], bool]:
        """Every layer's result, and whether it came straight from the projection, which is then left as it was."""
        spec = AttentionSpec(self.num_heads, self.num_kv_heads, HEAD_DIM, HEAD_DIM**-0.5, WINDOWS)
        num_rows = len(self.lens)
        attention = TritonAttention(
            spec, self.caches, AttentionLimits(num_rows, num_rows, 1), pdl=False, deterministic=deterministic
        )
        inputs = self.inputs()
        attention.plan(DeviceStep(inputs, self.block_tables, has_decodes=True, has_prefills=has_prefills))
        cos, sin = tables(max(self.lens), HEAD_DIM, DEVICE)
        positions = StepPositions(RotaryTables(cos, sin), inputs.positions, None)
        results, unchanged = [], []
        for layer in range(len(WINDOWS)):
            qkv = self.qkv.clone()
            heads = AttentionHeads(layer, self.num_heads, self.num_kv_heads, HEAD_DIM)
            results.append(attention.attend(qkv, heads, positions))
            unchanged.append(torch.equal(qkv, self.qkv))
        assert len(set(unchanged)) == 1
        return results, unchanged[0]


@pytest.mark.parametrize(
    ("num_rows", "num_kv_heads"),
    [(3, 4), (7, 1), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((3, 1), (7, 4)))],
)
def test_decodes_alone_come_straight_from_the_projection(num_rows: int, num_kv_heads: int) -> None:
    step = Decodes(4, num_kv_heads, LENS[:num_rows])
    results, straight = step.attend()
    assert straight
    caches = [cache.clone() for cache in step.caches]
    beside_prefills, straight = step.attend(has_prefills=True)
    assert not straight
    for result, other in zip(results, beside_prefills, strict=True):
        assert_close(result, other)
    for cache, other in zip(caches, step.caches, strict=True):
        assert_close(cache, other)


def test_a_deterministic_server_has_one_kernel_for_every_step() -> None:
    step = Decodes(4, 2, LENS)
    results, straight = step.attend(deterministic=True)
    assert not straight
    alone = Decodes(4, 2, LENS[-1:])
    alone.caches, alone.block_tables, alone.qkv = step.caches, step.block_tables[-1:], step.qkv[-1:]
    for result, other in zip(results, alone.attend(deterministic=True)[0], strict=True):
        assert torch.equal(result[-1:], other)


def test_groups_that_do_not_fit_are_computed_apart() -> None:
    assert Decodes(8, 1, LENS[:2]).attend()[1]
    assert not Decodes(9, 1, LENS[:2]).attend()[1]
