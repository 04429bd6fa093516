from __future__ import annotations

from pathlib import Path

import pytest

from control_plane.config import ControlPlaneSettings, parse_settings


@pytest.fixture(autouse=True)
def _no_outside_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ControlPlaneSettings.model_fields:
        monkeypatch.delenv(f"STEPWIRE_{name.upper()}", raising=False)


def test_every_setting_is_described() -> None:
    assert all(field.description for field in ControlPlaneSettings.model_fields.values())


def test_flags_win_over_variables_over_the_file_over_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("grpc-port: 1\nmetrics_port: 1\nmax_n: 1\nworkers: ['unix:/a']\n")
    monkeypatch.setenv("STEPWIRE_GRPC_PORT", "2")
    monkeypatch.setenv("STEPWIRE_METRICS_PORT", "2")
    settings = parse_settings(["--config", str(file), "--grpc-port", "3"])
    assert (settings.grpc_port, settings.metrics_port, settings.max_n) == (3, 2, 1)
    assert settings.workers == ("unix:/a",)
    assert settings.max_queued_requests == 1024


def test_lists_flags_and_secrets() -> None:
    settings = parse_settings(
        [
            "--served-model-name",
            "a,b",
            "--api-key",
            "k1,k2",
            "--no-enable-prefix-caching",
            "--scheduling-policy",
            "priority",
        ]
    )
    assert settings.served_model_name == ("a", "b")
    assert [key.get_secret_value() for key in settings.api_key] == ["k1", "k2"]
    assert "k1" not in repr(settings)
    assert not settings.enable_prefix_caching and settings.scheduling_policy == "priority"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--grpc-prot", "1"], "did you mean --grpc-port?"),
        (["--grpc-port", "70000"], "--grpc-port"),
        (["--workers", "nowhere"], "neither HOST:PORT nor unix:/PATH"),
        (["--workers", ","], "at least one worker"),
        (["--workers", "a:1,b:2,a:1"], "names a worker twice"),
        (["--listen", "relative.sock"], "--listen"),
        (["--steps-in-flight", "0"], "--steps-in-flight"),
        (["--scheduling-policy", "random"], "--scheduling-policy"),
        (["--tls-cert", "a.pem"], "--tls-key"),
        (["--tls-client-ca", "a.pem"], "--tls-cert"),
        (["--worker-tls-key", "a.pem"], "--worker-tls-cert"),
        (["--worker-tls-cert", "a", "--worker-tls-key", "b"], "--worker-tls-ca"),
        (["--config", "/no/such.yaml"], "/no/such.yaml"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_settings(flags)
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and said in message


def test_an_unknown_name_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("max_queued_request: 5\n")
    with pytest.raises(SystemExit):
        parse_settings(["--config", str(file)])
    assert "did you mean --max-queued-requests?" in capsys.readouterr().err
