"""`python -m gpu_worker`: one worker process, from its flags to its exit code."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from types import FrameType

import structlog

from gpu_worker.config import PROGRAM, WorkerSettings, parse_settings
from gpu_worker.listen import ListenError, read_server_credentials
from gpu_worker.runner_api import Runner, WorkerFacts
from gpu_worker.server import WorkerServer

logger = structlog.get_logger("gpu_worker")

_PARENT_POLL_S = 0.5
# After the worker has been told to end because its parent is gone.
_ORPHAN_LIMIT_S = 15.0


def main(argv: list[str]) -> int:
    started_s = time.monotonic()
    settings = parse_settings(argv)
    _configure_logging(settings)
    signal.signal(signal.SIGTERM, _exit_while_loading)
    signal.signal(signal.SIGINT, _exit_while_loading)
    if settings.exit_with_parent:
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), name="parent", daemon=True).start()
    try:
        server = _make_server(settings)
        address = server.start()
    except ListenError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    try:
        runner = _load_runner(settings)
    except (ValueError, OSError) as error:
        # What a person can put right: the message says how. Anything else is a defect, and shows where.
        logger.debug("loading failed", exc_info=True)
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        server.stop()
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
        credentials = read_server_credentials(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    return WorkerServer(settings.listen, credentials=credentials, shutdown_grace_s=settings.shutdown_grace_s)


def _load_runner(settings: WorkerSettings) -> Runner:
    """The runner that the settings name. torch is imported only where it computes."""
    if settings.runner == "simulated":
        from gpu_worker.simulated import SimulatedRunner, SimulationSpec

        return SimulatedRunner(SimulationSpec.from_settings(settings))
    from gpu_worker.runner import TorchRunner

    return TorchRunner.load(settings)


def _configure_logging(settings: WorkerSettings) -> None:
    """One event a line on stderr, the standard library's loggers included."""
    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: structlog.typing.Processor
    if settings.log_format == "json":
        processors.append(structlog.processors.format_exc_info)
        renderer = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=processors,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(handlers=[handler], level=settings.log_level.upper(), force=True)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *processors,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )


def _exit_while_loading(number: int, frame: FrameType | None) -> None:
    logger.info("the worker is told to end before it is ready", signal=signal.Signals(number).name)
    raise SystemExit(0)


def _end_with_parent(parent: int) -> None:
    """Ends this process once its parent is another one than at the start: the kernel has given the orphan away."""
    while os.getppid() == parent:
        time.sleep(_PARENT_POLL_S)
    logger.warning("the process that started this worker is gone: the worker ends", parent=parent)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_ORPHAN_LIMIT_S)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
