"""Results are JSON lines: one measurement a line, with everything that is needed to repeat it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from load_tests.machine import git_facts, machine_facts, version_facts

REPOSITORY_ROOT = Path(__file__).resolve().parents[1]
RESULTS_DIRECTORY = REPOSITORY_ROOT / "load_tests" / "results"
_SECRET_FLAGS = ("--api-key",)


def measurement_facts(module: str, argv: Sequence[str]) -> dict[str, Any]:
    """What every line begins with. Taken before the measurement: the load average is the machine's own then."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(module, argv, os.environ),
        "git": git_facts(),
        "machine": machine_facts(),
        "versions": version_facts(),
    }


def command_line(module: str, argv: Sequence[str], environment: Mapping[str, str]) -> str:
    """The command as it can be pasted, but for keys: with the settings that its servers take from the environment."""
    settings = [
        f"{name}={'...' if 'KEY' in name else shlex.quote(value)}"
        for name, value in sorted(environment.items())
        if name.startswith("STEPWIRE_")
    ]
    shown: list[str] = []
    hide = False
    for word in argv:
        flag, equals, _ = word.partition("=")
        if hide:
            shown.append("...")
            hide = False
        elif flag in _SECRET_FLAGS and equals:
            shown.append(f"{flag}=...")
        else:
            shown.append(word)
            hide = word in _SECRET_FLAGS
    # Commands are given from the clone's root: where that stands is nobody's business.
    command = shlex.join(["python", "-m", module, *shown]).replace(f"{REPOSITORY_ROOT}/", "")
    return " ".join([*settings, command])


def append_result(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(orjson.dumps(result) + b"\n")


def read_results(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """All lines of all files, oldest first. Raises ValueError with file and line number on one that is damaged."""
    results = []
    for path in paths:
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            if not line.strip():
                continue
            try:
                results.append(orjson.loads(line))
            except orjson.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not a JSON line ({error}); remove the line") from error
    yield from sorted(results, key=lambda result: str(result.get("date", "")))
