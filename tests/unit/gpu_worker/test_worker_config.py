from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from gpu_worker.config import WorkerSettings, parse_settings
from tests.system.worker_process import REPOSITORY

SIMULATED = "--runner=simulated"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("STEPWIRE_")]:
        monkeypatch.delenv(name)


def test_flags_win_over_variables_over_file_over_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "worker.yaml"
    file.write_text("runner: simulated\nmax-num-seqs: 1\nmax_model_len: 1\nblock_size: 1\n")
    monkeypatch.setenv("STEPWIRE_MAX_NUM_SEQS", "2")
    monkeypatch.setenv("STEPWIRE_MAX_MODEL_LEN", "2")
    settings = parse_settings(["--config", os.fspath(file), "--max-num-seqs", "3"])
    assert (settings.max_num_seqs, settings.max_model_len, settings.block_size) == (3, 2, 1)
    assert (settings.runner, settings.gpu_memory_utilization) == ("simulated", 0.9)


def test_the_file_may_be_named_by_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "worker.yaml"
    file.write_text("runner: simulated\nsim_buckets: [8, 16]\nsim_strict: true\n")
    monkeypatch.setenv("STEPWIRE_CONFIG", os.fspath(file))
    settings = parse_settings([])
    assert settings.sim_buckets == (8, 16) and settings.sim_strict


@pytest.mark.parametrize("argv", [["--sim-buckets", "8,16,32"], ["--sim-buckets", "8,16", "--sim-buckets", "32"]])
def test_lists_are_written_with_commas(argv: list[str]) -> None:
    assert parse_settings([SIMULATED, *argv]).sim_buckets == (8, 16, 32)


def test_lists_in_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPWIRE_SIM_BUCKETS", "8, 16")
    assert parse_settings([SIMULATED]).sim_buckets == (8, 16)


def test_variables_of_other_processes_and_empty_ones_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPWIRE_GRPC_PORT", "50051")
    monkeypatch.setenv("STEPWIRE_SEED", "")
    assert parse_settings([SIMULATED]).seed == 0


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        parse_settings([SIMULATED]).seed = 1  # type: ignore[misc]


def test_every_setting_is_described() -> None:
    for name, field in WorkerSettings.model_fields.items():
        assert field.description and len(field.description) > 10, name


def test_help_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_settings(["--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in WorkerSettings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        assert field.description is not None
        # argparse breaks lines at hyphens, and prints %% as %.
        assert field.description.replace("- ", "-")[:30].split()[0] in text


MISTAKES = [
    (["--max-seqs", "3"], "unrecognized arguments: --max-seqs 3: did you mean --max-num-seqs?"),
    (["--sim-token", "3"], "unrecognized arguments: --sim-token 3: did you mean"),
    (["model-directory"], "unrecognized arguments: model-directory"),
    (["--sim-step-ms"], "argument --sim-step-ms: expected one argument"),
    (["--runner", "jax"], "--runner (STEPWIRE_RUNNER): Input should be 'torch' or 'simulated', got 'jax'"),
    (["--block-size", "0"], "--block-size (STEPWIRE_BLOCK_SIZE): Input should be greater than or equal to 1, got '0'"),
    (["--gpu-memory-utilization", "90"], "--gpu-memory-utilization (STEPWIRE_GPU_MEMORY_UTILIZATION): Input should be"),
    (["--sim-buckets", "16,8"], "--sim-buckets must ascend"),
    (["--sim-buckets", "8,x"], "--sim-buckets (STEPWIRE_SIM_BUCKETS): Input should be a valid integer"),
    (["--tls-cert", "c.pem"], "--tls-cert and --tls-key belong together"),
    (["--tls-client-ca", "c.pem"], "--tls-client-ca needs --tls-cert and --tls-key"),
    (["--tls-cert=c", "--tls-key=k", "--listen=unix:/s"], "--tls-cert is for HOST:PORT, and --listen is unix:/s"),
    (["--num-nodes=2", "--group-listen=h:1"], "--num-nodes 2 is more than the group's ranks (1): set --tensor-"),
    (["--pipeline-parallel-layers=9,2"], "--pipeline-parallel-layers lists 2 stages and --pipeline-parallel-size is 1"),
    (["--join=h:1", "--pipeline-parallel-layers=1,2"], "--join takes sizes from the group's first node"),
    (["--config", "/does/not/exist.yaml"], "--config: cannot read /does/not/exist.yaml: No such file or directory"),
]


@pytest.mark.parametrize(("argv", "message"), MISTAKES)
def test_a_mistake_is_one_line_and_code_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_settings([SIMULATED, *argv])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("python -m gpu_worker: ")
    assert message in error


def test_the_torch_runner_needs_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_settings([])
    assert "--model is missing: give the model's directory, or --runner simulated" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("runnr: simulated\n", "runnr in the configuration file is not a setting: did you mean --runner?"),
        ("- runner\n", "must hold 'name: value' lines, not a list"),
        ("runner: [\n", "is not YAML"),
        ("seed: many\n", "--seed (STEPWIRE_SEED): Input should be a valid integer"),
    ],
)
def test_a_mistake_in_the_file(tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "worker.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit) as end:
        parse_settings([SIMULATED, "--config", os.fspath(file)])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_the_server_and_the_simulation_import_no_torch() -> None:
    code = (
        "import sys, gpu_worker.__main__, gpu_worker.simulated;"
        "print(sorted({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": ".:proto"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "[]"
