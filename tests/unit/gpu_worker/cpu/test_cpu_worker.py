"""Whole models in the compiled kernels: SmolLM2 beside torch, mixed steps, shared prefixes, other families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from gpu_worker.config import WorkerSettings
from gpu_worker.cpu.attention import CpuAttention
from gpu_worker.layers.decoder import HiddenStates
from gpu_worker.runner import TorchRunner
from load_tests.cpu_worker.step_driver import StepDriver, greedy
from tests.unit.gpu_worker.models.tiny_checkpoints import save_tiny

TEXT = (
    "The Danube rises in the Black Forest in Germany and flows south-east for 2,850 km, passing through or bordering "
    "ten countries before it reaches the Black Sea. It is the second-longest river in Europe, after the Volga."
)
# Its first token wins by 1.4, more than bfloat16 moves logits; after "What is the capital of France?" it is 0.1.
QUESTION = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nName the capital of France.<|im_end|>\n<|im_start|>assistant\n"
)


class Recorded:
    """A runner that keeps the logits of its steps."""

    def __init__(self, directory: Path, **changes: Any) -> None:
        values: dict[str, Any] = {"dtype": "bfloat16", "num_threads": 2, "max_model_len": 512}
        values |= {
            "cpu_kv_cache_gib": 0.2,
            "cpu_kernels": "off" if changes.get("dtype") == "float32" else "on",
        } | changes
        threads = torch.get_num_threads()
        self.runner = TorchRunner.load(WorkerSettings(model=directory, device="cpu", **values))
        torch.set_num_threads(threads)
        self.logits: list[torch.Tensor] = []
        self._to_logits = self.runner._to_own_logits
        self.runner._to_own_logits = self._record

    def _record(self, hidden: HiddenStates) -> torch.Tensor:
        logits = self._to_logits(hidden)
        self.logits.append(logits.float().clone())
        return logits


@pytest.fixture(scope="module")
def ids(smollm2_dir: Path) -> Any:
    tokenizer = tokenizers.Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def compiled(smollm2_dir: Path) -> Recorded:
    return Recorded(smollm2_dir)


def prefix_logits(recorded: Recorded, tokens: list[int], first: int) -> torch.Tensor:
    """Logits after all tokens, then after each shorter prefix of at least `first`: [n, vocab_size].

    The prefixes share the whole's blocks; each one's last token is run alone, all of them in one step.
    """
    recorded.logits.clear()
    driver = StepDriver(recorded.runner)
    driver.add(0, tokens, greedy())
    driver.step()
    for stop in range(first, len(tokens)):
        shared = (stop - 1) // driver.facts.block_size * driver.facts.block_size
        driver.add(stop, tokens[:stop], greedy(), prefix_of=0, num_shared_tokens=shared)
    prefixes = range(first, len(tokens))
    driver.step({row: waiting - 1 for row in prefixes if (waiting := driver.rows[row].num_waiting) > 1})
    driver.step({row: 1 for row in prefixes})
    return torch.cat(recorded.logits)


def test_no_further_from_float32_than_torchs_bfloat16(compiled: Recorded, smollm2_dir: Path, ids: Any) -> None:
    tokens = ids(TEXT)
    first = len(tokens) - 32
    exact = prefix_logits(Recorded(smollm2_dir, dtype="float32", num_threads=1), tokens, first)
    plain = prefix_logits(Recorded(smollm2_dir, cpu_kernels="off", num_threads=1), tokens, first)
    ours = prefix_logits(compiled, tokens, first)

    def error(logits: torch.Tensor) -> float:
        return float(((logits - exact).norm(dim=1) / exact.norm(dim=1)).mean())

    # Both are noise of one size: a row's error is 0.006 to 0.04, its spread as large as itself.
    assert error(ours) < 1.3 * error(plain)
    assert (ours.argmax(-1) == exact.argmax(-1)).float().mean() > 0.9


def answer(recorded: Recorded, prompt: list[int], num_tokens: int = 8) -> list[int]:
    driver = StepDriver(recorded.runner)
    driver.add(0, prompt, greedy())
    for _ in range(num_tokens):
        driver.step()
    return driver.rows[0].tokens[len(prompt) :]


def test_it_knows_the_capital_of_france(compiled: Recorded, smollm2_dir: Path, ids: Any) -> None:
    assert isinstance(compiled.runner.attention, CpuAttention)
    tokenizer = tokenizers.Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))
    assert "Paris" in tokenizer.decode(answer(compiled, ids(QUESTION)))


def test_mixed_steps_and_shared_prefixes_give_the_answer_too(compiled: Recorded, smollm2_dir: Path, ids: Any) -> None:
    """A decode beside the chunks of another's prompt, and a prompt whose first blocks another row has written."""
    question = ids(QUESTION)
    driver = StepDriver(compiled.runner)
    driver.add(0, question, greedy())
    driver.step()
    driver.add(1, ids(TEXT) + question, greedy())
    while (waiting := driver.rows[1].num_prompt_tokens - driver.rows[1].num_computed) > 0:
        driver.step({0: 1, 1: min(17, waiting)})
    driver.add(2, question, greedy(), prefix_of=0, num_shared_tokens=32)
    for _ in range(8):
        driver.step()
    tokenizer = tokenizers.Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))
    for row in (0, 2):
        assert "Paris" in tokenizer.decode(driver.rows[row].tokens[len(question) :][:8])


# Windows, soft caps, sinks, norms of heads and of projections, partial and interleaved rotation, LayerNorm, parallel
# blocks, MLPs without gate, layers without rope, experts, latent attention, heads of several sizes, layers that read
# another's cache, values that are keys.
FAMILIES = [
    "llama-tied-bias",
    "llama-gelu-mha",
    "mistral-window",
    "qwen3",
    "gemma2",
    "gemma3",
    "gemma4",
    "gemma4-large",
    "gemma4-moe",
    "phi3-longrope-partial",
    "smollm3",
    "olmo2",
    "granite",
    "cohere",
    "cohere-plus",
    "starcoder2",
    "mixtral",
    "gpt-oss",
    "deepseek-v2",
]


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_as_exact_as_in_torch(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path, dtype=torch.bfloat16)
    tokens = torch.randint(1, 90, (40,), generator=torch.Generator().manual_seed(5)).tolist()
    few = {"cpu_kv_cache_gib": 0.01, "max_model_len": 64, "num_threads": 1}
    exact, plain, ours = (
        prefix_logits(Recorded(tmp_path, **few, **changes), tokens, 25)
        for changes in ({"dtype": "float32"}, {"cpu_kernels": "off"}, {})
    )

    def error(logits: torch.Tensor) -> float:
        """Of the middle row: where a router rounds to another expert, a row is far off."""
        return float(((logits - exact).norm(dim=1) / exact.norm(dim=1)).median())

    assert ours.isfinite().all()
    assert error(ours) < 1.5 * error(plain)
