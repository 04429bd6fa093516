"""`stepwire serve`: it starts, survives the death of its parts, and ends without a trace."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest

from .launched import LIMIT_S, ROOT, Launched, wait_until
from .ports import free_port

SIMULATED = ("--runner=simulated", "--served-model-name=sim")


@pytest.fixture(scope="module")
def bare_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config.json alone: no tokenizer, so token ids go in and out."""
    directory = tmp_path_factory.mktemp("models") / "bare"
    directory.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1_000_000}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def lasting(bare_model: Path) -> Iterator[Launched]:
    """One that tests share, whose parts may die: leave it running. The last test of this file kills it as a whole."""
    with pytest.MonkeyPatch.context() as patch:
        # Every worker stands still for a while at its 30th step, shorter than what counts as hung.
        for name, value in (("STEP_MS", "10"), ("DELAY_AT_STEP", "30"), ("DELAY_S", "5")):
            patch.setenv(f"STEPWIRE_SIM_{name}", value)
        with Launched(bare_model, *SIMULATED) as launched:
            yield launched


async def stream(
    base_url: str, model: str, prompt: list[int] | str, max_tokens: int, seed: int, n: int = 1
) -> dict[int, list]:
    """Token ids of every choice of one streamed completion."""
    client = openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=120)
    choices: dict[int, list] = {}
    events = await client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=max_tokens,
        seed=seed,
        n=n,
        temperature=0.8,
        stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    async for event in events:
        for choice in event.choices:
            choices.setdefault(choice.index, []).extend(choice.model_extra.get("token_ids") or [])
    await client.close()
    return choices


async def eight_streams(launched: Launched, model: str, max_tokens: int) -> list[dict[int, list]]:
    shared = list(range(100, 140))
    return await asyncio.gather(
        *(
            stream(
                launched.base_url,
                model,
                [*shared[: 5 * number], 7 + number],
                max_tokens,
                seed=number,
                n=1 + (number == 3),
            )
            for number in range(8)
        )
    )


def kill_worker(launched: Launched) -> None:
    """Until the control plane talks to the next one."""
    connections = launched.metric("stepwire_worker_connections_total")
    launched.child("gpu_worker").kill()
    wait_until(lambda: launched.metric("stepwire_worker_connections_total") > connections, LIMIT_S, "the next worker")


def test_streams_survive_the_death_of_the_worker(lasting: Launched) -> None:
    """kill -9 in the middle of eight streams: every one goes on, token for token as if nothing had happened."""
    undisturbed = asyncio.run(eight_streams(lasting, "sim", 80))
    assert all(len(tokens) == 80 for choices in undisturbed for tokens in choices.values())
    kill_worker(lasting)
    losses = lasting.metric("stepwire_worker_losses_total")

    async def disturbed() -> list[dict[int, list]]:
        streams = asyncio.create_task(eight_streams(lasting, "sim", 80))
        for _ in range(2):
            before = await asyncio.to_thread(lasting.metric, "stepwire_generation_tokens_total")
            while await asyncio.to_thread(lasting.metric, "stepwire_generation_tokens_total") < before + 180:
                assert not streams.done(), "over before the worker was lost"
                await asyncio.sleep(0.05)
            await asyncio.to_thread(kill_worker, lasting)
        return await streams

    assert asyncio.run(disturbed()) == undisturbed
    assert lasting.metric("stepwire_worker_losses_total") == losses + 2
    assert lasting.metric("stepwire_kv_blocks_in_use") == 0


def test_a_hung_worker_is_replaced(bare_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped process answers nothing and closes nothing: its step's deadline ends the session."""
    monkeypatch.setenv("STEPWIRE_STEP_TIMEOUT_S", "4")
    monkeypatch.setenv("STEPWIRE_SIM_STEP_MS", "40")
    with Launched(bare_model, *SIMULATED) as launched:
        tokens = asyncio.run(stream(launched.base_url, "sim", [1, 2, 3], 40, seed=1))
        worker = launched.child("gpu_worker")

        async def run() -> dict[int, list]:
            before = launched.metric("stepwire_generation_tokens_total")
            task = asyncio.create_task(stream(launched.base_url, "sim", [1, 2, 3], 120, seed=1))
            while launched.metric("stepwire_generation_tokens_total") < before + 20:
                await asyncio.sleep(0.05)
            worker.suspend()
            while not launched.metric("stepwire_worker_losses_total"):
                await asyncio.sleep(0.1)
            # The control plane cannot kill a process, and need not: whoever watches it does.
            worker.kill()
            return await task

        assert asyncio.run(run())[0][:40] == tokens[0]


def test_a_step_that_never_ends_ends_its_worker(bare_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody kills it: the control plane gives the session up, and the worker sees that it cannot begin another."""
    monkeypatch.setenv("STEPWIRE_SIM_HANG_AT_STEP", "20")
    # Longer than a busy machine takes for a step that does end.
    monkeypatch.setenv("STEPWIRE_STEP_TIMEOUT_S", "5")
    monkeypatch.setenv("STEPWIRE_HANG_LIMIT_S", "1")
    with Launched(bare_model, *SIMULATED) as launched:
        first = launched.child("gpu_worker").pid
        # 30 tokens: 19 steps of the first worker, the rest of the second.
        assert len(asyncio.run(stream(launched.base_url, "sim", [1, 2, 3], 30, seed=1))[0]) == 30
        assert launched.child("gpu_worker").pid != first
        assert launched.metric("stepwire_worker_losses_total") == 1


# In every run of groups that a test starts again: tests/system/test_groups.py.
@pytest.mark.slow
def test_a_request_that_crashes_every_worker_ends_alone(bare_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPWIRE_SIM_POISON_TOKEN", "666")
    monkeypatch.setenv("STEPWIRE_SIM_STEP_MS", "20")
    with Launched(bare_model, *SIMULATED) as launched:

        async def run() -> tuple[list[dict[int, list]], BaseException]:
            good = asyncio.create_task(eight_streams(launched, "sim", 200))
            while launched.metric("stepwire_generation_tokens_total") < 50:
                await asyncio.sleep(0.05)
            try:
                await stream(launched.base_url, "sim", [1, 666, 2], 10, seed=0)
            except openai.APIError as error:
                return await good, error
            raise AssertionError("the poisonous request was answered")

        good, error = asyncio.run(run())
        assert all(len(tokens) == 200 for choices in good for tokens in choices.values())
        assert "worker was lost 3 times" in str(error)
        assert launched.metric("stepwire_worker_losses_total") == 3
        # The control plane names it, by the id that the gateway and the client have for it.
        log = launched.read()
        [named] = re.findall(r"request ended with an error.* client_request_id=(\S+)", log)
        assert re.search(rf"\[gateway.access\].* request_id={named} ", log)


# SIGTERM ends every server that these tests start.
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_it_drains_and_leaves_nothing(
    bare_model: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPWIRE_SIM_STEP_MS", "40")
    with Launched(bare_model, *SIMULATED) as launched:
        children = launched.children()
        assert len(children) == 3
        sockets = Path(
            next(part for part in launched.child("gpu_worker").cmdline() if "unix:" in part).split("unix:")[1]
        ).parent
        assert sockets.exists()

        async def run() -> dict[int, list]:
            task = asyncio.create_task(stream(launched.base_url, "sim", [1, 2, 3], 80, seed=1))
            while not launched.metric("stepwire_generation_tokens_total"):
                await asyncio.sleep(0.05)
            launched.process.send_signal(number)
            return await task

        assert len(asyncio.run(run())[0]) == 80, "what runs may finish"
        wait_until(lambda: launched.process.poll() is not None, what="the end")
        assert launched.process.returncode == 0, launched.read()
        assert not [child for child in children if child.is_running()]
        assert not sockets.exists()


def test_a_dead_control_plane_and_a_dead_gateway_are_started_again(lasting: Launched) -> None:
    for module in ("control_plane", "gateway"):
        lasting.child(module).kill()
        deadline = time.monotonic() + LIMIT_S
        while True:
            try:
                assert len(asyncio.run(stream(lasting.base_url, "sim", [1, 2], 5, seed=0))[0]) == 5
                break
            except openai.APIError:
                assert time.monotonic() < deadline, lasting.read()
                time.sleep(0.1)


def test_a_second_stack_on_the_ports_of_the_first_is_refused(lasting: Launched, bare_model: Path) -> None:
    ports = [f"--port={lasting.port}", f"--grpc-port={lasting.grpc_port}", f"--metrics-port={lasting.metrics_port}"]
    run = run_serve(str(bare_model), *SIMULATED, *ports)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert f"port {lasting.port}" in run.stderr and "--port" in run.stderr
    assert "ready after" not in run.stdout


def run_serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gateway.cli", "serve", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_port_in_use_is_one_clear_line(bare_model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for flag in ("--port", "--grpc-port", "--metrics-port"):
            others = {name: str(free_port()) for name in ("--port", "--grpc-port", "--metrics-port")} | {
                flag: str(port)
            }
            run = run_serve(str(bare_model), *SIMULATED, *(f"{name}={value}" for name, value in others.items()))
            assert run.returncode == 1
            assert "Traceback" not in run.stderr
            line = next(line for line in run.stderr.splitlines() if str(port) in line)
            assert flag in line


def test_a_wrong_flag_is_one_line_that_suggests_the_right_one(bare_model: Path) -> None:
    run = run_serve(str(bare_model), "--max-modle-len=5")
    assert run.returncode == 2
    assert len(run.stderr.splitlines()) == 1 and "--max-model-len" in run.stderr


# What is said of other sources: tests/unit/gpu_worker/prepare.
@pytest.mark.parametrize("source", ["/nowhere/model", pytest.param("pypi:no-such-package-xyz", marks=pytest.mark.slow)])
def test_a_model_that_is_not_there(source: str) -> None:
    # The usual ports may be somebody's.
    ports = [f"{name}={free_port()}" for name in ("--port", "--grpc-port", "--metrics-port")]
    run = run_serve(source, *ports)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr and source.removeprefix("pypi:") in run.stderr


def test_no_orphan_outlives_a_killed_launcher(lasting: Launched) -> None:
    children = lasting.children()
    assert len(children) == 3
    lasting.process.kill()
    wait_until(
        lambda: not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE],
        what="the children's end",
    )
