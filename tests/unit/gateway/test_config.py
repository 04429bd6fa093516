"""Flags, variables, a file and defaults fill the settings in this order; a mistake is one line and exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from gateway.config import GatewaySettings, parse_settings


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in GatewaySettings.model_fields:
        monkeypatch.delenv(f"STEPWIRE_{name.upper()}", raising=False)


def test_defaults() -> None:
    settings = parse_settings([])
    assert (settings.host, settings.port, settings.max_body_bytes) == ("127.0.0.1", 8000, 8 * 2**20)
    assert settings.api_keys == () and settings.cors_origins == ()
    assert settings.key_for_control_plane is None


def test_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text("port: 1\nhost: 10.0.0.1\nmax-body-bytes: 5\napi_key: [a, b]\n")
    monkeypatch.setenv("STEPWIRE_PORT", "2")
    monkeypatch.setenv("STEPWIRE_HOST", "10.0.0.2")
    settings = parse_settings(["--config", str(file), "--port", "3"])
    assert (settings.port, settings.host, settings.max_body_bytes) == (3, "10.0.0.2", 5)
    assert settings.api_keys == ("a", "b")


def test_keys_are_lists_and_never_shown() -> None:
    settings = parse_settings(["--api-key", "alpha,beta"])
    assert settings.api_keys == ("alpha", "beta")
    assert settings.key_for_control_plane == "alpha"
    assert "alpha" not in repr(settings) and "beta" not in str(settings)
    other = parse_settings(["--api-key", "alpha", "--control-plane-api-key", "gamma"])
    assert other.key_for_control_plane == "gamma"


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        parse_settings([]).port = 1


def test_every_field_is_described() -> None:
    assert [name for name, field in GatewaySettings.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("argv", "needles"),
    [
        (["--prot", "1"], ["--prot", "did you mean --port"]),
        (["--port", "x"], ["--port", "STEPWIRE_PORT", "x"]),
        (["--port", "70000"], ["--port", "65535"]),
        (["--tls-cert", "c.pem"], ["--tls-key"]),
        (["--gateway-processes", "2", "--uds", "s"], ["--uds", "share a port"]),
        (["--gateway-processes", "0"], ["--gateway-processes"]),
        (["--gateway-process", "1"], ["--gateway-run-dir"]),
        (["--control-plane-tls-cert", "c", "--control-plane-tls-key", "k"], ["--control-plane-tls-ca"]),
        (["--control-plane", "nowhere"], ["--control-plane", "HOST:PORT"]),
        (["--config", "/does/not/exist.yaml"], ["/does/not/exist.yaml", "No such file"]),
        (["--log-level", "loud"], ["--log-level", "debug"]),
    ],
)
def test_mistakes_are_one_line_and_code_2(
    argv: list[str], needles: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_settings(argv)
    assert caught.value.code == 2
    output = capsys.readouterr().err
    assert output.count("\n") == 1
    for needle in needles:
        assert needle in output


def test_an_unknown_name_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text("prot: 1\n")
    with pytest.raises(SystemExit):
        parse_settings(["--config", str(file)])
    assert "did you mean --port" in capsys.readouterr().err
