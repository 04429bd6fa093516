"""The example clients run as they stand, against the real stack, and all of them say the same."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from .conftest import LIMIT_S, Stack, wait_until
from .example_clients import BUILDERS, EXAMPLES, ROOT, ExampleClient
from .launched import Launched

KEY = "example-key"
BUF = Path(sys.executable).parent / "buf"
COMMANDS = ("health", "watch", "reflect", "generate", "chat", "deadline", "cancel", "embed")
MINILM_DIMENSIONS = 384


@pytest.fixture(scope="module")
def locked(tiny_model: Path) -> Iterator[Stack]:
    """A stack that asks for a key; 3,000 tokens take it 15 s."""
    flags = ["--api-key", KEY, "--log-format=json", "--log-level=debug"]
    with Stack(tiny_model, worker_flags=["--sim-step-ms", "5"], control_plane_flags=flags, api_key=KEY) as running:
        yield running


@pytest.fixture(scope="module", params=BUILDERS)
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ExampleClient:
    return BUILDERS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture
def embedder(minilm_server: Launched) -> Launched:
    return minilm_server


def test_health_and_reflection(locked: Stack, client: ExampleClient) -> None:
    """Health asks for no key, everything else does."""
    assert client.run(locked.grpc_address, "health").stdout.split() == ["SERVING"]
    services = client.run(locked.grpc_address, "reflect", key=KEY)
    assert "stepwire.v1.InferenceService" in services.stdout.split(), services.stderr
    with client.start(locked.grpc_address, "watch") as watching:
        assert watching.stdout is not None and watching.stdout.readline().strip() == "SERVING"
        watching.terminate()


def test_texts_are_streamed(locked: Stack, client: ExampleClient) -> None:
    generated = client.run(locked.grpc_address, "generate", "Hello", key=KEY)
    chatted = client.run(locked.grpc_address, "chat", "Hello", key=KEY)
    num_prompt_tokens = []
    for told in (generated, chatted):
        assert told.returncode == 0 and told.stdout, told.stderr
        counted = re.search(r"^(\d+) \+ (\d+) tokens$", told.stderr, re.MULTILINE)
        assert counted is not None and 1 <= int(counted[2]) <= 64, told.stderr
        num_prompt_tokens.append(int(counted[1]))
    # The same text in the model's template is longer.
    assert num_prompt_tokens[0] < num_prompt_tokens[1]


def traces(stack: Stack) -> list[str]:
    """Of all requests that were accepted with one."""
    log = (stack.directory / "control_plane.log").read_text()
    entries = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    return [entry["trace_id"] for entry in entries if entry.get("event") == "request accepted" and "trace_id" in entry]


def test_a_trace_goes_along(locked: Stack, client: ExampleClient) -> None:
    num_before = len(traces(locked))
    for _ in range(2):
        assert client.run(locked.grpc_address, "generate", "Hello", key=KEY).returncode == 0
    wait_until(lambda: len(traces(locked)) == num_before + 2, LIMIT_S, locked.logs)
    first, second = traces(locked)[num_before:]
    assert first != second and all(re.fullmatch("[0-9a-f]{32}", each) for each in (first, second))


def test_deadline_and_cancellation(locked: Stack, client: ExampleClient) -> None:
    cancelled = locked.control_plane_metric("stepwire_cancelled_requests_total")
    late = client.run(locked.grpc_address, "deadline", "Hello", key=KEY)
    assert late.returncode == 1 and "refused: DEADLINE_EXCEEDED" in late.stderr
    stopped = client.run(locked.grpc_address, "cancel", "Hello", key=KEY)
    assert stopped.returncode == 1 and "refused: CANCELLED" in stopped.stderr
    locked.wait_idle()
    assert locked.control_plane_metric("stepwire_cancelled_requests_total") >= cancelled + 1


def test_refusals_are_explained(locked: Stack, client: ExampleClient) -> None:
    unknown = client.run(locked.grpc_address, "chat", "Hello", key="wrong")
    assert unknown.returncode == 1 and "refused: UNAUTHENTICATED: " in unknown.stderr
    long = client.run(locked.grpc_address, "chat", "word " * 20_000, key=KEY)
    assert long.returncode == 1 and "refused: INVALID_ARGUMENT: " in long.stderr
    assert "\n  chat.messages: " in long.stderr


def test_embeddings(embedder: Launched, client: ExampleClient) -> None:
    told = client.run(f"127.0.0.1:{embedder.grpc_port}", "embed", "A man is eating food.")
    assert told.returncode == 0, told.stderr
    num_values, *values = told.stdout.split()
    assert int(num_values) == MINILM_DIMENSIONS
    assert [float(value) for value in values] == pytest.approx(first_values(embedder), abs=2e-4)


def first_values(embedder: Launched) -> list[float]:
    from stepwire.v1 import inference_pb2, inference_pb2_grpc

    with grpc.insecure_channel(f"127.0.0.1:{embedder.grpc_port}") as channel:
        request = inference_pb2.EmbedRequest(inputs=[inference_pb2.PooledInput(text="A man is eating food.")])
        answer = inference_pb2_grpc.InferenceServiceStub(channel).Embed(request, timeout=120)
    return list(answer.embeddings[0].values[:3])


@pytest.mark.parametrize("language", BUILDERS)
def test_every_page_has_every_command(language: str) -> None:
    page = (EXAMPLES / language / "README.md").read_text()
    for command in COMMANDS:
        assert re.search(rf" 127\.0\.0\.1:50051 {command}\b", page), command


def shell_commands() -> list[list[str]]:
    lines = (EXAMPLES / "shell" / "README.md").read_text().splitlines()
    return [shlex.split(line) for line in lines if line.startswith("grpcurl ")]


def through_buf(command: list[str], address: str) -> list[str]:
    """The same call for `buf curl`."""
    header = f"authorization: Bearer {KEY}"
    told = [str(BUF), "curl", "--protocol", "grpc", "-H", header, "--reflect-header", header]
    if "-d" in command:
        told += ["-d", command[command.index("-d") + 1]]
    *_, before, last = command
    if last == "list":
        return [*told, "--list-services", f"http://{address}"]
    if before == "list":
        return [*told, "--list-methods", f"http://{address}"]
    return [*told, f"http://{address}/{last}"]


def through_grpcurl(command: list[str], address: str) -> list[str]:
    return [
        "grpcurl",
        "-H",
        f"authorization: Bearer {KEY}",
        *(address if word == "127.0.0.1:50051" else word for word in command[1:]),
    ]


def test_the_shell_page(locked: Stack, embedder: Launched) -> None:
    """Every command of the page; what is said for embeddings goes to a model that has them."""
    if not BUF.exists():
        pytest.skip("buf is not installed (pip install buf-bin)")
    run_shell_page(through_buf, locked, embedder)
    if shutil.which("grpcurl") is not None:
        run_shell_page(through_grpcurl, locked, embedder)


def run_shell_page(tool: Callable[[list[str], str], list[str]], locked: Stack, embedder: Launched) -> None:
    answers: dict[str, list[str]] = {}
    for command in shell_commands():
        pools = command[-1].endswith(("/Embed", "/Score"))
        address = f"127.0.0.1:{embedder.grpc_port}" if pools else locked.grpc_address
        told = subprocess.run(tool(command, address), capture_output=True, text=True, timeout=120, cwd=ROOT)
        assert told.returncode == 0, (command, told.stderr)
        answers.setdefault(command[-1].rpartition("/")[2], []).append(told.stdout)
    assert "SERVING" in answers["Check"][0]
    assert all('"usage"' in told for told in answers["Generate"]), answers["Generate"]
    # Two answers of the conversation.
    assert answers["Generate"][1].count('"finishReason"') == 2
    assert len(json.loads(answers["Embed"][0])["embeddings"][0]["values"]) == 8
    assert len(json.loads(answers["Score"][0])["scores"]) == 1
