"""llama.cpp through llama-cpp-python's bindings: all prompts in one context, a step of every sequence in one batch.

The package's own `Llama` knows one sequence at a time; what it is built on decodes many, as a server would.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from load_tests.cpu_worker.timing import Timing

# As many as the other engines run in one step.
_BATCH_TOKENS = 512


class LlamaCpp:
    """Greedy, on the GGUF file that the model was prepared from: its weights stay in four bits.

    `max_tokens`: of the longest sequence.
    """

    name = "llama.cpp"

    def __init__(
        self, gguf: Path, num_threads: int, num_sequences: int, max_tokens: int, *, repacks_weights: bool
    ) -> None:
        from llama_cpp import llama_cpp

        self._lib = llama_cpp
        self._silent = llama_cpp.llama_log_callback(_ignore)  # called as long as llama.cpp is there
        llama_cpp.llama_log_set(self._silent, None)
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.use_extra_bufts = repacks_weights
        self._model: Any = llama_cpp.llama_model_load_from_file(str(gguf).encode(), model_params)
        if self._model is None:
            raise RuntimeError(f"llama.cpp cannot load {gguf}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = -(-max_tokens // 256) * 256 * num_sequences
        params.n_seq_max = num_sequences
        params.n_batch = params.n_ubatch = _BATCH_TOKENS
        params.n_threads = params.n_threads_batch = num_threads
        self._context: Any = llama_cpp.llama_init_from_model(self._model, params)
        if self._context is None:
            raise RuntimeError("llama.cpp cannot make a context")
        self._batch: Any = llama_cpp.llama_batch_init(_BATCH_TOKENS, 0, 1)

    def generate(self, prompts: list[list[int]], num_tokens: int) -> Timing:
        begun = time.perf_counter()
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        last = self._run_prompts(prompts)
        for step in range(1, num_tokens):
            inputs = [(last[row], len(prompt) + step - 1, row, True) for row, prompt in enumerate(prompts)]
            last |= self._decode(inputs)
        return Timing(len(prompts) * num_tokens, time.perf_counter() - begun)

    def _run_prompts(self, prompts: list[list[int]]) -> dict[int, int]:
        """Each prompt's next token."""
        inputs = [
            (token, position, row, position == len(prompt) - 1)
            for row, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        drawn: dict[int, int] = {}
        for first in range(0, len(inputs), _BATCH_TOKENS):
            drawn |= self._decode(inputs[first : first + _BATCH_TOKENS])
        return drawn

    def _decode(self, inputs: Iterable[tuple[int, int, int, bool]]) -> dict[int, int]:
        """(token, position, sequence, whether it samples) -> the likeliest next token of those that sample."""
        batch = self._batch
        sampling: list[tuple[int, int]] = []
        for place, (token, position, row, samples) in enumerate(inputs):
            batch.token[place], batch.pos[place] = token, position
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, row
            batch.logits[place] = samples
            batch.n_tokens = place + 1
            if samples:
                sampling.append((place, row))
        code = self._lib.llama_decode(self._context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode gave {code}")
        return {row: self._likeliest(place) for place, row in sampling}

    def _likeliest(self, place: int) -> int:
        logits = self._lib.llama_get_logits_ith(self._context, place)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocab_size,)).argmax())


def _ignore(level: int, text: bytes, user_data: Any) -> None:
    """What it tells of a model's loading."""
