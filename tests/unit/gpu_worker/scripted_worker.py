"""A worker process whose runner does as the steps tell it: `new_block_ids` of a step's first run are its orders.

With `--seed 1` it is loading until there is a file `loaded` beside its socket. What the runner is asked to do is
logged, in order, so that a test can see what reached it and on which thread.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import structlog
from stepwire.process.logs import set_up_logging

from gpu_worker.config import parse_settings
from gpu_worker.runner_api import SessionEnded, StepBatch, StepError, StepResult, TokenMask, WorkerFacts
from gpu_worker.server import WorkerServer
from gpu_worker.simulated import SimulationSpec
from tests.unit.gpu_worker.step_builder import uint32

logger = structlog.get_logger("runner")
process_logger = structlog.get_logger("process")

REFUSE = 1
END_SESSION = 2
FAIL_EXECUTE = 3
FAIL_RESULT = 4
# A launched step of this kind has its result when the next step is executed.
UNTIL_NEXT = 5
SLOW_EXECUTE = 6
FAIL_RESET = 7
# And one of this kind after a second.
LATE_RESULT = 8
# While a step of this kind is under way another part of the runner is lost; its result comes once it was given up.
LOSE_A_PART = 9


class ScriptedStep:
    def __init__(self, batch: StepBatch, order: int, may_end: threading.Event, lose: Callable[[], None]) -> None:
        self._batch, self._order, self._may_end, self._lose = batch, order, may_end, lose

    def result(self) -> StepResult:
        step_id = self._batch.step_id
        if self._order == LOSE_A_PART:
            threading.Thread(target=self._lose).start()
        in_time = self._may_end.wait(60.0)
        if self._order == LATE_RESULT:
            time.sleep(1.0)
        logger.info(f"result {step_id}", thread=threading.current_thread().name, in_time=in_time)
        if self._order == FAIL_RESULT:
            raise ZeroDivisionError("the device is lost")
        return StepResult(step_id=step_id, rows=uint32(), offsets=uint32([0]), token_ids=uint32())


class ScriptedRunner:
    def __init__(self) -> None:
        self._last_may_end = threading.Event()
        self._fail_reset = False
        self._given_up = threading.Event()
        self._on_failure: Callable[[Exception], None] = lambda error: None

    def watch(self, on_failure: Callable[[Exception], None], on_leaving: Callable[[str], None]) -> None:
        self._on_failure = on_failure

    def abandon(self) -> None:
        logger.info("abandon")
        self._given_up.set()

    def describe(self) -> WorkerFacts:
        return SimulationSpec(vocab_size=64).facts()

    def execute(self, batch: StepBatch, wait_for_mask: Callable[[], TokenMask]) -> ScriptedStep:
        order = int(batch.new_block_ids[0]) if len(batch.new_block_ids) else 0
        logger.info(f"execute {batch.step_id}", thread=threading.current_thread().name, order=order)
        self._last_may_end.set()
        if order == REFUSE:
            raise StepError("not such a step")
        if order == END_SESSION:
            raise SessionEnded("enough for today")
        if order == FAIL_EXECUTE:
            raise ZeroDivisionError("a kernel failed")
        if order == SLOW_EXECUTE:
            time.sleep(0.5)
        self._fail_reset = order == FAIL_RESET
        if len(batch.mask_rows):
            mask = wait_for_mask()
            logger.info(f"mask {batch.step_id}", rows=mask.rows.tolist(), words=mask.bitmask.tolist())
        self._last_may_end = threading.Event()
        if order == LOSE_A_PART:
            self._last_may_end = self._given_up
        elif order != UNTIL_NEXT:
            self._last_may_end.set()
        return ScriptedStep(
            batch, order, self._last_may_end, lambda: self._on_failure(ZeroDivisionError("rank 1 ended"))
        )

    def reset(self) -> None:
        logger.info("reset", thread=threading.current_thread().name)
        if self._fail_reset:
            raise ZeroDivisionError("nothing is left to reset")

    def close(self) -> None:
        logger.info("close", thread=threading.current_thread().name)


def main() -> int:
    settings = parse_settings(sys.argv[1:])
    set_up_logging(settings)
    server = WorkerServer(settings.listen, shutdown_grace_s=settings.shutdown_grace_s)
    address = server.start()
    process_logger.info("loading")
    while settings.seed and not Path(address.removeprefix("unix:")).with_name("loaded").exists():
        time.sleep(0.02)
    return server.serve(ScriptedRunner(), lambda facts: process_logger.info("worker ready", listen=address))


if __name__ == "__main__":
    sys.exit(main())
