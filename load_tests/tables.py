"""A run's numbers on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

# A driver that is busier than this may be what is measured.
DRIVER_BUSY_SHARE = 0.7
_LATENCIES = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "itl_ms": "ITL", "e2e_ms": "E2E"}


def print_result(result: dict[str, Any], console: Console) -> None:
    """Throughput of every phase, latencies of the last phase of each name, the headline, and what to be wary of."""
    target = result["target"]
    console.print(f"\n[bold]{result['scenario']}[/bold] over {target['kind']}, {escape(target['model'])}")
    console.print(_throughput_table(result["phases"]))
    console.print(_latency_table({phase["name"]: phase for phase in result["phases"]}))
    for name, value in result["headline"].items():
        if not isinstance(value, list):
            console.print(f"{name.replace('_', ' ')}: [bold]{short_number(value)}[/bold]", highlight=False)
    for remark in remarks(result["phases"]):
        console.print(remark, highlight=False, markup=False, style="yellow")


def _throughput_table(phases: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("phase")
    for column in ("requests", "failed", "wall s", "output tok/s", "total tok/s", "driver's core"):
        table.add_column(column, justify="right")
    for phase in phases:
        numbers = phase["numbers"]
        counts = [str(numbers["num_requests"]), str(numbers["num_failed"])]
        rates = [short_number(numbers.get(name)) for name in ("wall_s", "output_tokens_per_s", "total_tokens_per_s")]
        table.add_row(phase["name"], *counts, *rates, f"{phase['driver']['core_share']:.0%}")
    return table


def _latency_table(phases: dict[str, dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("phase", "ms"):
        table.add_column(column)
    for column in ("mean", "p50", "p99"):
        table.add_column(column, justify="right")
    for name, phase in phases.items():
        for key, word in _LATENCIES.items():
            if spread := phase["numbers"].get(key):
                table.add_row(name, word, *(short_number(spread[column]) for column in ("mean", "p50", "p99")))
    return table


def remarks(phases: list[dict[str, Any]]) -> list[str]:
    """Goodput, errors, and a driver that was too busy to be trusted."""
    lines = []
    for phase in phases:
        name, numbers, driver = phase["name"], phase["numbers"], phase["driver"]
        if goodput := numbers.get("goodput"):
            share, rate = goodput["share_of_requests"], goodput["requests_per_s"]
            lines.append(f"{name}: goodput {rate:g} requests/s, {share:.1%} of requests")
        lines += [f"{name}: {count} x {error}" for error, count in numbers.get("errors", {}).items()]
        share = driver["core_share"] / driver["num_processes"]
        if share > DRIVER_BUSY_SHARE:
            lines.append(
                f"{name}: each driver process used {share:.0%} of a core: it may be what was measured; "
                "use more --processes"
            )
    return lines


def short_number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table for the README."""
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join(lines)
