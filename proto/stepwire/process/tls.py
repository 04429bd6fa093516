"""TLS from PEM files, which others renew while the process runs: cert-manager, certbot, an operator.

Whoever makes or takes a connection asks here for what it is made with. Files that have changed since are read then, and
nothing runs in between; connections that there are go on with what they began with. Files that do not go together, half
of a renewal say, are left alone until they do.
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import grpc
import structlog

log = structlog.get_logger(__name__)

T = TypeVar("T")


class TlsFileError(Exception):
    """A file cannot be used; one line that names the flag."""


class Renewed(Generic[T]):
    """What `make` makes of some files. Raises what `make` raises, at the beginning alone; any thread.

    Args:
        flags: how the flags that name the files begin, for the log.
        make: raises `TlsFileError` where the files cannot be used.
    """

    def __init__(self, flags: str, files: Sequence[Path], make: Callable[[], T]) -> None:
        self._flags, self._files, self._make = flags, files, make
        self._lock = threading.Lock()
        self._seen = self._stamps()
        self._value = make()

    def take(self) -> T:
        """Of the files as they are now, or as they were when they were good."""
        with self._lock:
            stamps = self._stamps()
            if stamps != self._seen:
                self._seen = stamps
                try:
                    self._value = self._make()
                    log.info("TLS files have changed: new connections are made with them", flags=self._flags)
                except TlsFileError as error:
                    log.warning("changed TLS files cannot be used: the former ones stay", reason=str(error))
            return self._value

    def _stamps(self) -> list[tuple[int, ...] | None]:
        """Differ where a file was replaced or written to; a link counts as what it leads to."""
        stamps: list[tuple[int, ...] | None] = []
        for file in self._files:
            try:
                found = file.stat()
                stamps.append((found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns))
            except OSError:
                stamps.append(None)
        return stamps


def server_credentials(
    flags: str, cert: Path, key: Path, client_ca: Path | None, *, ca_flag: str = ""
) -> grpc.ServerCredentials:
    """Credentials of a gRPC server; with `client_ca`, clients have to show certificates of their own.

    Args:
        flags: how the flags of cert and key begin, as in `--tls`.
        ca_flag: that of `client_ca`, where it is another than `--tls-client-ca` would be.

    Raises:
        TlsFileError: gRPC itself would say little.
    """
    files = [cert, key, *([] if client_ca is None else [client_ca])]

    def read() -> grpc.ServerCertificateConfiguration:
        chain, private_key = _read(f"{flags}-cert", cert), _read(f"{flags}-key", key)
        _check_pair(flags, cert, key)
        roots = None if client_ca is None else _read_roots(ca_flag or f"{flags}-client-ca", client_ca)
        return grpc.ssl_server_certificate_configuration([(private_key, chain)], roots)

    renewed = Renewed(flags, files, read)
    last = renewed.take()

    def newer() -> grpc.ServerCertificateConfiguration | None:
        """Asked for at each connection; None: go on with what there is."""
        nonlocal last
        current = renewed.take()
        if current is last:
            return None
        last = current
        return current

    return grpc.dynamic_ssl_server_credentials(
        last,
        newer,  # type: ignore[arg-type]  # the stubs lack the None
        require_client_authentication=client_ca is not None,
    )


def client_credentials(flags: str, ca: Path, cert: Path | None, key: Path | None) -> Renewed[grpc.ChannelCredentials]:
    """Credentials that trust `ca` and, with `cert` and `key`, show a certificate of one's own.

    Args:
        flags: how the flags of the three begin, as in `--worker-tls`.

    Raises:
        TlsFileError: gRPC itself would say nothing before the first connection, and little then.
    """
    if cert is None or key is None:
        return Renewed(flags, [ca], lambda: grpc.ssl_channel_credentials(_read_roots(f"{flags}-ca", ca)))

    def read() -> grpc.ChannelCredentials:
        roots = _read_roots(f"{flags}-ca", ca)
        chain, private_key = _read(f"{flags}-cert", cert), _read(f"{flags}-key", key)
        _check_pair(flags, cert, key)
        return grpc.ssl_channel_credentials(roots, private_key, chain)

    return Renewed(flags, [ca, cert, key], read)


def server_context(flags: str, cert: Path, key: Path) -> Renewed[ssl.SSLContext]:
    """For servers of the standard library. Raises `TlsFileError`."""

    def read() -> ssl.SSLContext:
        _read(f"{flags}-cert", cert)
        _read(f"{flags}-key", key)
        return _check_pair(flags, cert, key)

    return Renewed(flags, [cert, key], read)


def _read(flag: str, path: Path) -> bytes:
    data = _read_bytes(flag, path)
    if b"-----BEGIN" not in data:
        raise TlsFileError(f"{flag}: {path} is not a PEM file: it has no -----BEGIN line")
    return data


def _read_roots(flag: str, ca: Path) -> bytes:
    roots = _read_bytes(flag, ca)
    try:
        # The file and not what was read of it: between its certificates may be words in any language.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=ca)
    except OSError as error:  # SSLError is one
        raise TlsFileError(f"{flag}: {ca} holds no certificates that can be read: give a PEM file") from error
    return roots


def _read_bytes(flag: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TlsFileError(f"{flag}: cannot read {path}: {error.strerror}") from error


def _check_pair(flags: str, cert: Path, key: Path) -> ssl.SSLContext:
    """A server's context with the two."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # With no word for an encrypted key, OpenSSL would stop the process and ask for one on the terminal.
        context.load_cert_chain(cert, key, password="")
    except (ssl.SSLError, OSError) as error:
        raise TlsFileError(
            f"{flags}-cert {cert} and {flags}-key {key} do not go together: give a PEM chain and its private key, "
            "which is not encrypted"
        ) from error
    return context
