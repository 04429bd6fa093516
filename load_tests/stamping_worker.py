"""A simulated worker whose tokens say when they were made: `python -m load_tests.stamping_worker FLAGS`.

A token is the time at which its step ended on the simulated device, in ticks of 0.1 ms of CLOCK_MONOTONIC, which all
processes of a machine share. A client that reads its text knows to 0.1 ms how long it was on its way: through the
worker's gRPC, control plane, gateway and sockets. Flags are those of `python -m gpu_worker`, with a model directory
from `write_stamp_model`.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gpu_worker import __main__ as worker
from gpu_worker.config import WorkerSettings
from gpu_worker.runner_api import StepBatch, StepResult, TokenMask
from gpu_worker.simulated import SimulatedRunner, SimulatedStep, SimulationSpec

TICK_NS = 100_000
# They repeat after 5 s: a token that is older than that is not told from a new one.
NUM_STAMPS = 50_000
_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
_FIRST_STAMP = len(_ALPHABET)
_STAMP = re.compile(rb" (\d{5})(?=[ \"])")
CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def write_stamp_model(directory: Path, max_model_len: int) -> None:
    """A byte-level tokenizer with a token for each stamp (" 01234"), which no text is encoded to."""
    vocab = {character: index for index, character in enumerate(_ALPHABET)}
    vocab |= {f"Ġ{stamp:05d}": _FIRST_STAMP + stamp for stamp in range(NUM_STAMPS)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"model_type": "llama", "vocab_size": len(vocab), "max_position_embeddings": max_model_len}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))


def stamps_in(data: bytes) -> list[int]:
    """The stamps of all tokens whose text stands in these events."""
    return [int(stamp) for stamp in _STAMP.findall(data)]


def delays_ms(received_ns: int, stamps: list[int]) -> list[float]:
    """How long before this time of `time.monotonic_ns` each token was made."""
    ticks = received_ns / TICK_NS
    return [(ticks - stamp) % NUM_STAMPS * TICK_NS / 1e6 for stamp in stamps]


class StampingRunner(SimulatedRunner):
    """It checks nothing: the oracle would take a quarter of a core that the services are measured on."""

    def execute(self, batch: StepBatch, wait_for_mask: Callable[[], TokenMask]) -> SimulatedStep:
        forward_ns = self._duration_ns(batch)
        end_ns = self._device_free_ns = max(time.monotonic_ns(), self._device_free_ns) + forward_ns
        rows = batch.run_rows[batch.run_samples]
        stamp = _FIRST_STAMP + end_ns // TICK_NS % NUM_STAMPS
        result = StepResult(
            step_id=batch.step_id,
            rows=rows,
            offsets=np.arange(len(rows) + 1, dtype=np.uint32),
            token_ids=np.full(len(rows), stamp, dtype=np.uint32),
        )
        result.forward_ns = forward_ns
        return SimulatedStep(result, end_ns)


def _load_runner(settings: WorkerSettings, before_end: Callable[[str], None] | None = None) -> StampingRunner:
    return StampingRunner(SimulationSpec.from_settings(settings))


if __name__ == "__main__":
    worker.load_runner = _load_runner
    sys.exit(worker.main(sys.argv[1:]))
