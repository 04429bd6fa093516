"""What is wrong with TLS files is said before the first connection."""

from __future__ import annotations

import subprocess
from pathlib import Path

import grpc
import pytest
from stepwire.process.tls import TlsFileError, client_credentials


def make_certificate(directory: Path, name: str) -> tuple[Path, Path]:
    cert, key = directory / f"{name}.pem", directory / f"{name}.key"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost"
    subprocess.run([*command.split(), "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    return cert, key


def test_files(tmp_path: Path) -> None:
    ca, _ = make_certificate(tmp_path, "ca")
    cert, key = make_certificate(tmp_path, "own")
    _, other_key = make_certificate(tmp_path, "other")
    text = tmp_path / "text"
    text.write_text("no certificate, in a language with \u00e9")
    assert isinstance(client_credentials("--x-tls", ca, None, None), grpc.ChannelCredentials)
    assert isinstance(client_credentials("--x-tls", ca, cert, key), grpc.ChannelCredentials)
    with pytest.raises(TlsFileError, match=r"--x-tls-ca: cannot read .*none: No such file"):
        client_credentials("--x-tls", tmp_path / "none", None, None)
    for not_roots in (text, key):
        with pytest.raises(TlsFileError, match=r"--x-tls-ca: .* no certificates"):
            client_credentials("--x-tls", not_roots, None, None)
    with pytest.raises(TlsFileError, match="--x-tls-key: cannot read"):
        client_credentials("--x-tls", ca, cert, tmp_path / "none")
    for wrong in (other_key, text):
        with pytest.raises(TlsFileError, match=r"--x-tls-cert .*own.pem and --x-tls-key"):
            client_credentials("--x-tls", ca, cert, wrong)
