"""`python -m gateway`: the REST gateway as a process."""

from __future__ import annotations

import gc
import sys
import time

import structlog
from stepwire.process.file_limit import raise_file_limit
from stepwire.process.logs import set_up_logging
from stepwire.process.parent import end_with_parent
from stepwire.process.tls import TlsFileError

from gateway.config import PROGRAM, GatewaySettings, parse_settings
from gateway.file_reserve import NUM_RESERVED
from gateway.listening import ListenError, bind_socket, tls_context
from gateway.store import StoreError


def main() -> None:
    started_at = time.monotonic()
    settings = parse_settings(sys.argv[1:])
    if settings.exit_with_parent:
        end_with_parent()
    set_up_logging(settings)
    raise_file_limit(settings.max_concurrent_requests + NUM_RESERVED if settings.answers_itself else 0)
    try:
        tls_context(settings)  # what is wrong with the files is told before anything is started
        if not settings.answers_itself:
            from gateway.processes import run_several

            sys.exit(run_several(settings, sys.argv[1:]))
        _serve(settings, started_at)
    except (ListenError, StoreError, TlsFileError) as error:
        sys.exit(f"{PROGRAM}: {error}")


def _serve(settings: GatewaySettings, started_at: float) -> None:
    """Answer requests in this process, until a signal."""
    # What a process that only starts others has no need of.
    import uvloop

    from gateway.app import create_app
    from gateway.server import serve

    app = create_app(settings)
    listener = bind_socket(settings)
    where = settings.uds or "{}:{}".format(*listener.getsockname()[:2])
    scheme = "unix:" if settings.uds else ("https://" if settings.tls_cert else "http://")
    structlog.get_logger("gateway").info(
        "listening",
        url=f"{scheme}{where}",
        control_plane=settings.control_plane,
        process=settings.gateway_process,
        api_key="needed" if settings.api_key else "none",
        seconds=round(time.monotonic() - started_at, 2),
    )
    # What has been imported stays, and a request's objects are freed by reference counts: the collector may look
    # rarely (by default it took 4 % of the CPU at 12,800 tokens/s).
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    try:
        uvloop.run(serve(app, settings, listener))
    finally:
        if settings.uds is not None:
            settings.uds.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
