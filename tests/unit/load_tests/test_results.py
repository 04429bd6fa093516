"""Results and the tables made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from load_tests.control_plane import Window, fitted_line, quieter_half
from load_tests.process_cpu import CpuReading, read_cpu
from load_tests.report import BEGIN, END, render, replace_tables
from load_tests.results import REPOSITORY_ROOT, append_result, command_line, read_results
from load_tests.tables import remarks


def run_result(date: str, rate: float, **more: Any) -> dict[str, Any]:
    spread = {"mean": 2.0, "p50": 1.5, "p99": 9.0}
    return {
        "date": date,
        "scenario": "nano",
        "label": "",
        "parameters": {"num_requests": 256},
        "target": {"kind": "grpc", "model": "tiny"},
        "machine": {"cpu": "A CPU", "num_cores": 2},
        "headline": {"output_tokens_per_s": rate, "each": [1.0, 2.0]},
        "phases": [
            {
                "name": "nano",
                "numbers": {"output_tokens_per_s": rate, "ttft_ms": spread, "itl_ms": None},
                "driver": {"core_share": 0.25, "num_processes": 1},
            }
        ],
    } | more


def test_keys_are_not_written_down() -> None:
    argv = ["nano", "--api-key", "sk-1", "--rest", "http://h", "--api-key=sk-2", "--label", "a b"]
    environment = {"STEPWIRE_SIM_STEP_MS": "5 0", "STEPWIRE_API_KEY": "sk-3", "HOME": "/root"}
    shown = command_line("load_tests", argv, environment)
    assert shown == (
        "STEPWIRE_API_KEY=... STEPWIRE_SIM_STEP_MS='5 0' "
        "python -m load_tests nano --api-key ... --rest http://h --api-key=... --label 'a b'"
    )


def test_paths_in_the_clone_are_given_from_its_root() -> None:
    argv = ["--serve", f"{REPOSITORY_ROOT}/load_tests/shapes/qwen3-0.6b --seed 1", "--out", "/tmp/x"]
    shown = command_line("load_tests", argv, {})
    assert shown == "python -m load_tests --serve 'load_tests/shapes/qwen3-0.6b --seed 1' --out /tmp/x"


def test_lines_are_appended_and_read_by_date(tmp_path: Path) -> None:
    first, second = tmp_path / "new" / "a.jsonl", tmp_path / "b.jsonl"
    append_result(first, {"date": "2026-01-03"})
    append_result(first, {"date": "2026-01-01"})
    append_result(second, {"date": "2026-01-02"})
    assert [result["date"] for result in read_results([first, second])] == ["2026-01-01", "2026-01-02", "2026-01-03"]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"date": "x"}\n{"date": \n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: not a JSON line"):
        list(read_results([path]))


def test_the_newest_run_of_each_kind_is_shown() -> None:
    tables = render(
        [run_result("2026-01-01", 111.0), run_result("2026-01-02", 222.0), run_result("2026-01-02", 333.0, label="fp8")]
    )
    assert "111" not in tables
    assert "| nano --num-requests 256 | tiny, grpc | nano | 222 | 1.5 / 9 | - | - | - | 25% |" in tables
    assert "tiny, grpc, fp8" in tables
    assert "On 2 cores of A CPU:" in tables


def test_machines_are_kept_apart() -> None:
    gpu = {"cpu": "A CPU", "num_cores": 16, "gpus": ["NVIDIA H200, 143771 MiB, 580"]}
    tables = render([run_result("2026-01-01", 111.0), run_result("2026-01-02", 222.0, machine=gpu)])
    assert "On 2 cores of A CPU:" in tables
    assert "On 1 x NVIDIA H200, 16 cores of A CPU:" in tables


def test_only_the_part_between_the_marks_is_replaced() -> None:
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    once = replace_tables(text, "new")
    assert once == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    assert replace_tables(once, "new") == once
    with pytest.raises(ValueError, match="must hold"):
        replace_tables("no marks", "new")


def test_a_busy_driver_is_said() -> None:
    phase = {"name": "p", "numbers": {"errors": {"429": 3}}, "driver": {"core_share": 1.8, "num_processes": 2}}
    busy = remarks([phase])
    assert busy[0] == "p: 3 x 429"
    assert "each driver process used 90% of a core" in busy[1]
    assert remarks([phase | {"numbers": {}, "driver": {"core_share": 1.8, "num_processes": 4}}]) == []


def window(cpu_ms: float, others: float) -> Window:
    return Window(
        num_steps=1000,
        wall_s=2.0,
        control_plane=CpuReading(cpu_ms * 0.9, cpu_ms * 0.1),
        worker_cpu_s=0.5,
        driver_cpu_s=0.3,
        others_cores=others,
        generated_tokens=100,
    )


def test_the_noisier_half_does_not_count() -> None:
    numbers = quieter_half([window(9.0, 1.5), window(1.0, 0.1), window(2.0, 0.2), window(8.0, 1.0), window(3.0, 0.3)])
    assert numbers["control_plane_cpu_ms"] == pytest.approx(2.0)
    assert numbers["wall_ms"] == pytest.approx(2.0)
    assert numbers["others_cores"] == pytest.approx(0.2)


def test_a_line_is_found_and_its_fit_told() -> None:
    line = fitted_line([(32, 0.5 + 32 * 0.003), (256, 0.5 + 256 * 0.003), (512, 0.5 + 512 * 0.003)])
    assert line["intercept"] == pytest.approx(0.5)
    assert line["slope"] == pytest.approx(0.003)
    assert line["r_squared"] == pytest.approx(1.0)
    assert fitted_line([(0, 0), (1, 4), (2, 0)])["r_squared"] == pytest.approx(0.0)


def test_cpu_of_a_process_that_is_not_there() -> None:
    with pytest.raises(ProcessLookupError, match="there is no process"):
        read_cpu(2**22 + 1)
