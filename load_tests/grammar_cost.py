"""What grammar masks cost: tokens/s of a served model with every row held to a schema of 30 fields, against rows that
are free, in turns within one run. `python -m load_tests.grammar_cost --url http://127.0.0.1:8000/v1`.

Both kinds generate the same number of tokens, so that a step has the same rows in both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from load_tests.results import append_result, measurement_facts

NUM_FIELDS = 30
SCHEMA = {
    "type": "object",
    "properties": {
        f"field_{index}": [
            {"type": "string", "minLength": 8, "maxLength": 40},
            {"type": "integer", "minimum": 0},
            {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 4},
        ][index % 3]
        for index in range(NUM_FIELDS)
    },
    "required": [f"field_{index}" for index in range(NUM_FIELDS)],
    "additionalProperties": False,
}


async def tokens_per_s(client: httpx.AsyncClient, url: str, num_rows: int, max_tokens: int, *, held: bool) -> float:
    """Of one round: `num_rows` requests at once. Tokens that were generated over the time of the whole round."""

    async def one(index: int) -> int:
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": f"Describe number {index} as JSON."}],
            "max_tokens": max_tokens,
            "seed": index,
        }
        # A schema is never complete within so few tokens; a free row must not end before.
        body |= {"guided_json": SCHEMA} if held else {"ignore_eos": True}
        answer = await client.post(f"{url}/chat/completions", json=body)
        answer.raise_for_status()
        return int(answer.json()["usage"]["completion_tokens"])

    begun = time.monotonic()
    counts = await asyncio.gather(*(one(index) for index in range(num_rows)))
    return sum(counts) / (time.monotonic() - begun)


async def measure(url: str, num_rows: int, max_tokens: int, num_rounds: int) -> dict[str, Any]:
    rates: dict[str, list[float]] = {"free": [], "held": []}
    async with httpx.AsyncClient(timeout=600) as client:
        for held in (False, True):  # warm: prefixes cached, the grammar compiled
            await tokens_per_s(client, url, num_rows, 4, held=held)
        for _ in range(num_rounds):
            for held in (False, True):
                rate = await tokens_per_s(client, url, num_rows, max_tokens, held=held)
                rates["held" if held else "free"].append(round(rate, 1))
    ratios = [held / free for held, free in zip(rates["held"], rates["free"], strict=True)]
    return {
        "scenario": "grammar_cost",
        "num_rows": num_rows,
        "max_tokens": max_tokens,
        "num_fields": NUM_FIELDS,
        "tokens_per_s": rates,
        "held_over_free": round(statistics.median(ratios), 4),
        "held_over_free_range": [round(min(ratios), 4), round(max(ratios), 4)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="base URL of a running server")
    parser.add_argument("--rows", type=int, default=64, help="requests at once (default: 64)")
    parser.add_argument("--max-tokens", type=int, default=96, help="tokens a request generates (default: 96)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each kind, in turns (default: 3)")
    parser.add_argument("--output", type=Path, help="append the result to this file")
    arguments = parser.parse_args()
    facts = measurement_facts("load_tests.grammar_cost", sys.argv[1:])
    result = facts | asyncio.run(measure(arguments.url, arguments.rows, arguments.max_tokens, arguments.rounds))
    print(json.dumps(result))
    if arguments.output is not None:
        append_result(arguments.output, result)


if __name__ == "__main__":
    main()
