"""Threads of a team: work is done whether helpers come or not, and they end with it. Without numba: torch."""

from __future__ import annotations

import gc
import importlib.metadata
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from gpu_worker.cpu import choice, compiling
from gpu_worker.cpu.choice import choose_team, prepare_kernels
from gpu_worker.cpu.compiling import CompiledKernels
from gpu_worker.cpu.ops import CpuOps
from gpu_worker.cpu.team import Team
from gpu_worker.device import cpu_computes_bfloat16
from gpu_worker.model_spec import ModelConfigError

WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None
sys.modules["llvmlite"] = None
sys.path[:0] = {paths!r}
import importlib.util
import torch
find_spec = importlib.util.find_spec
import gpu_worker.cpu.compiling as compiling
compiling.find_spec = lambda name: None if name in ("numba", "llvmlite") else find_spec(name)
import gpu_worker.runner
from gpu_worker.cpu.choice import choose_team
from gpu_worker.cpu import choice
choice.cpu_computes_bfloat16 = lambda: False
assert choose_team("auto", torch.device("cpu"), torch.bfloat16) is None
try:
    choose_team("on", torch.device("cpu"), torch.bfloat16)
except Exception as error:
    print(error)
"""


def helpers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("cpu-helper")]


def test_many_jobs_in_a_row_and_with_pauses(kernels: CompiledKernels) -> None:
    """Helpers that watch, that have gone to sleep and that are woken: every product is whole."""
    ops = CpuOps(Team(kernels, 4), attends=False)
    x, weight = torch.randn(5, 96).bfloat16(), torch.randn(2000, 96).bfloat16()
    expected = ops.linear(x, weight, None)
    for turn in range(300):
        if turn % 50 == 0:
            time.sleep(0.01)
        assert torch.equal(ops.linear(x, weight, None), expected)


def test_helpers_end_with_their_team(kernels: CompiledKernels) -> None:
    before = set(helpers())
    team = Team(kernels, 3)
    CpuOps(team, attends=False).linear(torch.ones(1, 8).bfloat16(), torch.ones(4, 8).bfloat16(), None)
    own = [thread for thread in helpers() if thread not in before]
    assert len(own) == 2
    del team
    gc.collect()
    for thread in own:
        thread.join(120)
        assert not thread.is_alive()


def test_without_numba_torch_serves_and_on_says_what_to_install() -> None:
    root = Path(__file__).resolve().parents[4]
    script = WITHOUT_NUMBA.format(paths=[str(root), str(root / "proto"), str(root / "kernels")])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    assert "pip install numba" in done.stdout.splitlines()[-1]
    assert "bfloat16 is slow on this CPU without compiled kernels" in done.stdout + done.stderr


def test_only_bfloat16_on_a_cpu_has_kernels() -> None:
    cpu = torch.device("cpu")
    assert choose_team("auto", cpu, torch.float32) is None
    assert choose_team("off", cpu, torch.bfloat16) is None
    assert (choose_team("auto", cpu, torch.bfloat16) is None) == cpu_computes_bfloat16()
    with pytest.raises(ModelConfigError, match="--dtype bfloat16"):
        choose_team("on", cpu, torch.float32)


def test_kernels_are_compiled_where_nothing_can_be_kept(tmp_path: Path, kernels: CompiledKernels) -> None:
    """A file in the directory's place: root may write to directories that say no."""
    from gpu_worker.cpu.compiling import _is_writable

    (tmp_path / "file").touch()
    assert not _is_writable(tmp_path / "file" / "kernels")
    assert _is_writable(tmp_path / "new" / "kernels")


def test_what_is_compiled_beforehand_is_not_compiled_again(
    tmp_path: Path, kernels: CompiledKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(choice, "cpu_computes_bfloat16", lambda: False)
    monkeypatch.setattr(choice, "load_kernels", lambda directory: said.append(f"compiled in {directory}"))
    prepare_kernels("auto", None, said.append)  # where the fixture has them from
    prepare_kernels("off", tmp_path, said.append)
    assert said == []
    prepare_kernels("auto", tmp_path, said.append)
    assert "about 20 s" in said[0] and said[1:] == [f"compiled in {tmp_path}"]
    monkeypatch.setattr(choice, "cpu_computes_bfloat16", lambda: True)
    prepare_kernels("auto", tmp_path, said.append)
    assert len(said) == 2, "this CPU's workers would not take them"


def test_kernels_cut_off_while_they_were_written_are_not_taken_for_whole(tmp_path: Path) -> None:
    compiling._mark_complete(tmp_path / "missing")
    assert not compiling.are_kept(tmp_path)
    directory = tmp_path / compiling._digest(importlib.metadata.version("numba"))
    directory.mkdir()
    (directory / "multiply.nbi").touch()
    assert not compiling.are_kept(tmp_path)
    compiling._mark_complete(directory)
    assert compiling.are_kept(tmp_path)
