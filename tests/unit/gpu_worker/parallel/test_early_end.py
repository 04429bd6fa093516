"""The end of a group that still forms, while the main thread feels the ranks go."""

from __future__ import annotations

import subprocess
import sys

import pytest

LIMIT_S = 60.0
PROGRAM = """
import threading
from gpu_worker.parallel.early_end import EarlyEnd
from gpu_worker.parallel.group_watch import GroupWatch
from gpu_worker.parallel.layout import GroupLayout

class OtherRanks:
    def __init__(self):
        self.are_ending = threading.Event()
    def close(self, grace_s):
        self.are_ending.set()
        threading.Event().wait(0.5)

others, watch = OtherRanks(), GroupWatch(GroupLayout(2, (1,)))
with EarlyEnd([others], watch) as early_end:
    threading.Thread(target=early_end.end, args=["told to"]).start()
    others.are_ending.wait()
    {felt}
"""


@pytest.mark.parametrize("felt", ["raise OSError('a connection broke')", "watch.fail('rank 1 is gone')", "pass"])
def test_what_is_felt_of_ranks_that_are_ended_is_no_failure(felt: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(felt=felt)], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert ended.returncode == 0 and "told to" in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr and "rank 1 is gone" not in ended.stderr
