"""`stepwire replay FILE` (`python -m gpu_worker.replay`): recorded steps through a worker again, by its own server."""

from __future__ import annotations

import sys
import tempfile
import threading
from pathlib import Path

import structlog
from stepwire.process.logs import set_up_logging

from gpu_worker.__main__ import load_runner
from gpu_worker.errors import LoadError
from gpu_worker.recording import RecordingError
from gpu_worker.replay.comparison import Comparison
from gpu_worker.replay.player import play
from gpu_worker.replay.settings import ReplaySettings, parse_replay
from gpu_worker.runner_api import Runner, UsesPauses, WorkerFacts
from gpu_worker.server import WorkerServer

logger = structlog.get_logger("replay")


class Replay:
    """One run of a recording: a server on a socket of its own, and the client that plays the file to it."""

    def __init__(self, path: Path, settings: ReplaySettings) -> None:
        self._path, self._settings = path, settings
        self.comparison: Comparison | None = None
        self.error: LoadError | None = None

    def run(self, runner: Runner) -> int:
        """The server's exit code; steps are executed on this thread."""
        with tempfile.TemporaryDirectory(prefix="stepwire-replay-") as directory:
            address = f"unix:{directory}/worker.sock"
            server = WorkerServer(address, hang_limit_s=self._settings.hang_limit_s)
            server.start()
            player = threading.Thread(target=self._play, args=(address, server), name="player", daemon=True)

            def on_ready(facts: WorkerFacts) -> None:
                if self._settings.profile and isinstance(runner, UsesPauses):
                    # Steps are timed as they run once everything is prepared: every shape has its graph.
                    while runner.idle():
                        pass
                player.start()

            code = server.serve(runner, on_ready)
            server.outlive()
            player.join(1.0)
            return code

    def _play(self, address: str, server: WorkerServer) -> None:
        try:
            self.comparison = play(self._path, address)
        except LoadError as error:
            self.error = error
        finally:
            server.shut_down("the replay is over")


def main(argv: list[str]) -> int:
    try:
        path, settings = parse_replay(argv)
    except RecordingError as error:
        print(f"stepwire replay: {error}", file=sys.stderr)
        return 1
    set_up_logging(settings)
    try:
        runner = load_runner(settings)
    except (LoadError, ValueError, OSError) as error:
        print(f"stepwire replay: {error}", file=sys.stderr)
        return 1
    replay = Replay(path, settings)
    if settings.profile:
        return _run_profiled(replay, runner, settings)
    return _finish(replay, replay.run(runner))


def _run_profiled(replay: Replay, runner: Runner, settings: ReplaySettings) -> int:
    # torch comes with it, which the simulated runner does without.
    from gpu_worker.replay.profile import ProfiledRunner, summarize, to_json, to_table

    profiled = ProfiledRunner(runner, settings.trace)
    code = replay.run(profiled)
    summary = summarize(profiled.read_steps(), profiled.classes, profiled.num_tokens)
    if replay.comparison is None or not settings.json_output:
        if replay.comparison is not None:
            print(to_table(summary), end="\n\n")
        return _finish(replay, code)
    print(to_json(summary, replay.comparison.summary()))
    return 1 if replay.comparison.difference is not None else code


def _finish(replay: Replay, code: int) -> int:
    """Say how it went; the exit code."""
    if replay.error is not None:
        print(f"stepwire replay: {replay.error}", file=sys.stderr)
        return 1
    if replay.comparison is None:
        return code or 1
    print(replay.comparison.summary())
    return 1 if replay.comparison.difference is not None else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
