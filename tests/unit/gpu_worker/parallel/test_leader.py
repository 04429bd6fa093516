"""What the first rank refuses before it starts any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config

from gpu_worker.config import WorkerSettings
from gpu_worker.model_spec import ModelConfigError
from gpu_worker.models.loader import read_spec
from gpu_worker.parallel.leader import check_split, layout_for
from tests.unit.gpu_worker.models.tiny_checkpoints import Tiny, save_model, save_tiny


def check(directory: Path, **changes: Any) -> None:
    settings = WorkerSettings(model=directory, device="cpu", tensor_parallel_size=2, **changes)
    check_split(settings, directory, layout_for(settings, read_spec(directory)[0]))


@pytest.mark.parametrize(
    ("changes", "words"), [({"deterministic": True}, "--deterministic"), ({"task": "embed"}, "pooling")], ids=str
)
def test_what_works_on_one_rank_only_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    check(tmp_path)
    with pytest.raises(ModelConfigError, match=f"{words} works on one rank only: leave out --tensor-parallel-size"):
        check(tmp_path, **changes)


def test_so_are_models_of_transformers_own_code(tmp_path: Path) -> None:
    save_model(Tiny(GPT2Config, {}), tmp_path)
    with pytest.raises(ModelConfigError, match="transformers' own code works on one rank only"):
        check(tmp_path)
