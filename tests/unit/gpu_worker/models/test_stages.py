"""Every family split over pipeline stages: one after the other they compute what the whole model does.

Stages of one process here; `tests/system/test_mixes_over_stages.py` and `test_parallel_serving.py` have processes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gpu_worker.attention.api import StepMetadata
from gpu_worker.models.loader import read_spec
from gpu_worker.parallel.shares import ParallelContext
from tests.unit.gpu_worker.models.tiny_checkpoints import TINY, save_tiny
from tests.unit.gpu_worker.quant.paged_model import QuantizedModel

TOKEN_IDS = [3, 141, 59, 26, 53, 58, 97, 93, 238, 46, 299, 0, 7, 8, 9, 10, 11, 12]
# Stored in one tensor what others store apart, a tied head, windows, latent attention, mixtures in some layers.
QUICK = ("phi3", "glm4", "gemma3", "deepseek-v3", "ernie-moe-some-layers")


@torch.inference_mode()
def logits_of(stages: list[QuantizedModel]) -> torch.Tensor:
    """[num_tokens, vocab_size]: a prefill of all but two tokens, then two decodes."""
    found = []
    for start, stop in ((0, 16), (16, 17), (17, 18)):
        count, positions = stop - start, np.arange(start, stop)
        received = None
        for stage in stages:
            stage.attention.plan(
                StepMetadata(int(count == 1), np.array([count]), np.array([stop]), stage.table, positions)
            )
            token_ids = torch.tensor(TOKEN_IDS[start:stop])
            hidden = stage.model.hidden_states(token_ids, torch.from_numpy(positions), stage.attention, received)
            received = None if stage is stages[-1] else hidden.added()
        found.append(stages[-1].model.logits(hidden))
    return torch.cat(found)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in TINY
        if not name.endswith("v4-config")
    ],
)
def test_stages_compute_what_one_rank_computes(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path)
    num_layers = read_spec(tmp_path)[0].num_layers
    parts = (1,) * num_layers if name != "glm5-shared-choices" else (2, 2)
    stages = [
        QuantizedModel(tmp_path, parallel=ParallelContext(stage=stage, stage_layers=parts))
        for stage in range(len(parts))
    ]
    torch.testing.assert_close(logits_of(stages), logits_of([QuantizedModel(tmp_path)]), atol=1e-5, rtol=1e-5)
