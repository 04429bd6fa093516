"""The worker's settings: flags win over STEPWIRE_* variables, these over a YAML file, and that over defaults."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from stepwire.process import settings as process_settings
from stepwire.process.settings import PositiveInt, ProcessSettings, TokenCounts

PROGRAM = "python -m gpu_worker"

# Settings of this one process: how it is reached, what it says, and failures that were planted.
_NOT_REPLAYED = frozenset(
    {
        "config",
        "log_level",
        "log_format",
        "exit_with_parent",
        "listen",
        "tls_cert",
        "tls_key",
        "tls_client_ca",
        "hang_limit_s",
        "kernel_cache_dir",
        "shutdown_grace_s",
        "record",
        "sim_crash_at_step",
        "sim_hang_at_step",
        "sim_drop_stream_at_step",
        "sim_delay_at_step",
        "sim_delay_s",
        "sim_out_of_order_at_step",
        "sim_poison_token",
    }
)


class WorkerSettings(ProcessSettings):
    """Serves one model to a control plane: runs its step batches and answers with the sampled tokens."""

    program: ClassVar[str] = PROGRAM

    # What is served, and where.
    model: Path | None = Field(None, description="model directory: config.json and *.safetensors")
    runner: Literal["torch", "simulated"] = Field(
        "torch",
        description="torch computes the model; simulated needs no weights, makes up tokens and checks every step",
    )
    listen: str = Field(
        "127.0.0.1:50061", description="where the control plane connects: HOST:PORT (port 0: any) or unix:/PATH"
    )
    tls_cert: Path | None = Field(None, description="PEM certificate chain of this server; with tls_key, for HOST:PORT")
    tls_key: Path | None = Field(None, description="PEM private key of tls_cert")
    tls_client_ca: Path | None = Field(
        None, description="PEM roots; only clients with a certificate by them may connect"
    )
    hang_limit_s: float = Field(
        30.0,
        gt=0,
        description="seconds that a new session may wait behind a step without end; then the process ends as hung",
    )
    shutdown_grace_s: float = Field(
        10.0, ge=0, description="seconds that queued steps may still take after SIGTERM before the process ends anyway"
    )
    record: Path | None = Field(
        None,
        description="file that every step and its result is appended to, for `stepwire replay FILE`; holds token ids",
    )

    # The ranks of a group: tensor_parallel_size x pipeline_parallel_size, of which this worker is rank 0.
    tensor_parallel_size: PositiveInt = Field(
        1, description="ranks that share every layer; each device holds a part of its weights and of its KV cache"
    )
    pipeline_parallel_size: PositiveInt = Field(
        1, description="stages of ranks that hold some of the layers each, working on different steps at a time"
    )
    pipeline_parallel_layers: TokenCounts = Field(
        (), description="layers of each stage, as 10,22, for devices that are not equal; default: split by cost"
    )
    enable_expert_parallel: bool = Field(
        False, description="a stage's ranks hold different experts of a mixture, not a part of each"
    )
    num_nodes: PositiveInt = Field(
        1, description="machines that the ranks are spread over; all but the first run a worker with --join"
    )
    group_listen: str | None = Field(
        None,
        description="HOST:PORT where the group's other nodes join rank 0's, for num_nodes above 1; HOST is an address "
        "that they reach",
    )
    join: str | None = Field(
        None,
        description="HOST:PORT of the group_listen of a group's first node: this process holds ranks of that group, "
        "and takes their settings from it",
    )
    group_tls_cert: Path | None = Field(
        None, description="PEM certificate chain of this node towards the group's others; with group_tls_key and _ca"
    )
    group_tls_key: Path | None = Field(None, description="PEM private key of group_tls_cert")
    group_tls_ca: Path | None = Field(None, description="PEM roots of the certificates of all of the group's nodes")
    group_timeout_s: float = Field(
        25.0, gt=0, description="seconds that ranks wait for one another while their group forms"
    )

    # The model's numbers.
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto is cuda where there is a device, else cpu")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="element type of weights and activations; auto is the model's own where the device is fast at it",
    )
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "float16", "fp8"] = Field(
        "auto", description="element type of the KV cache; auto is dtype, fp8 is float8_e4m3fn (half the memory)"
    )
    quantization: Literal["auto", "fp8", "int8"] = Field(
        "auto",
        description="auto takes the weights as the checkpoint has them, quantized or not; fp8 and int8 quantize plain "
        "ones while they are loaded (8 bits, a scale for every output; inputs per token)",
    )
    task: Literal["auto", "generate", "embed", "score"] = Field(
        "auto",
        description="what the model is served for: generate draws tokens, embed gives vectors, score rates pairs of "
        "texts (a classification head with one label); auto asks the checkpoint",
    )
    pooling: Literal["auto", "last", "mean", "cls"] = Field(
        "auto",
        description="embed: which hidden states become the vector, the last token's, the first's (cls) or their mean; "
        "auto is what the checkpoint says, else cls for encoders and last for decoders",
    )
    load_format: Literal["auto", "dummy"] = Field(
        "auto", description="dummy: random weights from config.json alone, to try a shape without downloading it"
    )
    seed: int = Field(
        0, ge=0, description="seed of dummy weights; a request's own seed decides how its tokens are drawn"
    )
    max_model_len: PositiveInt | None = Field(
        None,
        description="longest sequence, prompt and output together, in tokens; default: what the model was made for",
    )
    max_num_seqs: PositiveInt | None = Field(
        None, description="rows in the table: most sequences that run at once; default: 256 on cuda, 64 on cpu"
    )
    max_num_batched_tokens: PositiveInt | None = Field(
        None, description="most tokens one step may run; default: the runner's choice for the device"
    )
    block_size: PositiveInt | None = Field(None, description="tokens a KV block holds; default: 64 on cuda, 16 on cpu")
    gpu_memory_utilization: float = Field(
        0.90, gt=0, le=1, description="share of the device's memory for weights, activations and KV cache together"
    )
    enforce_eager: bool = Field(
        False, description="cuda: launch every kernel by itself instead of replaying CUDA graphs (slow; to debug)"
    )
    deterministic: bool = Field(
        False,
        description="a prompt gives the same tokens and log-probabilities, to the bit, alone and in any batch, however "
        "it is cut into steps, on one kind of machine with one num_threads; slower",
    )
    cpu_kv_cache_gib: float = Field(2.0, gt=0, description="size of the KV cache on device cpu, in GiB")
    cpu_kernels: Literal["auto", "on", "off"] = Field(
        "auto",
        description="compiled kernels for --dtype bfloat16 on a CPU (they need numba); auto takes them where the CPU "
        "has no instructions for bfloat16, off is torch alone",
    )
    kernel_cache_dir: Path | None = Field(
        None, description="directory that keeps compiled CPU kernels; default: ~/.cache/stepwire/kernels"
    )
    num_threads: PositiveInt | None = Field(None, description="CPU threads of torch; default: one per physical core")

    # The simulated runner.
    sim_num_blocks: int = Field(4096, ge=2, description="simulated: KV blocks, block 0 (the worker's own) included")
    sim_block_size: PositiveInt | None = Field(
        None, description="simulated: tokens a block holds; default: block_size, else 16"
    )
    sim_max_num_seqs: PositiveInt | None = Field(None, description="simulated: rows; default: max_num_seqs, else 256")
    sim_max_model_len: PositiveInt | None = Field(
        None, description="simulated: longest sequence in tokens; default: max_model_len, else 8192"
    )
    sim_max_num_batched_tokens: PositiveInt | None = Field(
        None, description="simulated: most tokens a step; default: max_num_batched_tokens, else 2048"
    )
    sim_buckets: TokenCounts = Field(
        (), description="simulated: token counts that steps are padded to, ascending, as 8,16,32; default: no padding"
    )
    sim_vocab_size: PositiveInt | None = Field(
        None, description="simulated: token ids are below this; default: the model's config.json, else 32000"
    )
    sim_eos_token_id: int | None = Field(
        None,
        ge=0,
        description="simulated: drawn by sim_eos_probability only; default: the model's config.json, else none",
    )
    sim_eos_probability: float = Field(
        0.0, ge=0, le=1, description="simulated: chance that a drawn token ends the sequence"
    )
    sim_step_ms: float = Field(2.0, ge=0, description="simulated: what every step takes, in milliseconds")
    sim_token_us: float = Field(
        0.0, ge=0, description="simulated: what a token of a step adds, padding included, in microseconds"
    )
    sim_row_us: float = Field(0.0, ge=0, description="simulated: what a row of a step adds, in microseconds")
    sim_strict: bool = Field(False, description="simulated: a step that breaks the contract ends the process")
    # Planted failures. Steps are counted over the life of the process, from 1, so that each happens once.
    sim_crash_at_step: PositiveInt | None = Field(
        None, description="simulated: the process fails at this step (counted from 1)"
    )
    sim_hang_at_step: PositiveInt | None = Field(None, description="simulated: this step never ends")
    sim_drop_stream_at_step: PositiveInt | None = Field(
        None, description="simulated: the session is closed at this step"
    )
    sim_delay_at_step: PositiveInt | None = Field(None, description="simulated: this step takes sim_delay_s longer")
    sim_delay_s: float = Field(1.0, ge=0, description="simulated: see sim_delay_at_step")
    sim_out_of_order_at_step: PositiveInt | None = Field(
        None, description="simulated: the result of this step carries the id of the next one"
    )
    sim_fault_row_token: int | None = Field(
        None, ge=0, description="simulated: a row that runs this token id fails, the rest of the step goes on"
    )
    sim_poison_token: int | None = Field(None, ge=0, description="simulated: running this token id fails the process")

    def replayable_flags(self) -> list[str]:
        """What somebody set of that which decides what a step gives, as flags: what a recording keeps of it."""
        flags: list[str] = []
        for name in sorted(self.model_fields_set - _NOT_REPLAYED):
            value, flag = getattr(self, name), name.replace("_", "-")
            if isinstance(value, bool):
                flags.append(f"--{flag}" if value else f"--no-{flag}")
            elif isinstance(value, tuple):
                flags.append(f"--{flag}={','.join(str(part) for part in value)}")
            elif value is not None:
                flags.append(f"--{flag}={value.absolute() if isinstance(value, Path) else value}")
        return flags

    @model_validator(mode="after")
    def _check_together(self) -> WorkerSettings:
        self._check_group()
        if self.runner == "torch" and self.model is None:
            raise ValueError(
                "--model is missing: give the model's directory, or --runner simulated for one without weights"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key belong together: give both, or neither")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError(
                "--tls-client-ca needs --tls-cert and --tls-key: without them the connection is not encrypted"
            )
        if self.tls_cert is not None and self.listen.startswith("unix:"):
            raise ValueError(f"--tls-cert is for HOST:PORT, and --listen is {self.listen}: leave one of them out")
        if list(self.sim_buckets) != sorted(set(self.sim_buckets)):
            raise ValueError("--sim-buckets must ascend, each count once, as 8,16,32")
        return self

    @property
    def num_ranks(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def _check_group(self) -> None:
        if self.num_ranks > 1 and self.runner == "simulated":
            raise ValueError("--runner simulated has one rank: leave --tensor-parallel-size and its like out")
        if self.num_nodes > 1 and self.group_listen is None:
            raise ValueError("--num-nodes above 1 needs --group-listen HOST:PORT, where the other nodes join")
        if self.group_listen is not None and self.num_nodes == 1:
            raise ValueError("--group-listen is for groups of several nodes: set --num-nodes as well")
        if self.join is not None and (self.num_ranks > 1 or self.num_nodes > 1 or self.pipeline_parallel_layers):
            raise ValueError(
                "--join takes sizes from the group's first node: set --tensor-parallel-size and its like there"
            )
        if self.num_nodes > self.num_ranks:
            raise ValueError(
                f"--num-nodes {self.num_nodes} is more than the group's ranks ({self.num_ranks}): set "
                "--tensor-parallel-size and --pipeline-parallel-size"
            )
        num_listed = len(self.pipeline_parallel_layers)
        if num_listed not in (0, self.pipeline_parallel_size):
            raise ValueError(
                f"--pipeline-parallel-layers lists {num_listed} stages and --pipeline-parallel-size is "
                f"{self.pipeline_parallel_size}: give a number of layers for each stage"
            )
        if len({self.group_tls_cert is None, self.group_tls_key is None, self.group_tls_ca is None}) > 1:
            raise ValueError("--group-tls-cert, --group-tls-key and --group-tls-ca belong together: give all, or none")


def parse_settings(argv: Sequence[str]) -> WorkerSettings:
    """Settings from flags (without the program's name), environment and file; a mistake ends with exit code 2."""
    return process_settings.parse_settings(WorkerSettings, argv)
