"""The real stack in processes of its own: simulated worker, control plane, gateway."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import httpx
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.system.asking import LIMIT_S, ask
from tests.system.launched import Launched
from tests.system.ports import free_port
from tests.system.standing_still import standing_still

ROOT = Path(__file__).resolve().parents[2]
# On a machine that may be busy; limits only end a test that has failed.
START_LIMIT_S = 180.0
STOP_LIMIT_S = 90.0

SMOLLM2_NAME = "SmolLM2-135M-Instruct"
MINILM_NAME = "all-MiniLM-L6-v2"
VOCAB_SIZE = 640
MAX_MODEL_LEN = 4096
BOS, EOS = "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'forbidden' %}{{ raise_exception('roles must not be forbidden') }}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content }}"
    "{% if not loop.last or not continue_final_message|default(false) %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CORPUS = (
    "A worker computes what the control plane decides. Ein Überblick über größere Straßen. 日本語の文章と漢字。 "
    "Какой сегодня день? 😀 🎉 emoji. The capital of France is Paris. 0 1 2 3 4 5 6 7 8 9 10 11 12 13."
)


def write_model_directory(directory: Path, special_tokens: Sequence[str] = ()) -> Path:
    """What a control plane reads of a small model, and what the simulated worker reads: JSON files only.

    special_tokens: besides the two that open and close a turn.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True) for token in (BOS, EOS, *special_tokens)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([_CORPUS] * 3, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    end = tokenizer.token_to_id(EOS)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": MAX_MODEL_LEN,
        "eos_token_id": end,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": CHAT_TEMPLATE, "bos_token": BOS, "eos_token": EOS})
    )
    return directory


@dataclass
class Stack:
    """Gateway, control plane and workers that talk over unix sockets in a directory of their own. Flags are added to
    each one's command.

    Use as a context manager: it starts them, waits until the gateway is ready, and stops them.
    """

    model: Path
    worker_flags: Sequence[str] = ()
    control_plane_flags: Sequence[str] = ()
    gateway_flags: Sequence[str] = ()
    # Sent by the helpers below, and by whoever builds a client.
    api_key: str | None = None
    # One a group: `worker`, `worker-1`, ...
    num_workers: int = 1
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Not pytest's own directory: a unix socket's path has 107 characters at most.
        self.directory = Path(tempfile.mkdtemp(prefix="stepwire-"))
        self.port, self.metrics_port, self.grpc_port = free_port(), free_port(), free_port()

    @property
    def workers(self) -> list[str]:
        return ["worker", *(f"worker-{number}" for number in range(1, self.num_workers))]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def __enter__(self) -> Stack:
        try:
            for name in (*self.workers, "control_plane", "gateway"):
                self.start(name)
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def command(self, name: str) -> list[str]:
        control_plane = f"unix:{self.directory}/control_plane.sock"
        common = ["--model", str(self.model)]
        match name:
            case worker if worker in self.workers:
                flags = [
                    *common,
                    "--runner",
                    "simulated",
                    "--listen",
                    f"unix:{self.directory}/{worker}.sock",
                    "--sim-max-model-len",
                    str(MAX_MODEL_LEN),
                ]
                return ["gpu_worker", *flags, *self.worker_flags]
            case "control_plane":
                flags = [
                    *common,
                    "--served-model-name",
                    "tiny,alias/tiny",
                    "--workers",
                    ",".join(f"unix:{self.directory}/{worker}.sock" for worker in self.workers),
                    "--listen",
                    control_plane,
                ]
                ports = ["--grpc-port", str(self.grpc_port), "--metrics-port", str(self.metrics_port)]
                return ["control_plane", *flags, *ports, *self.control_plane_flags]
            case "gateway":
                flags = ["--port", str(self.port), "--control-plane", control_plane]
                key = ["--api-key", self.api_key] if self.api_key else []
                return ["gateway", *flags, *key, *self.gateway_flags]
        raise ValueError(name)

    def start(self, name: str) -> None:
        """Start one process; its output is added to `<name>.log` in the directory."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("STEPWIRE_")}
        environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / source) for source in (".", "proto", "kernels"))
        with (self.directory / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", *self.command(name), "--exit-with-parent"],
                cwd=self.directory,
                env=environment,
                stdout=log,
                stderr=log,
            )

    def wait_ready(self) -> None:
        """Until the gateway answers /ready with 200."""
        wait_until(self._is_ready, START_LIMIT_S, self.logs)

    def _is_ready(self) -> bool:
        for name, process in self.processes.items():
            if process.poll() is not None:
                raise RuntimeError(f"{name} ended with {process.returncode}\n{self.logs()}")
        try:
            return ask(f"{self.url}/ready").status_code == 200
        except httpx.TransportError:
            return False

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal and wait for the end; the exit code."""
        process = self.processes.pop(name)
        process.send_signal(number)
        return process.wait(STOP_LIMIT_S)

    def paused(self, *names: str) -> AbstractContextManager[None]:
        """These processes (by default the worker) stand still in the block."""
        return standing_still([self.processes[name] for name in names or ("worker",)])

    def stop(self) -> None:
        """In the order in which requests flow, so that nobody waits for one that has gone."""
        for name in ("gateway", "control_plane", *self.workers):
            process = self.processes.get(name)
            if process is None:
                continue
            process.terminate()
            try:
                process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()
        shutil.rmtree(self.directory, ignore_errors=True)

    def logs(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text()[-4000:]}" for path in sorted(self.directory.glob("*.log"))
        )

    def gateway_metric(self, sample: str) -> float:
        """A sample of the gateway's /metrics, by name and labels as they stand there."""
        return read_sample(ask(f"{self.url}/metrics", self.headers).text, sample)

    def control_plane_metric(self, sample: str) -> float:
        return read_sample(self.control_plane_page(), sample)

    def control_plane_page(self) -> str:
        return ask(f"http://127.0.0.1:{self.metrics_port}/metrics").text

    def wait_open(self, num_requests: int) -> None:
        """Until so many requests have been accepted and are not over, whether they run or wait."""
        self.wait_for("stepwire_open_requests", num_requests)

    def wait_for(self, sample: str, value: float) -> None:
        """Until a sample of the control plane has this value."""
        wait_until(lambda: self.control_plane_metric(sample) == value, LIMIT_S, self.logs)

    def wait_streams(self, number: int) -> None:
        """Until so many streams are open at the gateway."""
        wait_until(lambda: self.gateway_metric("stepwire_gateway_open_streams") == number, LIMIT_S, self.logs)

    def wait_idle(self, limit_s: float = LIMIT_S) -> None:
        """Until no request runs or waits and no KV block is in use at the control plane."""
        names = ("stepwire_requests_running", "stepwire_requests_waiting", "stepwire_kv_blocks_in_use")

        def is_idle() -> bool:
            text = self.control_plane_page()
            return all(read_sample(text, name) == 0 for name in names)

        wait_until(is_idle, limit_s, self.logs)


def read_sample(text: str, sample: str) -> float:
    """A sample by name and labels as they stand there; by its name alone, the sum over all labels."""
    starts = (f"{sample} ",) if "{" in sample else (f"{sample} ", f"{sample}{{")
    values = [float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(starts)]
    if not values:
        raise LookupError(f"no sample {sample} in:\n{text}")
    return sum(values)


def wait_until(
    condition: Callable[[], bool], limit_s: float, explain: Callable[[], str] = str, *, every_s: float = 0.02
) -> None:
    """Poll, less often as time goes by; the limit only ends a test that has failed. `every_s`: how often at first."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {limit_s} s\n{explain()}")
        time.sleep(every_s)
        every_s = max(every_s, min(every_s * 1.1, 0.1))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory without weights: byte-level tokenizer, chat template, config."""
    return write_model_directory(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def stack(tiny_model: Path) -> Iterator[Stack]:
    """A stack that tests share; leave it running and idle."""
    with Stack(tiny_model, worker_flags=["--sim-step-ms", "1"]) as running:
        yield running


@pytest.fixture(scope="session")
def smollm2_server(smollm2_dir: Path) -> Iterator[Launched]:
    """The default model, served for tests that share it: leave it running, whatever has died in between."""
    # float32: what is compared token for token must not hang on the rounding of a batch's shape.
    flags = ("--dtype=float32", f"--served-model-name={SMOLLM2_NAME}", "--cpu-kv-cache-gib=0.5")
    with Launched(smollm2_dir, *flags) as launched:
        yield launched


@pytest.fixture(scope="session")
def minilm_server(minilm_dir: Path) -> Iterator[Launched]:
    """all-MiniLM-L6-v2, served for tests that share it: leave it running."""
    with Launched(minilm_dir, "--dtype=float32", f"--served-model-name={MINILM_NAME}") as launched:
        yield launched


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint for workers that compute."""
    from tests.unit.gpu_worker.models.tiny_checkpoints import save_tiny  # imports transformers, which few tests need

    directory: Path = tmp_path_factory.mktemp("models") / "llama"
    save_tiny("llama", directory)
    return directory
