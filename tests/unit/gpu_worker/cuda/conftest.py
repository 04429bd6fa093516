"""The CUDA worker's parts on a CPU: its kernels run under Triton's interpreter, its runner without streams."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from stepwire_kernels import attention_decode, attention_from_qkv, attention_latent, latent_kv, rope_kv

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
    # Attention as for a device of few multiprocessors: of the programs of 132 nearly all would have nothing to do.
    for module in (attention_decode, attention_latent):
        monkeypatch.setattr(module, "SHARED_MULTIPROCESSORS", 4)
    for name in ("FEW_WANTED_PROGRAMS", "MANY_WANTED_PROGRAMS"):
        monkeypatch.setattr(attention_from_qkv, name, 48)
