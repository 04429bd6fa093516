"""The worker's settings: flags win over STEPWIRE_* variables, these over a YAML file, and that over defaults."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

PROGRAM = "python -m gpu_worker"


def _split_commas(value: object) -> object:
    """Lists are written 8,16,32 in a flag or a variable, and as a list in YAML."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return [piece for part in value for piece in part.replace(",", " ").split()]
    return value


PositiveInt = Annotated[int, Field(ge=1)]
TokenCounts = Annotated[tuple[PositiveInt, ...], NoDecode, BeforeValidator(_split_commas)]


class YamlFileSource(PydanticBaseSettingsSource):
    """The file that `--config` or STEPWIRE_CONFIG names; keys are field names, with _ or - between words."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        raise NotImplementedError("the file is read as a whole")

    def __call__(self) -> dict[str, Any]:
        path = self.current_state.get("config")
        if not path:
            return {}
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"--config: cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
        except yaml.YAMLError as error:
            raise SettingsError(f"--config: {path} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise SettingsError(f"--config: {path} must hold 'name: value' lines, not a {type(values).__name__}")
        return {str(name).replace("-", "_"): value for name, value in values.items()}


class WorkerSettings(BaseSettings):
    """Serves one model to a control plane: runs its step batches and answers with the sampled tokens."""

    model_config = SettingsConfigDict(
        env_prefix="STEPWIRE_",
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        cli_exit_on_error=False,
        cli_hide_none_type=True,
        cli_parse_none_str="unset",
        cli_implicit_flags=True,
        cli_kebab_case=True,
        protected_namespaces=(),
    )

    config: Path | None = Field(None, description="YAML file with these settings; flags and variables win over it")

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
    shutdown_grace_s: float = Field(
        10.0, ge=0, description="seconds that queued steps may still take after SIGTERM before the process ends anyway"
    )
    exit_with_parent: bool = Field(False, description="end when the process that started this one is gone")

    # The model's numbers.
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto is cuda where there is a device, else cpu")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="element type of weights and activations; auto is the model's own where the device is fast at it",
    )
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "float16", "fp8"] = Field(
        "auto", description="element type of the KV cache; auto is dtype, fp8 is float8_e4m3fn (half the memory)"
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
    cpu_kv_cache_gib: float = Field(2.0, gt=0, description="size of the KV cache on device cpu, in GiB")
    num_threads: PositiveInt | None = Field(None, description="CPU threads of torch; default: one per physical core")

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")
    log_format: Literal["text", "json"] = Field(
        "text", description="log lines on stderr: for people, or one JSON object each"
    )

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

    @model_validator(mode="after")
    def _check_together(self) -> WorkerSettings:
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

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # The flags' source is put in front of these by pydantic-settings.
        return init_settings, env_settings, YamlFileSource(settings_cls)


def parse_settings(argv: Sequence[str]) -> WorkerSettings:
    """Settings from flags (without the program's name), variables and file; a mistake ends the process with code 2."""
    known_flags = [f"--{name.replace('_', '-')}" for name in WorkerSettings.model_fields]
    try:
        return WorkerSettings(_cli_parse_args=list(argv), _cli_prog_name=PROGRAM)  # type: ignore[call-arg]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = "_".join(str(part) for part in first["loc"][:1])
        if not name:
            _refuse(first["msg"].removeprefix("Value error, "))
        flag = f"--{name.replace('_', '-')}"
        if first["type"] == "extra_forbidden":
            _refuse(f"{name} in the configuration file is not a setting{_suggest(flag, known_flags)}")
        _refuse(f"{flag} (STEPWIRE_{name.upper()}): {first['msg']}, got {first['input']!r}")
    except SettingsError as error:
        message = " ".join(str(error).removeprefix("error parsing CLI: ").split())
        unknown = message.removeprefix("unrecognized arguments: ").split()[0]
        _refuse(message + (_suggest(unknown, known_flags) if message.startswith("unrecognized") else ""))


def _suggest(flag: str, known_flags: list[str]) -> str:
    close = difflib.get_close_matches(flag.split("=")[0], known_flags, n=1)
    return f": did you mean {close[0]}?" if close else ""


def _refuse(message: str) -> NoReturn:
    print(f"{PROGRAM}: {message} (--help explains every setting)", file=sys.stderr)
    raise SystemExit(2)
