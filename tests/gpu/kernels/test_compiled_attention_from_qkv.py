"""The checks of tests/unit/kernels/test_attention_from_qkv.py, compiled, and programs that run beside each other."""

from __future__ import annotations

import pytest
import torch
from stepwire_kernels.attention_from_qkv import FromQkvTuning, from_qkv_policy
from stepwire_kernels.decode_list import build_decode_list
from stepwire_kernels.work_list import SharePolicy

from tests.unit.kernels.checks import assert_close
from tests.unit.kernels.test_attention_from_qkv import *  # noqa: F403
from tests.unit.kernels.test_attention_from_qkv import Step

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("warps", [1, 2])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(32, 8), (8, 1)])
def test_pieces_finish_in_any_order(device: str, num_heads: int, num_kv_heads: int, warps: int) -> None:
    lens = [1 + 97 * run % 2500 for run in range(96)]
    step = Step(lens, num_heads, num_kv_heads, 128, 64, torch.bfloat16, device)
    # As many as 32 pieces a run, of a few tiles each.
    tuning = FromQkvTuning(warp_tokens=16, num_warps=warps, num_stages=3)
    step.check(policy=SharePolicy(1500, 64, 64), tuning=tuning)
    work, workspace = step.plan(SharePolicy(1500, 64, 64), {})
    first = step.launch(work, workspace, tuning=tuning)
    for _ in range(100):
        assert torch.equal(step.launch(work, workspace, tuning=tuning), first)
    assert not workspace.counters.any()


@pytest.mark.parametrize("num_runs", [3, 8, 40, 128])
def test_one_graph_serves_steps_of_any_lengths(device: str, num_runs: int) -> None:
    longest = [1200 - 9 * run for run in range(num_runs)]
    step = Step(longest, 32, 8, 128, 64, torch.bfloat16, device)
    policy = from_qkv_policy(num_runs, 32, 8, 128)
    pdl = torch.cuda.get_device_capability() >= (9, 0)
    work, workspace = step.plan(policy, {})

    def layers() -> list[torch.Tensor]:
        case = step.case
        build_decode_list(case.query_starts, case.kv_lens, case.run_rows, work)
        # The list is finished when the first layer begins; the others may read it before theirs before has ended.
        return [step.launch(work, workspace, pdl=pdl and layer > 0) for layer in range(3)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layers()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = layers()
    for lens in (longest, [1 + 61 * run % length for run, length in enumerate(longest)], [5] * num_runs, longest):
        step.place(lens)
        expected = step.run(policy=policy)
        graph.replay()
        graph.replay()
        for output in outputs:
            assert_close(output, expected)
    assert not workspace.counters.any()
