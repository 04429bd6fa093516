"""A run's numbers on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

# A driver that is busier than this may be what is measured.
DRIVER_BUSY_SHARE = 0.7
_LATENCIES = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")


def print_result(result: dict[str, Any], console: Console) -> None:
    target = result["target"]
    title = f"{result['scenario']} over {target['kind']}, {target['model']}"
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for column in ("phase", "requests", "output tok/s", "total tok/s"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for name in _LATENCIES:
        table.add_column(f"{name[:-3].upper()} ms\nmean / p50 / p99", justify="right")
    table.add_column("driver\ncore share", justify="right")
    for phase in result["phases"]:
        numbers = phase["numbers"]
        failed = numbers["num_failed"]
        table.add_row(
            phase["name"],
            f"{numbers['num_requests']}" + (f" ({failed} failed)" if failed else ""),
            _number(numbers.get("output_tokens_per_s")),
            _number(numbers.get("total_tokens_per_s")),
            *(_spread(numbers.get(name)) for name in _LATENCIES),
            f"{phase['driver']['core_share']:.0%}",
        )
    console.print(table)
    for name, value in result["headline"].items():
        if not isinstance(value, list):
            console.print(f"{name.replace('_', ' ')}: [bold]{_number(value)}[/bold]", highlight=False)
    _print_remarks(result, console)


def _print_remarks(result: dict[str, Any], console: Console) -> None:
    for phase in result["phases"]:
        numbers = phase["numbers"]
        if goodput := numbers.get("goodput"):
            console.print(
                f"{phase['name']}: goodput {goodput['requests_per_s']:g} requests/s, "
                f"{goodput['share_of_requests']:.1%} of requests",
                highlight=False,
            )
        for error, count in numbers.get("errors", {}).items():
            console.print(f"[red]{phase['name']}: {count} x[/red] {error}", highlight=False, markup=True)
        share = phase["driver"]["core_share"] / phase["driver"]["num_processes"]
        if share > DRIVER_BUSY_SHARE:
            console.print(
                f"[yellow]{phase['name']}: the driver used {share:.0%} of a core in each of its processes: it may be "
                "what was measured. Give it more --processes.[/yellow]",
                highlight=False,
            )


def _spread(spread: dict[str, float] | None) -> str:
    if spread is None:
        return "-"
    return " / ".join(_number(spread[name]) for name in ("mean", "p50", "p99"))


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
