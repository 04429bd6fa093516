"""Several gateway processes on one port (SO_REUSEPORT): who starts them, keeps them running, and ends them together.

Each has a session of its own with the control plane. They share the data directory, whose lock this process holds, and
a directory for what lives only as long as they do. A client notices which one answers it by nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import structlog
from prometheus_client.multiprocess import mark_process_dead

from gateway.batches.orphans import remove_orphans
from gateway.child_process import ChildFailed, ChildProcess, first_failure, raise_failure, unless
from gateway.config import PROGRAM, GatewaySettings
from gateway.listening import reserve_port
from gateway.responses.store import ResponseStore
from gateway.run_directory import METRICS_VARIABLE, RunDirectory
from gateway.store import Store

_log = structlog.get_logger("gateway")

_POLL_S = 0.05
# What a process may take to end on top of draining.
_STOP_MARGIN_S = 3.5


def run_several(settings: GatewaySettings, arguments: Sequence[str]) -> int:
    """Until a signal. `arguments`: the command line that each process gets as well. Raises `ListenError`,
    `StoreError`."""
    # Dead children have left work behind in the store, which nobody will end.
    store = Store(settings.data_dir)
    try:
        with reserve_port(settings) as port, tempfile.TemporaryDirectory(prefix="stepwire-gateway-") as directory:
            run_directory = RunDirectory(Path(directory))
            run_directory.create()
            asyncio.run(_Processes(settings, arguments, store, port, run_directory).run())
    except ChildFailed as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    finally:
        store.close()
    return 0


class _Processes:
    def __init__(
        self,
        settings: GatewaySettings,
        arguments: Sequence[str],
        store: Store,
        port: socket.socket,
        run_directory: RunDirectory,
    ) -> None:
        self._settings = settings
        self._store = store
        self._run_directory = run_directory
        # Of a flag that is given twice the last one counts.
        common = [
            *arguments,
            f"--port={port.getsockname()[1]}",
            f"--data-dir={store.directory}",
            f"--gateway-run-dir={run_directory.path}",
            "--exit-with-parent",
        ]
        environment = {**os.environ, METRICS_VARIABLE: str(run_directory.metrics)}
        self._children = [
            ChildProcess(
                f"gateway {number}",
                "gateway",
                [*common, f"--gateway-process={number}"],
                environment,
                settings.drain_timeout_s + _STOP_MARGIN_S,
                on_death=self._on_death,
            )
            for number in range(settings.gateway_processes)
        ]

    async def run(self) -> None:
        stop, hurry = asyncio.Event(), asyncio.Event()

        def on_signal() -> None:
            if stop.is_set():
                hurry.set()
            stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, on_signal)
        settings = self._settings
        await remove_orphans(self._store)
        kept = ResponseStore(self._store, max_responses=settings.responses_max, ttl_s=settings.responses_ttl_s)
        if num_failed := await kept.fail_interrupted():
            _log.warning("responses of an earlier process will not end", num_responses=num_failed)
        keepers = [asyncio.create_task(child.keep_running()) for child in self._children]
        try:
            if await unless(stop, self._all_entered(keepers)):
                for child in self._children:
                    child.was_ready = True
                _log.info("all processes listen", num_processes=len(self._children))
                await unless(stop, first_failure(keepers))
        finally:
            for keeper in keepers:
                keeper.cancel()
            await asyncio.gather(*keepers, return_exceptions=True)
            await asyncio.gather(*(child.stop(hurry) for child in self._children))

    async def _all_entered(self, keepers: Sequence[asyncio.Task[None]]) -> bool:
        while len(self._run_directory.processes()) < len(self._children):
            raise_failure(keepers)
            await asyncio.sleep(_POLL_S)
        return True

    def _on_death(self, pid: int) -> None:
        """Gauges of a process end with it; its counts stay."""
        with contextlib.suppress(OSError):
            mark_process_dead(pid, str(self._run_directory.metrics))  # type: ignore[no-untyped-call]
