"""The CUDA worker's parts on a CPU: its kernels run under Triton's interpreter, its runner without streams."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from stepwire_kernels import latent_kv, rope_kv

from tests.unit.kernels.checks import repair_interpreter

repair_interpreter()


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long for a program of one token as for one of sixteen, and buckets have many tokens.

    The kernels' own tests have programs of one.
    """
    for module in (rope_kv, latent_kv):
        monkeypatch.setattr(module, "tokens_per_program", lambda num_tokens: 16)
