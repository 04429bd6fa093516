"""Rank 0's side of a group on several nodes: the other nodes' relays join here, commands go out, events come in."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import grpc
import stepwire
import structlog
from stepwire.process.connections import KEEPALIVE_OPTIONS, MESSAGE_OPTIONS, NO_PROXY_OPTIONS
from stepwire.process.tls import TlsFileError, server_credentials
from stepwire.v1 import group_pb2, group_pb2_grpc

from gpu_worker.config import WorkerSettings
from gpu_worker.listen import ListenAddress, ListenError
from gpu_worker.parallel.group_watch import GroupWatch
from gpu_worker.parallel.layout import GroupError, GroupLayout
from gpu_worker.parallel.model_digest import model_digest
from gpu_worker.parallel.places import write_places

log = structlog.get_logger(__name__)

GROUP_PROTOCOL_VERSION = 1
# How long between two looks for this node's own name.
_NAME_PAUSE_S = 0.5
# Of both sides.
GROUP_OPTIONS = [*MESSAGE_OPTIONS, *KEEPALIVE_OPTIONS, *NO_PROXY_OPTIONS, ("grpc.so_reuseport", 0)]


def group_host(settings: WorkerSettings) -> str:
    """The address of this node that the others use. Raises `GroupError`."""
    try:
        address = ListenAddress.parse(settings.group_listen or "", "--group-listen")
    except ListenError as error:
        raise GroupError(str(error)) from error
    host = address.host.strip("[]")
    if address.path is not None or host in ("", "0.0.0.0", "::"):
        raise GroupError(
            f"--group-listen {settings.group_listen} names no address that others could reach: give this node's own"
        )
    _await_name(host, settings.group_timeout_s)
    try:
        address.claim()
    except ListenError as error:
        raise GroupError(str(error)) from error
    return host


def _await_name(host: str, limit_s: float) -> None:
    """A cluster's DNS may learn of a new machine only after its first process runs, and says no for a while."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except socket.gaierror as error:
            if time.monotonic() >= deadline:
                raise GroupError(
                    f"--group-listen: the host {host!r} is unknown after {limit_s:g} s ({error.strerror}): give an "
                    "address of this node, or a name that resolves to it"
                ) from error
            time.sleep(min(_NAME_PAUSE_S, limit_s))


@dataclass(slots=True)
class _Node:
    number: int
    host: str
    outgoing: SimpleQueue[bytes | None] = field(default_factory=SimpleQueue)


class NodeServer(group_pb2_grpc.GroupServiceServicer):
    """Listens until the group ends. Commands go to every node that has joined; implements `Followers`."""

    def __init__(self, settings: WorkerSettings, layout: GroupLayout, watch: GroupWatch, store_address: str) -> None:
        self._settings, self._layout, self._watch, self._store_address = settings, layout, watch, store_address
        self._digest = model_digest(settings.model) if settings.model is not None else ""
        self._changed = threading.Condition()
        self._nodes: list[_Node] = []
        self._refusal: str | None = None
        self._is_closing = False
        # One thread for each node's stream, and one to refuse another with.
        self._server = grpc.server(ThreadPoolExecutor(layout.num_nodes + 1), options=GROUP_OPTIONS)
        group_pb2_grpc.add_GroupServiceServicer_to_server(self, self._server)
        address = settings.group_listen or ""
        try:
            credentials = _server_credentials(settings)
            if credentials is None:
                self._server.add_insecure_port(address)
            else:
                self._server.add_secure_port(address, credentials)
        except (RuntimeError, TlsFileError) as error:
            raise GroupError(f"--group-listen {address} cannot be listened on: {error}") from error
        self._server.start()

    def await_all(self) -> None:
        """Block until every node has joined. Raises `GroupError`."""
        wanted = self._layout.num_nodes - 1
        with self._changed:
            self._changed.wait_for(
                lambda: self._refusal is not None or len(self._nodes) == wanted, self._settings.group_timeout_s
            )
            if self._refusal is not None:
                raise GroupError(self._refusal)
            if len(self._nodes) < wanted:
                node = len(self._nodes) + 1
                raise GroupError(
                    f"node {node} ({self._ranks(node)}) did not join within {self._settings.group_timeout_s:g} s: "
                    f"start `{self._settings.program} --model DIR --join {self._settings.group_listen}` there, or give "
                    "it longer with --group-timeout-s"
                )

    def send(self, command: bytes) -> None:
        for node in self._nodes:
            node.outgoing.put(command)

    def close(self, grace_s: float) -> None:
        self._is_closing = True
        self.send(group_pb2.RankCommand(close=group_pb2.Empty()).SerializeToString())
        for node in self._nodes:
            node.outgoing.put(None)
        self._server.stop(max(grace_s, 0.5)).wait()

    def kill(self) -> None:
        """At once, without waiting: a node whose stream ends before a `close` came kills its ranks."""
        self._is_closing = True
        for node in self._nodes:
            # Its stream's thread would hold up the end of this process.
            node.outgoing.put(None)
        self._server.stop(None)

    def Join(self, request_iterator: Iterator[group_pb2.JoinRequest], context: Any) -> Iterator[group_pb2.JoinResponse]:
        """One node's stream, on a thread of the server's."""
        hello = next(request_iterator).hello
        refusal = self._problem(hello)
        if refusal is None:
            with self._changed:
                node = _Node(len(self._nodes) + 1, hello.host)
                if node.number >= self._layout.num_nodes:
                    refusal = f"all {self._layout.num_nodes} nodes of this group have joined already"
                else:
                    self._nodes.append(node)
                    self._changed.notify_all()
        if refusal is not None:
            log.warning("a node is refused", host=hello.host, reason=refusal)
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, refusal)
        log.info("node joined", node=node.number, host=node.host, ranks=self._ranks(node.number))
        reader = threading.Thread(
            target=self._read, args=(node, request_iterator), name=f"node {node.number}", daemon=True
        )
        reader.start()
        places = write_places(self._layout, node.number, self._settings, self._store_address, node.host)
        yield group_pb2.JoinResponse(assignment=group_pb2.NodeAssignment(node=node.number, places=places))
        while (command := node.outgoing.get()) is not None:
            yield group_pb2.JoinResponse(command=command)

    def _problem(self, hello: group_pb2.NodeHello) -> str | None:
        """Why a node cannot be of this group; it ends the group that is still forming."""
        who = f"node {len(self._nodes) + 1} ({self._ranks(len(self._nodes) + 1)}) at {hello.host}"
        problem = None
        if (hello.version, hello.protocol_version) != (stepwire.__version__, GROUP_PROTOCOL_VERSION):
            problem = (
                f"{who} runs stepwire {hello.version} and rank 0 runs {stepwire.__version__}: install the same release "
                "on all nodes"
            )
        elif hello.model_digest != self._digest:
            problem = (
                f"{who} has another model than rank 0 (digest {hello.model_digest}, not {self._digest}): give --model "
                "the same files on all nodes"
            )
        with self._changed:
            if problem is not None and len(self._nodes) < self._layout.num_nodes - 1:
                self._refusal = self._refusal or problem
                self._changed.notify_all()
        return problem

    def _ranks(self, node: int) -> str:
        ranks = self._layout.ranks_of_node(node)
        return f"rank {ranks.start}" if len(ranks) == 1 else f"ranks {ranks.start} to {ranks.stop - 1}"

    def _read(self, node: _Node, requests: Iterator[group_pb2.JoinRequest]) -> None:
        try:
            for request in requests:
                self._watch.on_event(request.event)
            reason = "its relay has ended"
        except Exception as error:
            reason = f"its connection broke ({type(error).__name__})"
        if not self._is_closing:
            self._watch.fail(f"node {node.number} ({self._ranks(node.number)}) at {node.host} is lost: {reason}")


def _server_credentials(settings: WorkerSettings) -> grpc.ServerCredentials | None:
    """Mutual TLS. Raises `TlsFileError`."""
    cert, key, roots = settings.group_tls_cert, settings.group_tls_key, settings.group_tls_ca
    if cert is None or key is None or roots is None:
        return None
    return server_credentials("--group-tls", cert, key, roots, ca_flag="--group-tls-ca")
