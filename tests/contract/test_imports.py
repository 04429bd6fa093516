"""Who may import whom, and that the planes without torch really are without it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

_IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
package = importlib.import_module({package!r})
for module in pkgutil.walk_packages(package.__path__, {package!r} + "."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
found = sorted({{"torch", "triton", "transformers"}} & sys.modules.keys())
sys.exit("imports " + ", ".join(found) if found else 0)
"""


# Of the two planes test_docker.py shows more in every run: they are imported where torch is not installed.
@pytest.mark.parametrize(
    "package", [pytest.param(plane, marks=pytest.mark.slow) for plane in ("gateway", "control_plane")] + ["stepwire"]
)
def test_runs_without_torch(package: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _IMPORT_EVERYTHING.format(package=package)], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_the_worker_server_and_the_simulated_runner_run_without_torch() -> None:
    code = (
        "import sys, gpu_worker.server, gpu_worker.simulated, gpu_worker.config; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_import_contracts() -> None:
    run = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-logo"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
