"""One child of `DriverProcesses`: JSON lines in, JSON lines out. The end of its input ends it."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import asdict
from typing import Any

import orjson
import uvloop

from load_tests.driver import InProcessDriver
from load_tests.target import TargetError, TargetSpec
from load_tests.workload import Phase, RequestSpec


async def _serve() -> None:
    driver: InProcessDriver | None = None
    phase = Phase("", [])
    encoded: list[Any] = []
    while line := await asyncio.to_thread(sys.stdin.buffer.readline):
        question = orjson.loads(line)
        try:
            if "target" in question:
                driver = await InProcessDriver(TargetSpec(**question["target"])).__aenter__()
                _answer({"connected": True})
            elif driver is None:
                raise TargetError("the first line must name the target")
            elif "facts" in question:
                _answer({"facts": asdict(await driver.facts())})
            elif "phase" in question:
                phase = _read_phase(question["phase"])
                encoded = driver.encode(phase)
                _answer({"encoded": len(encoded)})
            else:
                result = await driver.run_encoded(phase, encoded, question["start_s"], question["timeout_s"])
                records = [record.to_json() for record in result.records]
                _answer({"records": records, "wall_s": result.wall_s, "cpu_s": result.driver_cpu_s})
        except TargetError as error:
            _answer({"failed": str(error)})
    if driver is not None:
        await driver.__aexit__()


def _read_phase(data: dict[str, Any]) -> Phase:
    return Phase(data["name"], [RequestSpec(**request) for request in data["requests"]], data["max_concurrency"])


def _answer(answer: dict[str, Any]) -> None:
    sys.stdout.buffer.write(orjson.dumps(answer) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    uvloop.run(_serve())
