from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY_ROOT


@pytest.mark.parametrize(
    ("kind", "cases"),
    [("9.0", "few"), *(pytest.param(kind, "all", marks=pytest.mark.slow) for kind in ("9.0", "8.0"))],
)
def test_it_compiles_with_operands_where_products_take_them(kind: str, cases: str) -> None:
    """`assert_trivial` in the kernel: what crosses threads on its way into a product is an error."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run(
        [sys.executable, "-m", "tests.unit.kernels.compile_in_flight", kind, cases],
        env=environment | {"TRITON_CACHE_DIR": str(REPOSITORY_ROOT / ".stepwire" / "compiled")},
        cwd=REPOSITORY_ROOT,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    launches = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]
    assert [launch for launch in launches if launch["error"] is not None] == []
    in_flight = {launch["shared_memory"] >> 10 for launch in launches if launch["kernel"] == "_in_flight_kernel"}
    # Of several tokens with room in which inputs change threads.
    assert in_flight == ({96} if cases == "few" else {96, 64 + 8, 64 + 4})
