"""What is wrong with TLS files is said before the first connection."""

from __future__ import annotations

import subprocess
from pathlib import Path

import grpc
import pytest
from stepwire.process.tls import TlsFileError, client_credentials, server_context, server_credentials


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
    assert isinstance(client_credentials("--x-tls", ca, None, None).take(), grpc.ChannelCredentials)
    assert isinstance(client_credentials("--x-tls", ca, cert, key).take(), grpc.ChannelCredentials)
    described = tmp_path / "described"
    described.write_text(f"# F\u0151tan\u00fas\u00edtv\u00e1ny\n{ca.read_text()}")
    assert isinstance(client_credentials("--x-tls", described, None, None).take(), grpc.ChannelCredentials)
    assert isinstance(server(cert, key, described), grpc.ServerCredentials)
    with pytest.raises(TlsFileError, match=r"--x-tls-ca: cannot read .*none: No such file"):
        client_credentials("--x-tls", tmp_path / "none", None, None)
    for not_roots in (text, key):
        with pytest.raises(TlsFileError, match=r"--x-tls-ca: .* no certificates"):
            client_credentials("--x-tls", not_roots, None, None)
    with pytest.raises(TlsFileError, match="--x-tls-key: cannot read"):
        client_credentials("--x-tls", ca, cert, tmp_path / "none")
    for make in (lambda key: client_credentials("--x-tls", ca, cert, key), lambda key: server(cert, key)):
        with pytest.raises(TlsFileError, match=r"--x-tls-cert .*own.pem and --x-tls-key"):
            make(other_key)
        with pytest.raises(TlsFileError, match=r"--x-tls-key: .*text is not a PEM file"):
            make(text)
    with pytest.raises(TlsFileError, match=r"--x-tls-client-ca: .*text holds no certificates"):
        server(cert, key, text)


def test_nobody_is_asked_for_the_password_of_a_key(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path, "own")
    locked = tmp_path / "locked"
    command = f"openssl ec -in {key} -out {locked} -aes256 -passout pass:word"
    subprocess.run(command.split(), check=True, capture_output=True)
    with pytest.raises(TlsFileError, match="not encrypted"):
        server(cert, locked)


def server(cert: Path, key: Path, client_ca: Path | None = None) -> grpc.ServerCredentials:
    return server_credentials("--x-tls", cert, key, client_ca)


def test_renewed_files_are_taken_once_they_go_together(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path, "own")
    new_cert, new_key = make_certificate(tmp_path, "new")
    context = server_context("--x-tls", cert, key)
    first = context.take()
    assert context.take() is first
    # Half of a renewal, and a moment without a file.
    new_cert.replace(cert)
    assert context.take() is first
    key.unlink()
    assert context.take() is first
    new_key.replace(key)
    second = context.take()
    assert second is not first and context.take() is second
