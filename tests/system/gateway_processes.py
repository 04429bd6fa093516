"""The processes of a gateway that is several."""

from __future__ import annotations

import contextlib

import psutil

from tests.system.conftest import Stack


def gateways(stack: Stack) -> dict[int, psutil.Process]:
    """By number, those that take requests."""
    found = {}
    for process in psutil.Process(stack.processes["gateway"].pid).children():
        with contextlib.suppress(psutil.Error):
            numbers = [flag.partition("=")[2] for flag in process.cmdline() if flag.startswith("--gateway-process=")]
            if numbers and any(each.status == psutil.CONN_LISTEN for each in process.net_connections("tcp")):
                found[int(numbers[0])] = process
    return found
