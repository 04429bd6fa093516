"""Tables of what the engine itself was measured at: a worker's steps on a GPU, the CPU worker beside other engines, the
gateway's cost a token."""

from __future__ import annotations

from typing import Any

from load_tests.machine import machine_name
from load_tests.tables import markdown_table, short_number


class EngineResults:
    """Collects lines of gpu_steps, cpu_worker and gateway_cost, oldest first."""

    def __init__(self) -> None:
        self._gpu_steps: dict[tuple[str, str], dict[str, Any]] = {}
        self._cpu_worker: dict[str, dict[str, Any]] = {}
        self._gateway: list[dict[str, Any]] = []

    def take(self, result: dict[str, Any]) -> None:
        if "shape" in result and "work" in result:
            self._gpu_steps[result["shape"], result["work"]] = result  # the newest counts
        elif "stepwire_ratio_median" in result:
            self._cpu_worker[result["scenario"]] = result
        elif "gateway_cpu_us_per_token" in result:
            self._gateway.append(result)

    def tables(self) -> list[str]:
        parts = []
        if self._gpu_steps:
            parts += ["### The worker on a GPU, without gRPC (`load_tests.gpu.step_bench`)", self._gpu_table()]
        if self._cpu_worker:
            parts += ["### The CPU worker beside other engines (`load_tests.cpu_worker`)", self._cpu_table()]
        if self._gateway:
            parts += ["### The gateway (`load_tests.gateway_cost`)", self._gateway_table()]
        return parts

    def _gpu_table(self) -> str:
        columns = [
            "shape",
            "work",
            "stepwire",
            "floor",
            "of the floor",
            "vLLM 0.26",
            "goal",
            "GPU idle between steps, us",
        ]
        rows = []
        for (shape, work), result in sorted(self._gpu_steps.items()):
            value, floor = result["value"], result.get("floor")
            share = "-"
            if floor:
                share = f"{(value / floor if work.endswith('tok/s') else floor / value):.0%}"
            numbers = [short_number(result[name]) if name in result else "-" for name in ("vllm", "goal", "idle_us")]
            rows.append([shape, work, short_number(value), short_number(floor) if floor else "-", share, *numbers])
        machines = sorted({machine_name(result["machine"]) for result in self._gpu_steps.values()})
        return (
            "Random weights, bf16, contexts of 1,024 tokens, two steps in flight; newest lines. vLLM's\n"
            "figures (0.26.0, torch 2.11, its defaults) were measured on the same kind of GPU, not in the same run.\n\n"
            + markdown_table(columns, rows)
            + f"\n\nOn {'; '.join(machines)}."
        )

    def _cpu_table(self) -> str:
        def beside(result: dict[str, Any], key: str) -> str:
            ratios = result.get(key, {})
            return ", ".join(f"{short_number(ratio)}x {name}" for name, ratio in ratios.items()) or "-"

        rows = []
        for result in self._cpu_worker.values():
            rates = result["tokens_per_s"]
            rows += [
                [
                    result["scenario"],
                    name,
                    short_number(rates[name]) if name in rates else "-",
                    beside(result, key),
                    result["note"],
                    result["date"][:10],
                ]
                for name, key in (("stepwire", "stepwire_ratio_median"), ("stepwire served", "served_ratio_median"))
            ]
        return (
            "SmolLM2-135M in bf16, two threads, 64 tokens in and out, engines taking turns; medians of tokens/s, and\n"
            "stepwire's multiple of each other engine within the same turn. `stepwire` is the runner alone, `stepwire\n"
            "served` the whole stack over REST.\n\n"
            + markdown_table(["work", "engine", "tokens/s", "beside", "note", "date"], rows)
        )

    def _gateway_table(self) -> str:
        columns = {
            "step_ms": "step ms",
            "tokens_per_s": "tokens/s",
            "tokens_per_event": "tokens an event",
            "gateway_cpu_us_per_token": "gateway CPU us a token",
            "control_plane_cpu_us_per_token": "control plane CPU us a token",
        }
        rows = [
            [str(result["num_streams"]), *(short_number(result[name]) for name in columns)] for result in self._gateway
        ]
        return "SSE streams through one gateway process.\n\n" + markdown_table(["streams", *columns.values()], rows)
