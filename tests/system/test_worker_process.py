"""`python -m gpu_worker --runner simulated` as people and launchers start it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from gpu_worker.runner_api import TokenMask
from tests.system.worker_process import REPOSITORY, TIMEOUT_S, WorkerClient, WorkerProcess
from tests.unit.gpu_worker.step_builder import Run, row_add, step, uint32

FLAGS = ["--runner=simulated", "--log-format=json", "--sim-step-ms=0", "--sim-vocab-size=64"]


@pytest.fixture
def listen(tmp_path: Path) -> str:
    return f"unix:{tmp_path}/w.sock"


def start(listen: str, *flags: str) -> WorkerProcess:
    worker = WorkerProcess([*FLAGS, f"--listen={listen}", *flags])
    worker.wait_for_event("worker ready")
    return worker


@pytest.fixture
def worker(listen: str) -> Iterator[WorkerProcess]:
    with start(listen) as worker:
        yield worker


def test_a_sequence_over_the_wire(worker: WorkerProcess, listen: str) -> None:
    ready = worker.wait_for_event("worker ready")
    assert ready["listen"] == listen and ready["seconds"] > 0
    with WorkerClient(listen) as client:
        session = client.start()
        # Each step runs the token that the one before drew, though no result has been read.
        adds = [row_add(0, range(20), [1, 2], num_logprobs=2)]
        session.step(step(1, [Run(0, 0, 20)], adds=adds))
        for step_id in range(2, 9):
            session.step(step(step_id, [Run(0, 18 + step_id)]))
        masked = step(9, [Run(0, 27)], mask_rows=[0])
        session.step(masked)
        session.mask(9, TokenMask(rows=uint32([0]), bitmask=np.array([[0, 1 << 31]], dtype=np.uint32)))
        results = [session.result() for _ in range(9)]
        assert [result.step_id for result in results] == list(range(1, 10))
        assert all(result.rows.tolist() == [0] and not result.faults for result in results)
        assert results[-1].token_ids.tolist() == [63]
        assert len({int(result.token_ids[0]) for result in results}) > 3
        assert results[0].top_token_ids is not None and results[0].top_token_ids.shape == (1, 2)
        session.step(step(10, [Run(0, 5)]))
        assert [fault.code.name for fault in session.result().faults] == ["POSITION_MISMATCH"]
    assert worker.wait_for_event("step breaks the contract")["step_id"] == 10


def test_two_steps_in_flight_overlap(listen: str) -> None:
    with start(listen, "--sim-step-ms=2000") as worker, WorkerClient(listen) as client:
        session = client.start()
        session.step(step(1, [Run(0, 0)], adds=[row_add(0, [1], [1])]))
        session.step(step(2, [Run(0, 1)]))
        first, second = session.receive().result, session.receive().result
        assert (first.step_id, second.step_id) == (1, 2)
        # The second was launched, not queued, while the first was on the device for its 2 s.
        assert second.timings.queue_ns < 1_000_000_000 < first.timings.forward_ns == 2_000_000_000
        assert worker.process.poll() is None


def test_a_replaced_session_starts_from_nothing(worker: WorkerProcess, listen: str) -> None:
    with WorkerClient(listen) as client, WorkerClient(listen) as other:
        old = client.start("old")
        old.step(step(1, [Run(0, 0)], adds=[row_add(0, [1], [1])]))
        assert old.result().rows.tolist() == [0]
        new = other.start("new")
        assert old.end()[0] == grpc.StatusCode.ABORTED
        new.step(step(1, [Run(0, 1)]))
        assert [fault.code.name for fault in new.result().faults] == ["UNKNOWN_ROW"]


def test_messages_larger_than_grpcs_default(listen: str) -> None:
    num_tokens = 1_200_000
    flags = [f"--sim-max-model-len={num_tokens + 16}", "--sim-max-num-seqs=1", "--sim-num-blocks=80000"]
    with start(listen, *flags, f"--sim-max-num-batched-tokens={num_tokens}"), WorkerClient(listen) as client:
        session = client.start()
        add = row_add(0, [7] * num_tokens, range(1, num_tokens // 16 + 2))
        session.step(step(1, [Run(0, 0, num_tokens)], adds=[add]))
        assert session.result().rows.tolist() == [0]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--sim-crash-at-step=2"], "sim_crash_at_step is 2"),
        (["--sim-poison-token=33"], "ran sim_poison_token 33"),
        (["--sim-strict"], "run starts at position 9, but the row has 1 computed tokens"),
    ],
)
def test_a_planted_crash_ends_the_process_with_1(listen: str, flags: list[str], reason: str) -> None:
    with start(listen, *flags) as worker, WorkerClient(listen) as client:
        session = client.start()
        session.step(step(1, [Run(0, 0)], adds=[row_add(0, [1], [1])]))
        assert session.result().step_id == 1
        runs = [Run(0, 9)] if "--sim-strict" in flags else []
        session.step(step(2, [*runs, Run(1, 0)], adds=[row_add(1, [33], [2])]))
        code, message = session.end()
        assert code == grpc.StatusCode.INTERNAL and reason in message and "step 2" in message
        assert worker.wait_for_exit() == 1


def test_a_hanging_step_does_not_hold_the_process(listen: str) -> None:
    flags = ["--sim-hang-at-step=1", "--sim-drop-stream-at-step=2", "--shutdown-grace-s=0.2"]
    with start(listen, *flags) as worker, WorkerClient(listen) as client:
        session = client.start()
        session.step(step(1, [Run(0, 0)], adds=[row_add(0, [1], [1])]))
        session.step(step(2))
        assert session.end()[0] == grpc.StatusCode.UNAVAILABLE  # so step 1 is on the device
        client.open("another")  # is not ready before step 1 retires, which it never does
        worker.wait_for_event("session begins")
        worker.send_signal(signal.SIGTERM)
        assert worker.wait_for_exit() == 1
        assert any("a step hangs" in line or "has not ended" in line for line in worker.lines)


def test_a_dropped_stream_and_a_result_out_of_order(listen: str) -> None:
    with start(listen, "--sim-drop-stream-at-step=1", "--sim-out-of-order-at-step=2"), WorkerClient(listen) as client:
        session = client.start()
        session.step(step(1))
        assert session.end() == (grpc.StatusCode.UNAVAILABLE, "step 1: sim_drop_stream_at_step is 1")
        session = client.start()
        session.step(step(1))
        assert session.result().step_id == 2


def test_sigterm_ends_with_0_and_removes_the_socket(worker: WorkerProcess, listen: str) -> None:
    worker.send_signal(signal.SIGTERM)
    assert worker.wait_for_exit() == 0
    assert not Path(listen.removeprefix("unix:")).exists()


def test_a_socket_left_by_a_killed_worker_is_taken_over(worker: WorkerProcess, listen: str) -> None:
    worker.process.kill()
    worker.process.wait()
    assert Path(listen.removeprefix("unix:")).exists()
    with start(listen), WorkerClient(listen) as client:
        assert client.health() == "SERVING"


@pytest.mark.parametrize("kind", ["socket", "port"])
def test_an_address_in_use_is_one_line_and_code_1(worker: WorkerProcess, listen: str, kind: str) -> None:
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        address = listen if kind == "socket" else f"127.0.0.1:{used.getsockname()[1]}"
        with WorkerProcess([*FLAGS, f"--listen={address}"]) as second:
            assert second.wait_for_exit() == 1
    [line] = second.lines
    assert line.startswith("python -m gpu_worker: --listen: ") and "in use by another process" in line
    with WorkerClient(listen) as client:
        assert client.health() == "SERVING"  # the first one is unharmed


def test_two_workers_cannot_share_a_port() -> None:
    with WorkerProcess([*FLAGS, "--listen=127.0.0.1:0"]) as first:
        address = first.wait_for_event("worker ready")["listen"]
        assert not address.endswith(":0")
        with WorkerClient(address) as client:
            assert client.health() == "SERVING"
        with WorkerProcess([*FLAGS, f"--listen={address}"]) as second:
            assert second.wait_for_exit() == 1


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--listen", "nowhere"], 1, "neither HOST:PORT"),
        (["--model", "{tmp}", "--sim-eos-token-id", "99"], 1, "sim_eos_token_id is 99: it must be below"),
        (["--blocksize", "16"], 2, "did you mean --block-size?"),
    ],
)
def test_what_a_person_gets_wrong_is_one_line(tmp_path: Path, flags: list[str], code: int, message: str) -> None:
    address = f"--listen=unix:{tmp_path}/w.sock"
    with WorkerProcess([*FLAGS, address, *(flag.format(tmp=tmp_path) for flag in flags)]) as worker:
        assert worker.wait_for_exit() == code
    assert len(worker.lines) == 1 and message in worker.lines[0]


def test_a_worker_is_configured_by_variables_and_a_file(tmp_path: Path, listen: str) -> None:
    file = tmp_path / "worker.yaml"
    file.write_text(f"runner: simulated\nlisten: {listen}\nlog_format: json\nmax-num-seqs: 5\n")
    variables = {"STEPWIRE_CONFIG": os.fspath(file), "STEPWIRE_SIM_VOCAB_SIZE": "77"}
    with WorkerProcess([], env=variables) as worker, WorkerClient(listen) as client:
        worker.wait_for_event("worker ready")
        described = client.describe()
        assert (described.max_num_seqs, described.vocab_size) == (5, 77)


def test_no_orphan_stays(tmp_path: Path) -> None:
    pid_file, log_file = tmp_path / "pid", tmp_path / "log"
    flags = [*FLAGS, f"--listen=unix:{tmp_path}/w.sock", "--exit-with-parent"]
    code = (
        "import subprocess, sys, time;"
        f"p = subprocess.Popen([sys.executable, '-m', 'gpu_worker', *{flags!r}], stderr=open({str(log_file)!r}, 'w'));"
        f"open({str(pid_file)!r}, 'w').write(str(p.pid)); time.sleep(600)"
    )
    environment = {**os.environ, "PYTHONPATH": ".:proto"}
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, env=environment)
    try:
        wait_until(lambda: log_file.exists() and "worker ready" in log_file.read_text())
        pid = int(pid_file.read_text())
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not is_running(pid))
    assert "simulation closed" in log_file.read_text(), "it ended by being told to, not by being killed"


def is_running(pid: int) -> bool:
    """Whether it runs: an orphan that has ended may stay a zombie where nobody reaps it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: object) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and a server's and a client's certificate by it; a stranger's by nobody."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    openssl(
        "req", "-x509", *new_key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=test authority", "-days", "2"
    )
    for name in ("server", "client"):
        openssl("req", *new_key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        (folder / "ext").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
        issue = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "ext"]
        openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *issue)
    return folder


def test_mutual_tls(certificates: Path) -> None:
    def read(name: str) -> bytes:
        return (certificates / name).read_bytes()

    tls = [f"--tls-cert={certificates}/server.pem", f"--tls-key={certificates}/server.key"]
    mutual = [*tls, f"--tls-client-ca={certificates}/ca.pem"]
    with WorkerProcess([*FLAGS, "--listen=127.0.0.1:0", *mutual]) as worker:
        address = worker.wait_for_event("worker ready")["listen"]
        known = grpc.ssl_channel_credentials(read("ca.pem"), read("client.key"), read("client.pem"))
        with WorkerClient(address, known) as client:
            session = client.start()
            session.step(step(1))
            assert session.result().step_id == 1
        for stranger in (grpc.ssl_channel_credentials(read("ca.pem")), None):
            with WorkerClient(address, stranger) as client, pytest.raises(grpc.RpcError) as caught:
                client.describe()
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]


def test_the_command_line_works_from_a_plain_interpreter(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gpu_worker", "--help"]
    environment = {**os.environ, "PYTHONPATH": ".:proto"}
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    assert "--sim-strict" in result.stdout and result.stderr == ""
