"""What `stepwire serve` passes on is what the processes take."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from stepwire.process.settings import parse_settings

from control_plane.config import ControlPlaneSettings
from gateway.config import GatewaySettings
from gateway.launch_settings import CONTROL_PLANE, GATEWAY, WORKER, LaunchSettings
from gateway.launcher import prepare_command
from gpu_worker.config import WorkerSettings

SETTINGS = {GATEWAY: GatewaySettings, CONTROL_PLANE: ControlPlaneSettings, WORKER: WorkerSettings}

PASSED_ON = [
    (process, name)
    for name, field in LaunchSettings.model_fields.items()
    for process in (field.json_schema_extra or {}).get("takers", [])  # type: ignore[union-attr]
]


@pytest.mark.parametrize("process, name", PASSED_ON)
def test_a_setting_means_the_same_to_the_process_that_takes_it(process: str, name: str) -> None:
    ours, theirs = LaunchSettings.model_fields[name], SETTINGS[process].model_fields[name]
    assert ours.annotation == theirs.annotation
    assert ours.default == theirs.default, "unset flags are not passed on: the defaults must agree"


def test_only_what_was_set_is_passed_on() -> None:
    settings = LaunchSettings(
        model="m", port=9000, enable_prefix_caching=False, served_model_name=("a", "b"), max_num_seqs=None
    )
    assert settings.flags_for(GATEWAY) == ["--port=9000"]
    assert settings.flags_for(CONTROL_PLANE) == ["--served-model-name=a,b", "--no-enable-prefix-caching"]
    assert settings.flags_for(WORKER) == []


def test_every_setting_of_every_process_is_described() -> None:
    for settings_class in (LaunchSettings, *SETTINGS.values()):
        bare = [name for name, field in settings_class.model_fields.items() if not field.description]
        assert not bare, f"{settings_class.__name__}: {bare}"


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({}, []),
        ({"dtype": "bfloat16"}, ["--cpu-kernels=auto"]),
        ({"dtype": "bfloat16", "device": "cpu", "cpu_kernels": "on"}, ["--cpu-kernels=on"]),
        ({"dtype": "bfloat16", "kernel_cache_dir": "/k"}, ["--cpu-kernels=auto", "--kernel-cache-dir=/k"]),
        ({"dtype": "bfloat16", "device": "cuda"}, []),
        ({"dtype": "bfloat16", "cpu_kernels": "off"}, []),
        ({"dtype": "bfloat16", "deterministic": True}, []),
        ({"dtype": "bfloat16", "runner": "simulated"}, []),
    ],
)
def test_kernels_that_the_worker_would_compile_are_compiled_while_the_model_is_prepared(
    changes: dict[str, Any], flags: list[str]
) -> None:
    command = prepare_command(LaunchSettings(model="m", **changes))
    assert [word for word in command if "kernel" in word] == flags


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        parse_settings(LaunchSettings, argv)
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    return told


@pytest.mark.parametrize(
    ("argv", "needle"),
    [
        (
            ["m", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"],
            "; --enable-auto-tool-choice: leave it out",
        ),
        (["m", "-tp", "2"], "; -tp: --tensor-parallel-size"),
        (["m", "-O3"], "; -O3: leave it out"),
        (["m", "--swap_space=4"], "; --swap-space: leave it out"),
        (["m", "--no-enable-chunked-prefill"], "; --no-enable-chunked-prefill: leave it out"),
        (["--model", "m"], "; --model: the model comes without a flag"),
        (["m", "--trust-remote-code", "--allowed-origins", "*"], "never run; --allowed-origins: set the variable"),
        (["m", "--served-model-name", "a", "b"], "lists are written with commas"),
        (["m", "--quantization", "awq"], "auto takes them as they are"),
        (["m", "--runner", "pooling"], "--task"),
        (["m", "--max-seqs", "4"], "did you mean --max-num-seqs?"),
    ],
)
def test_flags_of_vllm_are_answered_with_what_to_do(
    argv: list[str], needle: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert needle in refusal(argv, capsys)


def test_a_configuration_of_vllm_is_answered_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "vllm.yaml"
    file.write_text("max-model-len: 512\ntrust-remote-code: true\n")
    told = refusal(["m", "--config", str(file)], capsys)
    assert "trust_remote_code in the configuration file is not a setting; --trust-remote-code: leave it out" in told


def test_what_is_advised_is_there() -> None:
    ours = {f"--{name.replace('_', '-')}" for name in LaunchSettings.model_fields} - {"--model"}
    all_settings = (LaunchSettings, *SETTINGS.values())
    variables = {f"STEPWIRE_{name.upper()}" for each in all_settings for name in each.model_fields}
    assert not ours & LaunchSettings.advice.keys(), "a flag that there is needs no advice"
    for flag, advice in LaunchSettings.advice.items():
        own = re.sub("`.*?`", "", advice)
        assert set(re.findall(r"--[a-z][a-z-]*", own)) <= ours, flag
        assert set(re.findall(r"STEPWIRE_\w+", own)) <= variables, flag
