"""Tables of what the engine itself was measured at: a worker's steps on a GPU, the CPU worker beside other engines, the
gateway's cost a token."""

from __future__ import annotations

from typing import Any

from load_tests.machine import machine_name
from load_tests.tables import markdown_table, short_number

# What the floors, goals and figures of others in gpu_steps were measured on.
ANCHORED_GPU = "H200"


# Cores that others may have used more than in an older run for the newer one to count.
_WORDS = {"met": "that were mostly met before", "invented": "that nobody met before"}
_OTHERS_MARGIN = 0.1


class EngineResults:
    """Collects lines of everything but scenarios and sections, oldest first."""

    def __init__(self) -> None:
        # By machine, shape and work.
        self._gpu_steps: dict[tuple[str, str, str], dict[str, Any]] = {}
        self._cpu_worker: dict[str, dict[str, Any]] = {}
        self._gateway: list[dict[str, Any]] = []
        # By part, length of a step, streams, processes of gateway and driver, words and machine, of added_latency: the
        # newest, unless others used more of the machine meanwhile.
        self._added: dict[tuple[str, float, int, int, int, str, str], dict[str, Any]] = {}
        self._session: dict[str, Any] | None = None
        self._grammar: dict[str, Any] | None = None

    def take(self, result: dict[str, Any]) -> None:
        if "shape" in result and "work" in result:
            self._gpu_steps[machine_name(result["machine"]), result["shape"], result["work"]] = (
                result  # the newest counts
            )
        elif "stepwire_ratio_median" in result:
            self._cpu_worker[result["scenario"]] = result
        elif "gateway_cpu_us_per_token" in result:
            self._gateway.append(result)
        elif "part" in result:
            key = (
                result["part"],
                result["step_ms"],
                result.get("num_streams", 1),
                result.get("gateway_processes", 1),
                result.get("driver_processes", 1),
                result.get("words", "met"),
                machine_name(result["machine"]),
            )
            if key not in self._added or result["others_cores"] <= self._added[key]["others_cores"] + _OTHERS_MARGIN:
                self._added[key] = result
        elif "calls_over_session_client" in result:
            self._session = result
        elif "held_over_free" in result:
            self._grammar = result

    def tables(self) -> list[str]:
        parts = []
        if self._gpu_steps:
            parts += ["### The worker on a GPU, without gRPC (`load_tests.gpu.step_bench`)", self._gpu_table()]
        if self._cpu_worker:
            parts += ["### The CPU worker beside other engines (`load_tests.cpu_worker`)", self._cpu_table()]
        if self._gateway:
            parts += ["### The gateway (`load_tests.gateway_cost`)", self._gateway_table()]
        if self._added:
            parts += ["### What gateway and control plane add (`load_tests.added_latency`)", *self._added_tables()]
        if self._session is not None:
            parts += ["### One Session against a call per request (`load_tests.session_cost`)", self._session_table()]
        if self._grammar is not None:
            parts += ["### Grammar masks (`load_tests.grammar_cost`)", self._grammar_line()]
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
        parts = [
            "Random weights, bf16, contexts of 1,024 tokens, two steps in flight; newest lines. vLLM's figures\n"
            "(0.26.0, torch 2.11, its defaults) and the goals are those of an H200, measured in other runs: no\n"
            "other card is held against them. Other cards' floors are the H200's at the rates that the card\n"
            "reached in the run."
        ]
        machines = sorted({machine for machine, _, _ in self._gpu_steps}, key=lambda name: ANCHORED_GPU not in name)
        for machine in machines:
            is_anchored = ANCHORED_GPU in machine
            rows = []
            for (on, shape, work), result in sorted(self._gpu_steps.items()):
                if on != machine:
                    continue
                known = result if is_anchored else {"idle_us": result["idle_us"]} if "idle_us" in result else {}
                value, floor = result["value"], result.get("floor" if is_anchored else "card_floor")
                share = "-"
                if floor:
                    share = f"{(value / floor if work.endswith('tok/s') else floor / value):.0%}"
                numbers = [short_number(known[name]) if name in known else "-" for name in ("vllm", "goal", "idle_us")]
                rows.append([shape, work, short_number(value), short_number(floor) if floor else "-", share, *numbers])
            parts += [f"On {machine}:", markdown_table(columns, rows)]
        return "\n\n".join(parts)

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

    def _added_tables(self) -> list[str]:
        streams = [result for (part, *_), result in sorted(self._added.items()) if part == "streams"]
        rows = [
            [
                str(result["num_streams"]),
                str(result.get("gateway_processes", 1)),
                str(result.get("driver_processes", 1)),
                short_number(result["step_ms"]),
                f"{short_number(result['tokens_per_s'])} (>= {short_number(result['goal_tokens_per_s'])})",
                *(short_number(result["added_ms"][point]) for point in ("p50", "p90")),
                f"{short_number(result['added_ms']['p99'])} (<= {short_number(result['goal_added_p99_ms'])})",
                *(short_number(result["cpu_us_per_token"][name]) for name in ("gateway", "control_plane")),
                short_number(result["others_cores"]),
                machine_name(result["machine"]),
            ]
            for result in streams
        ]
        columns = [
            "streams",
            "gateway processes",
            "driver processes",
            "step ms",
            "tokens/s (goal)",
            "added ms p50",
            "p90",
            "p99 (goal)",
            "gateway CPU us a token",
        ]
        tables = [
            "From the end of a token's step until the client has its event; of several runs the newest, unless\n"
            "others used more of the machine meanwhile:\n\n"
            + markdown_table([*columns, "control plane CPU us a token", "others' cores", "machine"], rows)
        ]
        for (part, *_), result in sorted(self._added.items()):
            if part == "first_byte":
                rest, ids = result["over_rest_ms"]["p50"], result["token_ids_ms"]["p50"]
                tables.append(
                    f"First token of a prompt of {result['prompt_tokens']:,} tokens, {result['num_requests']} requests "
                    f"one at a time, of words {_WORDS[result.get('words', 'met')]}: "
                    f"over REST as a chat {rest:.1f} ms, as token ids to the control plane {ids:.1f} ms "
                    f"(medians), so gateway and frontend add {result['added_p50_ms']:.1f} ms (goal: <= "
                    f"{result['goal_added_p50_ms']:g}), others using {result['others_cores']:.2f} cores, on "
                    f"{machine_name(result['machine'])}."
                )
        return tables

    def _session_table(self) -> str:
        result = self._session or {}
        columns = {
            "tokens_per_s": "tokens/s",
            "control_plane_us_per_token": "control plane CPU us a token",
            "client_us_per_token": "client CPU us a token",
        }
        rows = [
            [way, *(" / ".join(short_number(turn[name]) for turn in turns) for name in columns)]
            for way, turns in result["turns"].items()
        ]
        return (
            f"{result['num_requests']} requests at once, steps of {result['step_ms']:g} ms, ways taking turns:\n\n"
            + markdown_table(["way", *columns.values()], rows)
            + f"\n\nCalls cost the control plane {result['calls_over_session_control_plane']:g} times and the client "
            f"{result['calls_over_session_client']:g} times the CPU of a Session."
            + (
                f" Texts packed and one message at a time: {result['packed_over_session_control_plane']:g} and "
                f"{result['packed_over_session_client']:g} times."
                if "packed" in result["turns"]
                else ""
            )
        )

    def _grammar_line(self) -> str:
        result = self._grammar or {}
        low, high = result["held_over_free_range"]
        return (
            f"{result['num_rows']} rows held to a schema of {result['num_fields']} fields make "
            f"{result['held_over_free']:.1%} of the tokens/s of free rows (turns: {low:.1%} to {high:.1%}; goal: 95 %)."
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
