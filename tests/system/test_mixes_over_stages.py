"""Random mixes of requests over pipeline stages: what one rank says, whatever is shared, thrown out or comes late."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.system.launched import Launched
from tests.system.test_launcher import stream
from tests.system.test_parallel_serving import FLAGS
from tests.unit.gpu_worker.models.tiny_checkpoints import save_tiny

VOCAB_SIZE = 300
NUM_REQUESTS = 18
# Everything fits, and next to nothing does.
LARGE, SMALL = "--cpu-kv-cache-gib=0.05", "--cpu-kv-cache-gib=0.0003"


@dataclass(frozen=True, slots=True)
class Request:
    prompt: list[int]
    max_tokens: int
    seed: int
    num_choices: int
    delay_s: float


def mix(seed: int) -> list[Request]:
    """Prompts with a beginning in common, of up to four blocks, some of which end within a block."""
    draw = random.Random(seed)

    def token_ids(count: int) -> list[int]:
        return [draw.randrange(3, VOCAB_SIZE) for _ in range(count)]

    shared = token_ids(64)
    return [
        Request(
            shared[: draw.choice([0, 16, 33, 48, 64])] + token_ids(draw.randrange(1, 60)),
            max_tokens=draw.randrange(1, 60),
            seed=draw.randrange(1 << 30),
            num_choices=draw.choice([1, 1, 1, 2]),
            delay_s=draw.random(),
        )
        for _ in range(NUM_REQUESTS)
    ]


async def answers(launched: Launched, requests: list[Request]) -> list[dict[int, list]]:
    async def answer(of: Request) -> dict[int, list]:
        await asyncio.sleep(of.delay_s)
        return await stream(launched.base_url, "tiny", of.prompt, of.max_tokens, seed=of.seed, n=of.num_choices)

    return await asyncio.gather(*(answer(request) for request in requests))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("model", ["llama-tied-bias", "qwen3-moe", "qwen3.5"])
def test_random_mixes(model: str, tmp_path: Path) -> None:
    """The last stage has a head that is the first one's embedding; of the mixture's layers, some have experts; of
    Qwen3.5's, some keep states, which nobody takes over."""
    save_tiny(model, tmp_path)
    mixes = [mix(seed) for seed in range(3)]
    with Launched(tmp_path, *FLAGS, LARGE) as alone:
        expected = [asyncio.run(answers(alone, requests)) for requests in mixes]
        assert alone.metric("stepwire_preemptions_total") == 0
    stages = ("--pipeline-parallel-size=3", "--pipeline-parallel-layers=1,1,1")
    with Launched(tmp_path, *FLAGS, SMALL, *stages) as launched:
        assert [asyncio.run(answers(launched, requests)) for requests in mixes] == expected
        assert launched.metric("stepwire_preemptions_total") > 0
        assert (launched.metric("stepwire_prefix_cache_hits_total") > 0) == (model != "qwen3.5")
        assert launched.metric("stepwire_kv_blocks_in_use") == 0
