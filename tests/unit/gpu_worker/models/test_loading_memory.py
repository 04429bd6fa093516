"""Host memory while a real model is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_worker.device import cpu_computes_bfloat16
from tests.unit.gpu_worker.models import loading_memory

ROOT = Path(__file__).resolve().parents[4]
# SmolLM2's embedding as the head multiplies it.
LARGEST_TENSOR = 49152 * 576 * (2 if cpu_computes_bfloat16() else 4)
# Tables of the rotation, small tensors, the interpreter's own, and what the allocator keeps of packed tensors.
OVERHEAD = 64 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_peaks_at_the_model_and_about_one_tensor(smollm2_dir: Path) -> None:
    output = subprocess.run(
        [sys.executable, "-m", loading_memory.__name__, str(smollm2_dir)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "proto", "kernels"))},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    memory = json.loads(output.splitlines()[-1])
    assert memory["weights"] > 250 << 20
    assert memory["peak"] <= memory["weights"] + LARGEST_TENSOR + OVERHEAD
    assert memory["after"] <= memory["weights"] + OVERHEAD
