"""`python -m load_tests.report`: write the tables of load_tests/README.md from the results.

A table shows the newest line of each thing that was measured: what stands in the README is what the files say.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from load_tests.machine import machine_name
from load_tests.report_engines import EngineResults
from load_tests.results import RESULTS_DIRECTORY, read_results
from load_tests.tables import markdown_table, short_number

README = Path(__file__).resolve().parent / "README.md"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
_LATENCIES = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")


def render(results: Iterable[dict[str, Any]]) -> str:
    """All tables as Markdown; `results` oldest first."""
    runs: dict[tuple[Any, ...], dict[str, Any]] = {}
    sections: dict[str, dict[str, Any]] = {}
    engines = EngineResults()
    for result in results:
        if result.get("arm") == "before":
            continue  # what a change was measured against: for the notes
        if "scenario" in result and "parameters" in result:
            key = (
                result["scenario"],
                str(sorted(result["parameters"].items())),
                result["target"]["kind"],
                result["target"]["model"],
                machine_name(result["machine"]),
                result["label"],
            )
            runs.pop(key, None)  # the newest stands last
            runs[key] = result
        elif "section" in result:
            sections[result["section"]] = result
        else:
            engines.take(result)
    parts = engines.tables()
    if runs:
        parts += ["### Scenarios", *_scenario_tables(list(runs.values()))]
    if sections:
        parts += ["### Control plane against a simulated worker (`load_tests.control_plane`)"]
        for name in _SECTIONS:
            if name in sections:
                parts += [_SECTIONS[name](sections[name]), _footnote(sections[name])]
    return "\n\n".join(parts) if parts else "No results yet."


def _scenario_tables(runs: Sequence[dict[str, Any]]) -> list[str]:
    """One table a machine: a row for the last phase of each name of each run."""
    machines: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        machines.setdefault(machine_name(run["machine"]), []).append(run)
    tables = []
    for machine, of_machine in machines.items():
        rows = []
        for run in of_machine:
            what = f"{run['scenario']} {_flags(run['parameters'])}".strip()
            target = f"{run['target']['model']}, {run['target']['kind']}" + (
                f", {run['label']}" if run["label"] else ""
            )
            headline = ", ".join(
                f"{name.replace('_', ' ')} {short_number(value)}"
                for name, value in run["headline"].items()
                if not isinstance(value, list)
            )
            for phase in {phase["name"]: phase for phase in run["phases"]}.values():
                numbers = phase["numbers"]
                latencies = [_spread(numbers.get(name)) for name in _LATENCIES]
                rate = short_number(numbers.get("output_tokens_per_s"))
                busy = f"{phase['driver']['core_share']:.0%}"
                rows.append([what, target, phase["name"], rate, *latencies, busy, headline, run["date"][:10]])
                what = target = headline = ""
        columns = ["scenario", "target", "phase", "output tok/s"]
        columns += [f"{name[:-3].upper()} ms p50 / p99" for name in _LATENCIES]
        tables += [f"On {machine}:", markdown_table([*columns, "driver's core", "headline", "date"], rows)]
    return tables


def _flags(parameters: dict[str, Any]) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in parameters.items() if value is not None)


def _spread(spread: dict[str, float] | None) -> str:
    return f"{short_number(spread['p50'])} / {short_number(spread['p99'])}" if spread else "-"


def _footnote(result: dict[str, Any]) -> str:
    commit = (result["git"]["commit"] or "no commit")[:10] + (" and changes" if result["git"]["dirty"] else "")
    label = f", {result['label']}" if result["label"] else ""
    return f"{result['date'][:10]}, {commit}, {machine_name(result['machine'])}{label}: `{result['command']}`"


_CASE_COLUMNS = {
    "wall_ms": "wall ms",
    "control_plane_cpu_ms": "control plane CPU ms",
    "main_thread_cpu_ms": "of it main thread",
    "worker_cpu_ms": "worker CPU ms",
    "driver_cpu_ms": "driver CPU ms",
    "others_cores": "cores used by others",
}


def _case_row(case: dict[str, Any]) -> list[str]:
    return [str(case["num_rows"]), f"{case['step_ms']:g}", *(f"{case['quieter_half'][n]:.3g}" for n in _CASE_COLUMNS)]


def _steps(result: dict[str, Any]) -> str:
    rows = [
        [*_case_row(case), f"<= {case['goal_wall_ms']:g}" if case["goal_wall_ms"] else "-"] for case in result["cases"]
    ]
    return "Per step:\n\n" + markdown_table(["rows", "step ms", *_CASE_COLUMNS.values(), "goal, wall ms"], rows)


def _rows(result: dict[str, Any]) -> str:
    line = result["control_plane_cpu_ms_by_rows"]
    return (
        "Per step, against rows:\n\n"
        + markdown_table(["rows", "step ms", *_CASE_COLUMNS.values()], map(_case_row, result["cases"]))
        + f"\n\nControl plane CPU = {line['intercept']:.3g} ms + {line['slope'] * 1e3:.3g} us a row "
        f"(R^2 {line['r_squared']:.3f})."
    )


def _length(result: dict[str, Any]) -> str:
    line = result["control_plane_cpu_ms_by_tokens"]
    names = {"generated_tokens": "tokens generated so far", **_CASE_COLUMNS}
    rows = [[f"{point[name]:.4g}" for name in names] for point in result["points"]]
    return (
        f"Per step, {result['num_rows']} rows, against tokens generated so far:\n\n"
        + markdown_table([*names.values()], rows)
        + f"\n\nControl plane CPU = {line['intercept']:.3g} ms + {line['slope'] * 1e6:.3g} us "
        "for each 1,000 tokens so far."
    )


def _profile(result: dict[str, Any]) -> str:
    entries = [*result["by_rows"], *result["by_length"]]
    parts = list(entries[0]["us_per_step"])
    rows = [
        [
            str(entry["num_rows"]),
            str(entry["generated_before"]),
            *(f"{entry['us_per_step'][part]:.0f}" for part in parts),
            f"{entry['core_us']:.0f}",
            f"{entry['frontend_us']:.0f}",
        ]
        for entry in entries
    ]
    columns = ["rows", "tokens before", *parts, "core", "frontend"]
    line = result["core_cpu_ms_by_rows"]
    return (
        "CPU us per step in one process, without gRPC (goal for the core at 256 rows: 1,200):\n\n"
        + markdown_table(columns, rows)
        + f"\n\nCore = {line['intercept'] * 1e3:.3g} us + {line['slope'] * 1e3:.3g} us a row."
    )


def _groups_cpu(result: dict[str, Any]) -> str:
    rows = [
        [
            str(case["num_groups"]),
            str(case["rows_per_group"]),
            f"{case['step_ms']:g}",
            f"{case['control_plane_cpu_ms_per_step']:.3g}",
            f"{case['steps_per_s']:.4g}",
            f"{case['control_plane_cores']:.3g}",
            f"{case['others_cores']:.3g}",
        ]
        for case in result["cases"]
    ]
    columns = ["groups", "rows each", "step ms", "control plane CPU ms a step", "steps/s", "its cores", "others' cores"]
    return "Worker groups (`load_tests.groups`), steps of all groups together:\n\n" + markdown_table(columns, rows)


def _groups_scaling(result: dict[str, Any]) -> str:
    rates = result["output_tokens_per_s"]
    rows = [[number, ", ".join(f"{rate:,.0f}" for rate in values)] for number, values in rates.items()]
    return (
        f"{result['requests_per_group']} requests a group, {result['rows_per_group']} rows, steps of "
        f"{result['step_ms']:g} ms:\n\n"
        + markdown_table(["groups", "output tokens/s, turn by turn"], rows)
        + f"\n\nTwo groups give {result['ratio']:.3g} times the tokens of one (goal: {result['goal_ratio']:g})."
    )


_SECTIONS = {
    "steps": _steps,
    "rows": _rows,
    "length": _length,
    "profile": _profile,
    "cpu": _groups_cpu,
    "scaling": _groups_scaling,
}


def replace_tables(text: str, tables: str) -> str:
    """The README with the part between the two marks replaced. Raises ValueError if they are not there."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README must hold {BEGIN} and, after it, {END}: the tables go between them")
    return f"{head}{BEGIN}\n\n{tables}\n\n{END}{tail}"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m load_tests.report", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="results (default: load_tests/results/*.jsonl)")
    parser.add_argument("--print", action="store_true", dest="print_only", help="print the tables, change nothing")
    args = parser.parse_args(argv)
    try:
        tables = render(read_results(args.files or sorted(RESULTS_DIRECTORY.glob("*.jsonl"))))
        if args.print_only:
            print(tables)
        else:
            README.write_text(replace_tables(README.read_text(encoding="utf-8"), tables), encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"python -m load_tests.report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
