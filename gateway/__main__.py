"""`python -m gateway`: the REST gateway as a process."""

from __future__ import annotations

import gc
import resource
import sys
import time

import structlog
import uvloop
from stepwire.process.logs import set_up_logging
from stepwire.process.parent import end_with_parent

from gateway.app import create_app
from gateway.client import CredentialsError
from gateway.config import PROGRAM, parse_settings
from gateway.server import ListenError, bind_socket, check_certificate, serve
from gateway.store import StoreError


def main() -> None:
    started_at = time.monotonic()
    settings = parse_settings(sys.argv[1:])
    if settings.exit_with_parent:
        end_with_parent()
    set_up_logging(settings)
    _raise_file_limit()
    try:
        check_certificate(settings)
        app = create_app(settings)
        listener = bind_socket(settings)
    except (ListenError, CredentialsError, StoreError) as error:
        sys.exit(f"{PROGRAM}: {error}")
    where = settings.uds or "{}:{}".format(*listener.getsockname()[:2])
    scheme = "unix:" if settings.uds else ("https://" if settings.tls_cert else "http://")
    structlog.get_logger("gateway").info(
        "listening",
        url=f"{scheme}{where}",
        control_plane=settings.control_plane,
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


def _raise_file_limit() -> None:
    """Every connection is a file descriptor, and the usual soft limit (1024) is below `max_concurrent_requests`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    main()
