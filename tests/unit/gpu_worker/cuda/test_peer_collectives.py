"""What ranks read of each other stays until they have read it: see gathering_ranks.py."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.unit.gpu_worker.cuda import gathering_ranks


def test_what_was_gathered_stays_until_it_was_read() -> None:
    command = [sys.executable, "-m", gathering_ranks.__name__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {line["rank"]: line["read"] for line in map(json.loads, done.stdout.splitlines())}
    expected = [[[10.0 * round_, 10.0 * round_ + 1]] * gathering_ranks.ROWS for round_ in range(3)]
    assert found == {0: expected, 1: expected}
