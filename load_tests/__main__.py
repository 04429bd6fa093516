"""`python -m load_tests SCENARIO`: send a standard workload to a server and write down what came of it."""

from __future__ import annotations

import argparse
import contextlib
import secrets
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import uvloop
from rich.console import Console

from load_tests.driver import PhaseResult, open_driver
from load_tests.phase_bar import phase_bar
from load_tests.records import Slo, phase_numbers
from load_tests.results import append_result, measurement_facts
from load_tests.scenarios import SCENARIOS, PhaseFailed, Scenario, positive_int, scenario_parameters
from load_tests.stack import ServedStack, StackError
from load_tests.tables import print_result
from load_tests.target import ServedModelFacts, TargetError, TargetSpec
from load_tests.workload import NANO_LARGEST_ID, Phase, TokenIdSource

PROGRAM = "python -m load_tests"


def main(argv: Sequence[str], program: str = PROGRAM) -> int:
    parser = _make_parser(program)
    args = parser.parse_args(argv)
    if not (args.grpc or args.rest or args.serve):
        parser.error("say where to send requests: --grpc HOST:PORT, --rest URL, or --serve 'FLAGS' to start a server")
    if args.serve and (args.grpc or args.rest):
        parser.error("--serve starts a server of its own: leave --grpc and --rest out, and choose with --over")
    console = Console(stderr=False)
    try:
        with contextlib.ExitStack() as on_exit:
            facts = measurement_facts(PROGRAM.removeprefix("python -m "), argv)
            stack = None
            if args.serve:
                stack = on_exit.enter_context(ServedStack(shlex.split(args.serve), args.ready_timeout_s))
            has_failures = False
            for spec in _targets(args, stack):
                result = facts | uvloop.run(Measurement(args, spec, stack).run())
                has_failures |= any(phase["numbers"]["num_failed"] for phase in result["phases"])
                if args.json:
                    print(orjson.dumps(result).decode(), flush=True)
                else:
                    print_result(result, console)
                if args.out is not None:
                    append_result(args.out, result)
    except (TargetError, StackError, PhaseFailed, ValueError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    return 1 if has_failures else 0


class Measurement:
    """One scenario against one target: its phases one after another, within one limit of time."""

    def __init__(self, args: argparse.Namespace, spec: TargetSpec, stack: ServedStack | None) -> None:
        self._args, self._spec, self._stack = args, spec, stack
        self._scenario: Scenario = SCENARIOS[args.scenario]
        self._slo = Slo.parse(args.slo) if args.slo else None
        self._phases: list[dict[str, Any]] = []

    async def run(self) -> dict[str, Any]:
        args = self._args
        self._deadline_s = time.monotonic() + args.timeout_s
        async with open_driver(self._spec, args.processes) as driver:
            self._driver = driver
            model = await driver.facts()
            self._check_context(model)
            limit = min(args.token_id_limit, model.vocab_size or args.token_id_limit)
            seed = args.seed if args.seed is not None else secrets.randbits(32)
            headline = await self._scenario.run(args, TokenIdSource(seed, limit), self._run_phase)
        result: dict[str, Any] = {
            "scenario": args.scenario,
            "label": args.label,
            "parameters": scenario_parameters(args, self._scenario),
            "target": {
                "kind": self._spec.kind,
                "model": self._spec.model or model.model,
                "num_streams": self._spec.num_streams if self._spec.kind == "grpc" else None,
                "temperature": self._spec.temperature,
                "ignore_eos": self._spec.ignore_eos,
            },
            "token_ids": {"seed": seed, "limit": limit},
            "num_processes": args.processes,
            "headline": headline,
            "phases": self._phases,
        }
        if self._stack is not None:
            result["serve"] = {"flags": args.serve, "ready_s": round(self._stack.ready_s, 2)}
        return result

    def _check_context(self, model: ServedModelFacts) -> None:
        longest = self._scenario.longest_sequence(self._args)
        if model.max_model_len is not None and longest > model.max_model_len:
            raise TargetError(
                f"{self._args.scenario} has sequences of up to {longest} tokens, and {model.model} is served with a "
                f"context of {model.max_model_len}: serve it with --max-model-len {longest}, or ask for shorter ones"
            )

    async def _run_phase(self, phase: Phase) -> PhaseResult:
        timeout_s = self._deadline_s - time.monotonic()
        if timeout_s <= 0:
            raise PhaseFailed(f"--timeout-s {self._args.timeout_s:g} was over before phase {phase.name}")
        before_s = self._stack.cpu_s() if self._stack is not None else {}
        async with phase_bar(phase, self._driver, Console(stderr=True)):
            result = await self._driver.run(phase, timeout_s)
        if self._stack is not None:
            after_s = self._stack.cpu_s()
            result.server_cpu_s = {name: after_s[name] - before_s[name] for name in before_s if name in after_s}
        if phase.name != "warm-up":
            self._phases.append(_phase_result(phase, result, self._slo))
        return result


def _phase_result(phase: Phase, result: PhaseResult, slo: Slo | None) -> dict[str, Any]:
    numbers = phase_numbers(result.records, slo)
    num_tokens = numbers.get("num_output_tokens", 0)

    def cost(cpu_s: float) -> dict[str, float | None]:
        return {
            "cpu_s": round(cpu_s, 4),
            "core_share": round(cpu_s / result.wall_s, 4),
            "cpu_us_per_token": round(cpu_s / num_tokens * 1e6, 3) if num_tokens else None,
        }

    described: dict[str, Any] = {
        "name": phase.name,
        "numbers": numbers,
        "driver": cost(result.driver_cpu_s) | {"num_processes": result.num_processes},
    }
    if result.server_cpu_s:
        described["server"] = {name: cost(cpu_s) for name, cpu_s in result.server_cpu_s.items()}
    return described


def _targets(args: argparse.Namespace, stack: ServedStack | None) -> list[TargetSpec]:
    grpc = stack.grpc_address if stack is not None and args.over in ("grpc", "both") else args.grpc
    rest = stack.url if stack is not None and args.over in ("rest", "both") else args.rest

    def spec(kind: Any, address: str) -> TargetSpec:
        return TargetSpec(
            kind=kind,
            address=address,
            model=args.model,
            api_key=args.api_key,
            num_streams=args.streams,
            temperature=args.temperature,
            ignore_eos=args.ignore_eos,
        )

    return [spec(kind, address) for kind, address in (("grpc", grpc), ("rest", rest)) if address]


def _make_parser(program: str) -> argparse.ArgumentParser:
    description = "Send a standard workload to a server and write down what came of it."
    parser = argparse.ArgumentParser(prog=program, description=description, allow_abbrev=False)
    words = parser.add_subparsers(dest="scenario", required=True, metavar="SCENARIO")
    shared = _shared_flags()
    for name, scenario in SCENARIOS.items():
        sub = words.add_parser(
            name, help=scenario.help, description=scenario.help, parents=[shared], allow_abbrev=False
        )
        scenario.add_arguments(sub.add_argument_group("scenario"))  # type: ignore[arg-type]
    return parser


def _shared_flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    where = parser.add_argument_group("target")
    where.add_argument("--grpc", metavar="ADDRESS", help="HOST:PORT or unix:/PATH of stepwire's public gRPC API")
    where.add_argument("--rest", metavar="URL", help="URL of any server with OpenAI's /v1/completions")
    where.add_argument("--serve", metavar="FLAGS", help="start `stepwire serve FLAGS` for this run, and stop it after")
    where.add_argument(
        "--over", choices=("grpc", "rest", "both"), default="both", help="with --serve: which API (default: both)"
    )
    where.add_argument("--ready-timeout-s", type=float, default=600.0, help="with --serve: (default: %(default)s)")
    where.add_argument("--model", default="", help="model name to ask for (default: the one that is served)")
    where.add_argument("--api-key", help="key that the server wants")
    where.add_argument("--streams", type=positive_int, default=1, help="gRPC: Session streams (default: %(default)s)")
    work = parser.add_argument_group("work")
    work.add_argument("--seed", type=int, help="seed of the prompts' token ids (default: a new one each run)")
    work.add_argument(
        "--token-id-limit",
        type=positive_int,
        default=NANO_LARGEST_ID,
        help="prompt ids are below this and below the vocabulary's size, where it is known (default: %(default)s)",
    )
    work.add_argument("--temperature", type=float, default=0.6, help="(default: %(default)s)")
    work.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="make every request as long as asked for (default: on)",
    )
    run = parser.add_argument_group("run")
    run.add_argument("--processes", type=positive_int, default=1, help="driver processes (default: %(default)s)")
    run.add_argument("--timeout-s", type=float, default=600.0, help="limit for all phases (default: %(default)s)")
    run.add_argument("--slo", metavar="LIMITS", help="goodput's limits: ttft=200ms,tpot=20ms (also itl, e2e)")
    run.add_argument("--out", type=Path, metavar="FILE", help="append the result to this file, as a JSON line")
    run.add_argument("--json", action="store_true", help="print the result as a JSON line, not as a table")
    run.add_argument("--label", default="", help="a word for this run, kept in the result")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
