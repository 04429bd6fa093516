"""`python -m gpu_worker`: one worker process, from its flags to its exit code."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

import structlog
from stepwire.process.logs import set_up_logging
from stepwire.process.parent import end_with_parent
from stepwire.process.tls import TlsFileError, server_credentials

from gpu_worker.config import PROGRAM, WorkerSettings, parse_settings
from gpu_worker.errors import LoadError
from gpu_worker.listen import ListenError
from gpu_worker.recording import Recorder, RecordingError
from gpu_worker.runner_api import Runner, WorkerFacts
from gpu_worker.server import WorkerServer

logger = structlog.get_logger("gpu_worker")


def main(argv: list[str]) -> int:
    started_s = time.monotonic()
    settings = parse_settings(argv)
    set_up_logging(settings)
    signal.signal(signal.SIGTERM, _exit_while_loading)
    signal.signal(signal.SIGINT, _exit_while_loading)
    if settings.exit_with_parent:
        end_with_parent()
    if settings.join is not None:
        from gpu_worker.parallel.joining import hold_ranks

        return hold_ranks(settings)
    try:
        server = _make_server(settings)
        address = server.start()
    except (ListenError, RecordingError, TlsFileError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    try:
        runner = load_runner(settings, server.stop_unusable)
    except (LoadError, ValueError, OSError) as error:
        # What a person can put right: the message says how. Anything else is a defect, and shows where.
        logger.debug("loading failed", exc_info=True)
        print(f"{PROGRAM}: {error}", file=sys.stderr, flush=True)
        server.stop_unusable(str(error))
        return 1
    except BaseException:
        # A signal among them: the interpreter must not end while gRPC's thread runs.
        server.stop()
        raise

    def announce(facts: WorkerFacts) -> None:
        logger.info(
            "worker ready",
            seconds=round(time.monotonic() - started_s, 2),
            listen=address,
            model=facts.model,
            device=", ".join(facts.devices),
            num_blocks=facts.num_blocks,
            block_size=facts.block_size,
            max_num_seqs=facts.max_num_seqs,
            max_model_len=facts.max_model_len,
        )

    return server.serve(runner, announce)


def _make_server(settings: WorkerSettings) -> WorkerServer:
    credentials = None
    if settings.tls_cert is not None and settings.tls_key is not None:
        credentials = server_credentials("--tls", settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    recorder = None
    if settings.record is not None:
        recorder = Recorder(settings.record, model=str(settings.model or ""), flags=settings.replayable_flags())
    return WorkerServer(
        settings.listen,
        credentials=credentials,
        shutdown_grace_s=settings.shutdown_grace_s,
        hang_limit_s=settings.hang_limit_s,
        recorder=recorder,
    )


def load_runner(settings: WorkerSettings, before_end: Callable[[str], None] | None = None) -> Runner:
    """The runner that the settings name. torch is imported only where it computes.

    `before_end` is told why, where loading ends the process by itself.
    """
    if settings.runner == "simulated":
        from gpu_worker.simulated import SimulatedRunner, SimulationSpec

        return SimulatedRunner(SimulationSpec.from_settings(settings))
    if settings.num_ranks > 1:
        from gpu_worker.parallel.leader import load_group_runner

        return load_group_runner(settings, before_end)
    from gpu_worker.device import resolve_device

    device = resolve_device(settings.device)
    if device.type == "cuda":
        from gpu_worker.cuda.loading import load_cuda_runner

        return load_cuda_runner(settings, device)
    from gpu_worker.runner import TorchRunner

    return TorchRunner.load(settings)


def _exit_while_loading(number: int, frame: FrameType | None) -> None:
    logger.info("the worker is told to end before it is ready", signal=signal.Signals(number).name)
    raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
