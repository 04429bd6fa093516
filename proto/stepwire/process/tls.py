"""TLS towards another process: from PEM files to gRPC's credentials, and what is wrong with the files."""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc


class TlsFileError(Exception):
    """A file cannot be used; one line that names the flag."""


def client_credentials(flags: str, ca: Path, cert: Path | None, key: Path | None) -> grpc.ChannelCredentials:
    """Credentials that trust `ca` and, with `cert` and `key`, show a certificate of one's own.

    Args:
        flags: how the flags of the three begin, as in `--worker-tls`.

    Raises:
        TlsFileError: gRPC itself would say nothing before the first connection, and little then.
    """
    roots = _read(f"{flags}-ca", ca)
    checked = ssl.create_default_context()
    try:
        checked.load_verify_locations(cadata=roots.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise TlsFileError(f"{flags}-ca: {ca} holds no certificates that can be read: give a PEM file") from error
    if cert is None or key is None:
        return grpc.ssl_channel_credentials(roots)
    chain, private_key = _read(f"{flags}-cert", cert), _read(f"{flags}-key", key)
    try:
        checked.load_cert_chain(cert, key)
    except (ssl.SSLError, OSError) as error:
        raise TlsFileError(
            f"{flags}-cert {cert} and {flags}-key {key} do not go together: give a PEM chain and its private key"
        ) from error
    return grpc.ssl_channel_credentials(roots, private_key, chain)


def _read(flag: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TlsFileError(f"{flag}: cannot read {path}: {error.strerror}") from error
