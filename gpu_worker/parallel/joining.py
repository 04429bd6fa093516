"""`python -m gpu_worker --join HOST:PORT`: the relay of a group's other node. Needs no torch.

It takes its ranks' places from the group's first node, starts them, passes commands down and events up, and ends with
the group.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from queue import SimpleQueue
from types import FrameType

import grpc
import stepwire
import structlog
from stepwire.process.tls import TlsFileError, client_credentials
from stepwire.v1 import group_pb2, group_pb2_grpc

from gpu_worker.config import PROGRAM, WorkerSettings
from gpu_worker.listen import ListenAddress, ListenError
from gpu_worker.parallel.local_ranks import LocalRanks
from gpu_worker.parallel.model_digest import model_digest
from gpu_worker.parallel.nodes import GROUP_OPTIONS, GROUP_PROTOCOL_VERSION

log = structlog.get_logger(__name__)

_END_LIMIT_S = 5.0
# What the first node may take to end the group.
_LEAVE_LIMIT_S = 15.0


def hold_ranks(settings: WorkerSettings) -> int:
    """Hold this node's ranks until the group ends; the process's exit code: 0 where it was told to end."""
    address = settings.join or ""
    try:
        if ListenAddress.parse(address, "--join").path is not None:
            return _refuse(f"--join {address}: a group's first node listens on HOST:PORT")
    except ListenError as error:
        return _refuse(str(error))
    relay = _Relay(settings)
    signal.signal(signal.SIGTERM, relay.on_signal)
    signal.signal(signal.SIGINT, relay.on_signal)
    try:
        channel = _channel(settings, address)
        grpc.channel_ready_future(channel).result(settings.group_timeout_s)
        host = _own_address(address)
    except (grpc.FutureTimeoutError, OSError):
        return _refuse(
            f"the group's first node cannot be reached at {address} within {settings.group_timeout_s:g} s: start it "
            "with that --group-listen, and check that this node reaches it"
            + ("" if settings.group_tls_cert is None else " and that both have certificates by --group-tls-ca")
        )
    except TlsFileError as error:
        return _refuse(str(error))
    with channel:
        return relay.run(channel, host)


class _Relay:
    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._requests: SimpleQueue[group_pb2.JoinRequest | None] = SimpleQueue()
        self._ranks = LocalRanks(lambda event: self._requests.put(group_pb2.JoinRequest(event=event)))
        self._has_joined = False
        self._first_rank: int | None = None  # of this node, once it is known
        self._is_leaving = False

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Let the group end in peace; at once by a second signal, or where there is no group yet."""
        log.info("this node leaves its group, which ends with it", signal=signal.Signals(number).name)
        if not self._has_joined or self._is_leaving:
            self._end_at_once()
        self._is_leaving = True
        # A first node that hangs is not waited for.
        timer = threading.Timer(_LEAVE_LIMIT_S, self._end_at_once)
        timer.daemon = True
        timer.start()
        if self._first_rank is not None:
            self._leave(self._first_rank)

    def _leave(self, rank: int) -> None:
        event = group_pb2.RankEvent(rank=rank, leaving=group_pb2.Empty())
        self._requests.put(group_pb2.JoinRequest(event=event))

    def _end_at_once(self) -> None:
        """Whatever the main thread does: an exception there may come where gRPC's own code takes it for its own."""
        self._ranks.kill()
        sys.stderr.flush()
        os._exit(0)

    def run(self, channel: grpc.Channel, host: str) -> int:
        model = self._settings.model
        hello = group_pb2.NodeHello(
            protocol_version=GROUP_PROTOCOL_VERSION,
            version=stepwire.__version__,
            model_digest="" if model is None else model_digest(model),
            host=host,
        )
        self._has_joined = True
        self._requests.put(group_pb2.JoinRequest(hello=hello))
        is_closing = False
        try:
            stub = group_pb2_grpc.GroupServiceStub(channel)
            for response in stub.Join(self._outgoing()):
                if response.WhichOneof("message") == "assignment":
                    self._start(response.assignment)
                    continue
                self._ranks.send(response.command)
                is_closing = group_pb2.RankCommand.FromString(response.command).WhichOneof("command") == "close"
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                return _refuse(f"the group's first node refuses this one: {error.details()}")
            log.debug("the stream broke", code=error.code().name, details=error.details())
        if is_closing:
            self._ranks.close(_END_LIMIT_S)
            return 0
        self._ranks.kill()
        if self._is_leaving:
            return 0
        return _refuse(
            f"the group of {self._settings.join} has ended: its first node's message says why; start this node again "
            "together with it"
        )

    def _start(self, assignment: group_pb2.NodeAssignment) -> None:
        for place in assignment.places:
            # The group's settings, with this node's own path to the model.
            fields = json.loads(place.settings)
            fields["model"] = str(self._settings.model)
            place.settings = json.dumps(fields)
        first_rank = assignment.places[0].rank
        if self._is_leaving:
            self._leave(first_rank)
            return
        log.info("this node has joined", node=assignment.node, ranks=[place.rank for place in assignment.places])
        self._ranks.start(assignment.places)
        self._first_rank = first_rank
        if self._is_leaving:
            self._leave(first_rank)  # told so while the ranks were started

    def _outgoing(self) -> Iterator[group_pb2.JoinRequest]:
        while (request := self._requests.get()) is not None:
            yield request


def _channel(settings: WorkerSettings, address: str) -> grpc.Channel:
    cert, key, roots = settings.group_tls_cert, settings.group_tls_key, settings.group_tls_ca
    if cert is None or key is None or roots is None:
        return grpc.insecure_channel(address, options=GROUP_OPTIONS)
    return grpc.secure_channel(
        address, client_credentials("--group-tls", roots, cert, key).take(), options=GROUP_OPTIONS
    )


def _own_address(address: str) -> str:
    """This node's address on the way to the first node. Nothing is sent."""
    host, _, port = address.rpartition(":")
    family, kind, protocol, _, target = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def _refuse(message: str) -> int:
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return 1
