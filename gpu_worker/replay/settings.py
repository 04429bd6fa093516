"""Settings of `stepwire replay FILE`: a worker's, with what the recording says filled in."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import Field, model_validator
from stepwire.process import settings as process_settings
from stepwire.v1.recording_pb2 import RecordingHeader

from gpu_worker.config import WorkerSettings
from gpu_worker.recording import read_recording, recorded_flags

PROGRAM = "stepwire replay FILE"


class ReplaySettings(WorkerSettings):
    """Runs the steps of a recording through a worker again, without a control plane, and compares the tokens.

    FILE comes first: what `--record FILE` of a worker or of `stepwire serve` has written. Exit code 1 if a token
    differs. The worker's settings are those of the recording; flags here win over them.
    """

    program: ClassVar[str] = PROGRAM

    profile: bool = Field(False, description="print where the steps' time went, by class of step")
    json_output: bool = Field(False, alias="json", description="with profile: JSON on standard output, for scripts")
    trace: Path | None = Field(None, description="write the profile's timeline to this file, for chrome://tracing")

    @model_validator(mode="after")
    def _check_output(self) -> ReplaySettings:
        if (self.json_output or self.trace is not None) and not self.profile:
            raise ValueError("--json and --trace are of the profile: give --profile too")
        if self.record is not None:
            raise ValueError("--record: a replay is not recorded: leave it out")
        return self


def parse_replay(argv: Sequence[str]) -> tuple[Path, ReplaySettings]:
    """The recording and the settings; a mistake ends with exit code 2. Raises `RecordingError`."""
    if not argv or argv[0].startswith("-"):
        if any(word in ("--help", "-h") for word in argv):
            process_settings.parse_settings(ReplaySettings, ["--help"])
        print(f"{PROGRAM}: the recording comes first: stepwire replay FILE [flags]", file=sys.stderr)
        raise SystemExit(2)
    path, given = Path(argv[0]), list(argv[1:])
    header = read_header(path)
    # Flags win over variables, and what was recorded holds whatever the variables say here.
    flags = recorded_flags(header.flags, given)
    return path, process_settings.parse_settings(ReplaySettings, [*flags, *given])


def read_header(path: Path) -> RecordingHeader:
    """The first header of a recording. Raises `RecordingError`."""
    return next(iter(read_recording(path))).header
