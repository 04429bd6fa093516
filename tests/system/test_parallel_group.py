"""Groups that cannot form: one message that names the rank and the remedy, and nothing left running."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import grpc
import psutil
import pytest
import stepwire
import torch
from stepwire.v1 import group_pb2, group_pb2_grpc, worker_pb2

from gpu_worker.config import WorkerSettings
from gpu_worker.parallel.frames import Channel
from gpu_worker.parallel.local_ranks import RANK_MODULE
from gpu_worker.parallel.model_digest import model_digest
from gpu_worker.parallel.process_group import StoreServer
from gpu_worker.runner import FinishedStep, TorchRunner
from gpu_worker.runner_api import StepBatch, TokenMask, WorkerFacts
from load_tests.cpu_worker.step_driver import StepDriver, greedy, sampling

from .launched import wait_until
from .ports import free_port
from .worker_process import REPOSITORY, WorkerClient, WorkerProcess

FLAGS = ("--device=cpu", "--dtype=float32", "--num-threads=1", "--cpu-kv-cache-gib=0.01", "--log-format=json")
# Where nobody is missing: ranks that start all at once on a busy machine wait long for one another.
PATIENT = ("--group-timeout-s=200",)
LIMIT_S = 120.0
# Importing torch several times over takes its time on a busy machine.
START_LIMIT_S = 240.0


def worker(model: Path, *flags: str, prefix: Sequence[str] = ()) -> WorkerProcess:
    return WorkerProcess([*FLAGS, f"--model={model}", *flags], prefix=prefix, timeout_s=START_LIMIT_S)


def message_of(process: WorkerProcess, *, limit_s: float = LIMIT_S) -> str:
    """The one line with which it ends, not 0; nothing that it started is left."""
    children: set[psutil.Process] = set()

    def is_over() -> bool:
        if process.process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                children.update(psutil.Process(process.process.pid).children(recursive=True))
        return process.process.poll() is not None

    wait_until(is_over, limit_s, "the end of the worker", every_s=0.1)
    assert process.wait_for_exit() == 1
    wait_until(lambda: not any(child.is_running() for child in children), LIMIT_S, "the end of its ranks")
    lines = [line for line in process.lines if line.startswith("python -m gpu_worker: ")]
    assert len(lines) == 1, process.lines
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        # No device for any of two ranks; tests/gpu has one rank more than devices.
        pytest.param(
            ["--tensor-parallel-size=2", "--device=cuda"],
            ["rank 0 (tensor-parallel rank 0 of 2)", "finds no CUDA device", "--device cpu"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
        # The others differ in words only, which unit tests hold.
        pytest.param(
            ["--tensor-parallel-size=4"],
            ["num_attention_heads 6", "tensor_parallel_size 4", "divisor of 6"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--pipeline-parallel-size=2", "--pipeline-parallel-layers=2,2"],
            ["pipeline_parallel_layers 2,2", "3 layers"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_sizes_that_do_not_go_together(llama: Path, tmp_path: Path, flags: Sequence[str], words: list[str]) -> None:
    with worker(llama, f"--listen=unix:{tmp_path}/w.sock", *flags) as process:
        message = message_of(process)
    assert all(word in message for word in words), message


def test_a_peer_that_never_comes(llama: Path, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    flags = ("--tensor-parallel-size=2", "--num-nodes=2", f"--group-listen={address}", "--group-timeout-s=2")
    with worker(llama, f"--listen=unix:{tmp_path}/w.sock", *flags) as process:
        message = message_of(process)
    assert "node 1 (rank 1) did not join within 2 s" in message and f"--join {address}" in message


def test_a_first_node_that_is_not_there(llama: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    with worker(llama, f"--join={address}", "--group-timeout-s=1") as process:
        message = message_of(process)
    assert f"first node cannot be reached at {address}" in message and "--group-listen" in message


def test_a_first_node_that_is_no_address(llama: Path) -> None:
    with worker(llama, "--join=10.0.0.1") as process:
        message = message_of(process)
    assert "--join '10.0.0.1' is neither HOST:PORT" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": "0.0.1"}, ["runs stepwire 0.0.1", f"rank 0 runs {stepwire.__version__}", "same release"]),
        pytest.param(
            {"model_digest": "feedfeedfeedfeed"},
            ["another model than rank 0", "same files on all nodes"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["version", "model"],
)
def test_a_rank_of_another_version_or_model(
    llama: Path, tmp_path: Path, change: dict[str, str], words: list[str]
) -> None:
    """Both sides say the same: the node that is refused, and rank 0, which ends."""
    address = f"127.0.0.1:{free_port()}"
    flags = ("--tensor-parallel-size=2", "--num-nodes=2", f"--group-listen={address}", *PATIENT)
    fields = {"version": stepwire.__version__, "model_digest": model_digest(llama), "host": "10.0.0.2"} | change
    hello = group_pb2.NodeHello(protocol_version=1, **fields)
    with worker(llama, f"--listen=unix:{tmp_path}/w.sock", *flags) as process:
        with grpc.insecure_channel(address) as channel:
            grpc.channel_ready_future(channel).result(LIMIT_S)
            stub = group_pb2_grpc.GroupServiceStub(channel)
            with pytest.raises(grpc.RpcError) as refused:
                next(stub.Join(iter([group_pb2.JoinRequest(hello=hello)])))
        message = message_of(process)
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION  # type: ignore[attr-defined]
    for said in (message, refused.value.details()):  # type: ignore[attr-defined]
        assert "node 1 (rank 1) at 10.0.0.2" in said
        assert all(word in said for word in words), said


@contextlib.contextmanager
def rank_alone() -> Iterator[tuple[subprocess.Popen[bytes], Channel]]:
    """A rank by itself, and the pipe by which it is commanded."""
    ours, theirs = socket.socketpair()
    with theirs:
        rank = subprocess.Popen(
            [sys.executable, "-m", RANK_MODULE, str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            cwd=REPOSITORY,
            env={"PYTHONPATH": ".:proto:kernels"},
            stderr=subprocess.PIPE,
        )
    try:
        yield rank, Channel(ours)
    finally:
        rank.kill()
        rank.wait()
        if rank.stderr is not None:
            rank.stderr.close()


def begin(channel: Channel, place: group_pb2.RankPlace) -> None:
    for command in (group_pb2.RankCommand(place=place), group_pb2.RankCommand(form=group_pb2.Empty())):
        channel.send(command.SerializeToString())
    assert channel.receive(group_pb2.RankEvent).WhichOneof("event") == "started"


def test_a_rank_that_fails_says_where_and_logs_one_line(llama: Path) -> None:
    """Whether anybody wants to see the trace is for the first rank to know."""
    store = StoreServer("127.0.0.1")
    place = group_pb2.RankPlace(
        tensor_parallel_size=1,
        stage_layers=[3],
        num_local_ranks=1,
        store_address=store.address,
        host="127.0.0.1",
        timeout_s=LIMIT_S,
        settings=f'{{"model": "{llama}", "device": "cpu", "cpu_kv_cache_gib": 0.01, "num_threads": 1}}',
    )
    with rank_alone() as (rank, channel):
        begin(channel, place)
        assert channel.receive(group_pb2.RankEvent).WhichOneof("event") == "ready"
        broken = worker_pb2.StepBatch(step_id=1, run_rows=b"123")
        channel.send(group_pb2.RankCommand(step=broken).SerializeToString())
        failure = channel.receive(group_pb2.RankEvent).failure
        assert failure.is_consequence and failure.message.startswith("a step failed: StepError: ")
        assert failure.trace.startswith("Traceback") and "rank_process.py" in failure.trace
        channel.close()
        assert rank.wait(LIMIT_S) == 1
        assert rank.stderr is not None
        logged = rank.stderr.read().decode()
        assert logged.count("this rank ends") == 1 and "Traceback" not in logged


def test_a_store_that_cannot_be_reached(llama: Path) -> None:
    """A place whose store nobody listens at."""
    with rank_alone() as (rank, channel):
        place = group_pb2.RankPlace(
            rank=1,
            tensor_parallel_size=2,
            stage_layers=[3],
            num_local_ranks=1,
            store_address=f"127.0.0.1:{free_port()}",
            host="127.0.0.1",
            timeout_s=1.0,
            settings=f'{{"model": "{llama}", "device": "cpu"}}',
        )
        begin(channel, place)
        failure = channel.receive(group_pb2.RankEvent).failure
        assert not failure.is_consequence
        assert f"rank 1 (tensor-parallel rank 1 of 2) cannot reach its group's store at {place.store_address}" in (
            failure.message
        )
        assert rank.wait(LIMIT_S) == 1


def test_a_rank_that_is_killed_while_it_loads(llama: Path, tmp_path: Path) -> None:
    with worker(llama, f"--listen=unix:{tmp_path}/w.sock", "--tensor-parallel-size=2", *PATIENT) as process:
        process.wait_for_event("rank started")
        children: list[psutil.Process] = []
        wait_until(
            lambda: bool(children.extend(psutil.Process(process.process.pid).children()) or children), LIMIT_S, "a rank"
        )
        children[0].kill()
        message = message_of(process)
    assert "rank 1 (tensor-parallel rank 1 of 2): its process" in message and "SIGKILL" in message


def test_ranks_end_with_rank_0_even_where_they_hang(llama: Path, tmp_path: Path) -> None:
    """kill -9 of rank 0 while a rank is stopped: it sees nothing, and yet nothing is left."""
    with worker(llama, f"--listen=unix:{tmp_path}/w.sock", "--pipeline-parallel-size=2", *PATIENT) as process:
        process.wait_for_event("this rank waits for the others")
        ranks = psutil.Process(process.process.pid).children()
        assert len(ranks) == 1
        ranks[0].suspend()
        process.process.kill()
        process.process.wait()
        wait_until(lambda: not any(rank.is_running() for rank in ranks), LIMIT_S, "the end of the ranks")


@pytest.mark.slow
@pytest.mark.parametrize("stopped", ["rank", "relay"])
def test_another_node_ends_with_rank_0_even_where_it_hangs(llama: Path, tmp_path: Path, stopped: str) -> None:
    """kill -9 of rank 0 while another node's rank is stopped, or its relay, which is woken afterwards."""
    address, listen = f"127.0.0.1:{free_port()}", f"unix:{tmp_path}/w.sock"
    flags = ("--tensor-parallel-size=2", "--num-nodes=2", f"--group-listen={address}", f"--listen={listen}", *PATIENT)
    with worker(llama, *flags) as first, worker(llama, f"--join={address}", *PATIENT) as second:
        first.wait_for_event("worker ready")
        relay = psutil.Process(second.process.pid)
        (rank,) = relay.children()
        (rank if stopped == "rank" else relay).suspend()
        first.process.kill()
        first.process.wait()
        if stopped == "relay":
            relay.resume()
        assert "has ended" in message_of(second)
        wait_until(lambda: not rank.is_running(), LIMIT_S, "the end of the rank")


@pytest.mark.slow
@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_two_nodes_on_one_machine(llama: Path, tmp_path: Path, host: str) -> None:
    """A relay joins, the group serves, a rank of the relay's goes, and everything goes with it."""
    address, listen = f"{host}:{free_port()}", f"unix:{tmp_path}/w.sock"
    flags = ("--tensor-parallel-size=2", "--num-nodes=2", f"--group-listen={address}", f"--listen={listen}", *PATIENT)
    with worker(llama, *flags) as first, worker(llama, f"--join={address}", *PATIENT) as second:
        first.wait_for_event("worker ready")
        (rank,) = psutil.Process(second.process.pid).children()
        rank.kill()
        wait_until(lambda: first.process.poll() is not None, LIMIT_S, "the end of rank 0")
        assert first.wait_for_exit() == 1
        assert any("rank 1 (tensor-parallel rank 1 of 2): its process" in line for line in first.lines)
        assert "has ended" in message_of(second)


class Namespaces:
    """Two network namespaces that reach each other and nothing else, by the one protocol of their addresses."""

    def __init__(self, addresses: tuple[str, str]) -> None:
        self.addresses = addresses
        self.names = tuple(f"stepwire-{uuid.uuid4().hex[:6]}" for _ in self.addresses)

    def __enter__(self) -> Namespaces:
        try:
            first, second = self.names
            for name in self.names:
                _ip("netns", "add", name)
            _ip("-n", first, "link", "add", "link0", "type", "veth", "peer", "name", "link0", "netns", second)
            for name, address in zip(self.names, self.addresses, strict=True):
                is_new = ":" in address
                # Nobody else is there: an address need not be tried out first.
                _ip(
                    "-n",
                    name,
                    "addr",
                    "add",
                    *((f"{address}/64", "nodad") if is_new else (f"{address}/24",)),
                    "dev",
                    "link0",
                )
                for device in ("lo", "link0"):
                    _ip("-n", name, "link", "set", device, "up")
                if is_new:
                    _ip("-n", name, "addr", "del", "127.0.0.1/8", "dev", "lo")
        except (OSError, subprocess.CalledProcessError) as error:
            self.__exit__()
            pytest.skip(f"network namespaces are not permitted here: {error}")
        return self

    def __exit__(self, *error: object) -> None:
        for name in self.names:
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                _ip("netns", "del", name)

    def prefix(self, node: int) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.names[node])


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def make_certificates(folder: Path, addresses: Sequence[str]) -> None:
    """ca.pem and, for each node, node<i>.pem and .key with its address in it."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *new_key, "-days", "1", "-subj", "/CN=group", "-keyout", "ca.key", "-out", "ca.pem")
    for node, address in enumerate(addresses):
        name = f"node{node}"
        openssl("req", *new_key, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        (folder / "san").write_text(f"subjectAltName=IP:{address}")
        issue = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "1", "-extfile", "san")
        openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *issue)


@pytest.mark.skipif(shutil.which("openssl") is None or shutil.which("ip") is None, reason="needs openssl and ip")
@pytest.mark.parametrize(
    "addresses",
    [("10.203.0.1", "10.203.0.2"), pytest.param(("fd00:203::1", "fd00:203::2"), marks=pytest.mark.slow)],
    ids=["IPv4", "IPv6"],
)
def test_two_machines_with_mutual_tls(llama: Path, tmp_path: Path, addresses: tuple[str, str]) -> None:
    """A stage on each: the tokens of one rank, over a network that has nothing else, commands under TLS."""
    expected = StepDriver(TorchRunner.load(WorkerSettings(model=llama, device="cpu", dtype="float32", num_threads=1)))
    listen = f"unix:{tmp_path}/w.sock"
    with Namespaces(addresses) as machines:
        make_certificates(tmp_path, machines.addresses)

        def tls(node: int) -> list[str]:
            names = {"cert": f"node{node}.pem", "key": f"node{node}.key", "ca": "ca.pem"}
            return [f"--group-tls-{what}={tmp_path / name}" for what, name in names.items()]

        host = machines.addresses[0]
        address = f"[{host}]:7077" if ":" in host else f"{host}:7077"
        flags = (
            "--pipeline-parallel-size=2",
            "--num-nodes=2",
            f"--group-listen={address}",
            f"--listen={listen}",
            *PATIENT,
        )
        first = worker(llama, *flags, *tls(0), prefix=machines.prefix(0))
        stranger = worker(llama, f"--join={address}", "--group-timeout-s=5", prefix=machines.prefix(1))
        with first, stranger:
            # Without a certificate there is no way in, and rank 0 goes on waiting.
            assert "cannot be reached" in message_of(stranger)
            with worker(llama, f"--join={address}", *tls(1), *PATIENT, prefix=machines.prefix(1)) as second:
                first.wait_for_event("worker ready")
                with WorkerClient(listen) as client:
                    actual = StepDriver(RemoteRunner(client))
                    for driver in (expected, actual):
                        driver.add(0, range(40, 60), sampling(seed=3))
                        driver.step({0: 13})
                        driver.add(1, [5, 6, 7], greedy())
                        for _ in range(8):
                            driver.step()
                    assert [row.tokens for row in actual.rows.values()] == [
                        row.tokens for row in expected.rows.values()
                    ]
                # The node that only relays is told to end: the group does so in peace.
                second.send_signal(signal.SIGTERM)
                assert "rank 1 (stage 1 of 2): its node is told to end" in first.wait_for_event("told to end")["event"]
                assert first.wait_for_exit() == 0
                assert second.wait_for_exit() == 0


class RemoteRunner:
    """A worker process as the `Runner` that a driver expects."""

    def __init__(self, client: WorkerClient) -> None:
        self._client = client

    def describe(self) -> WorkerFacts:
        facts = self._client.describe()
        names = ("num_blocks", "first_block_id", "block_size", "max_model_len", "max_num_seqs", "vocab_size")
        return replace(_NO_FACTS, **{name: getattr(facts, name) for name in names})

    def reset(self) -> None:
        self._session = self._client.start()

    def execute(self, batch: StepBatch, wait_for_mask: Callable[[], TokenMask]) -> FinishedStep:
        self._session.step(batch)
        return FinishedStep(self._session.result())

    def close(self) -> None:
        return None


_NO_FACTS = WorkerFacts("", "", "", "", (), 0, 0, 0, 0, 0, 0, (), 0, 0, 0, False)
