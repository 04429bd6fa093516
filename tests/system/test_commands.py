"""The commands that ask a server, as processes of their own against the real stack."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.system.conftest import LIMIT_S, ROOT, STOP_LIMIT_S, Stack
from tests.system.ports import free_port


def environment(**extra: str) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("STEPWIRE_")}
    sources = os.pathsep.join(str(ROOT / source) for source in (".", "proto", "kernels"))
    return {**inherited, "PYTHONPATH": sources, "COLUMNS": "200", **extra}


def run(*arguments: str, text: str = "", **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gateway.cli", *arguments],
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(**extra),
    )


def test_models_chat_and_complete(stack: Stack) -> None:
    listed = run("models", "--url", stack.url, "--json")
    assert [model["id"] for model in json.loads(listed.stdout)] == ["tiny", "alias/tiny"]

    fixed = ("--seed", "7", "--max-tokens", "12")
    shown = run("complete", "The capital", *fixed, STEPWIRE_URL=f"{stack.url}/v1")
    as_json = json.loads(run("complete", *fixed, "--url", stack.url, "--json", text="The capital").stdout)
    assert shown.returncode == 0 and as_json["finish_reason"] == "length"
    # What would steer the terminal is shown as a mark.
    harmless = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", as_json["text"])
    assert shown.stdout.rstrip("\n").split() == harmless.rstrip("\n").split()

    said = run("chat", "Hello", *fixed, "--system", "Be brief", "--url", stack.url, "--json")
    asked, answered = json.loads(said.stdout)["messages"]
    assert asked == {"role": "user", "content": "Hello"} and answered["role"] == "assistant" and answered["content"]


def test_mistakes_end_with_one_line(stack: Stack) -> None:
    nobody = run("models", "--url", f"127.0.0.1:{free_port()}")
    assert nobody.returncode == 1 and "stepwire serve" in nobody.stderr and "Traceback" not in nobody.stderr
    unknown = run("chat", "Hello", "--model", "nobody", "--url", stack.url)
    assert unknown.returncode == 1 and "does not exist" in unknown.stderr
    assert run("chat", "--nonsense").returncode == 2


def test_a_conversation_on_a_terminal(stack: Stack, tmp_path: Path) -> None:
    """Typed into a real terminal: the second turn sends the first one too, and the lines are kept."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway.cli", "chat", "--url", stack.url, "--max-tokens", "4", "--seed", "1"],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=environment(HOME=str(tmp_path), TERM="dumb"),
        start_new_session=True,
    )
    os.close(follower)
    seen = b""

    def wait_for_prompts(count: int) -> None:
        nonlocal seen
        deadline = time.monotonic() + LIMIT_S
        while seen.count(b"> ") < count:
            assert time.monotonic() < deadline, seen
            if select.select([leader], [], [], 0.2)[0]:
                seen += os.read(leader, 4096)

    before = stack.control_plane_metric("stepwire_prompt_tokens_total")
    wait_for_prompts(1)
    os.write(leader, b"Hello there\n")
    wait_for_prompts(2)
    first = stack.control_plane_metric("stepwire_prompt_tokens_total") - before
    os.write(leader, b"Hello there\n")
    wait_for_prompts(3)
    second = stack.control_plane_metric("stepwire_prompt_tokens_total") - before - first
    os.write(leader, b"/quit\n")
    assert process.wait(STOP_LIMIT_S) == 0
    os.close(leader)
    assert second > first > 0
    assert "Hello there" in (tmp_path / ".local/state/stepwire/chat_history").read_text()


def test_run_batch_writes_every_result_and_goes_on_where_it_stopped(stack: Stack, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests = [
        {
            "custom_id": f"r{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"messages": [{"role": "user", "content": f"{number}"}], "max_tokens": 4, "seed": number},
        }
        for number in range(8)
    ]
    requests.append({**requests[0], "custom_id": "bad", "body": {"messages": []}})
    source.write_text("\n".join(map(json.dumps, requests)) + "\n")
    # An earlier run wrote two results and half a line.
    kept = json.dumps({"custom_id": "r0", "response": {"status_code": 200}}) + "\n"
    target.write_text(kept + json.dumps({"custom_id": "r1"}) + "\n" + '{"custom_id": "r2", "resp')

    done = run("run-batch", str(source), str(target), "--url", stack.url, "--json")
    assert json.loads(done.stdout) == {"total": 9, "completed": 6, "failed": 1, "skipped": 2}, done.stderr
    assert done.returncode == 1, "one request failed"
    results = {result["custom_id"]: result for result in map(json.loads, target.read_text().splitlines())}
    assert results.keys() == {request["custom_id"] for request in requests}
    assert target.read_text().startswith(kept)
    assert results["r2"]["response"]["body"]["choices"][0]["message"]["content"] is not None
    assert results["r2"]["error"] is None
    assert results["bad"]["response"]["status_code"] == 400

    source.write_text("not json\n")
    wrong = run("run-batch", str(source), str(target), "--url", stack.url)
    assert wrong.returncode == 1 and "line 1" in wrong.stderr


def test_doctor_names_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ports = ("--grpc-port", str(free_port()), "--metrics-port", str(free_port()))
        report = run("doctor", "--json", "--port", str(port), *ports)
    findings = {finding["subject"]: finding for finding in json.loads(report.stdout)}
    assert report.returncode == 1
    assert findings["--port"]["level"] == "problem" and str(port) in findings["--port"]["text"]
    assert findings["--grpc-port"]["level"] == "ok"
    assert findings["worker"]["level"] == "ok" and findings["memory"]["facts"]["total_gib"] > 0


WORDS = ("chat", "complete", "models", "run-batch", "doctor", "bench")


@pytest.mark.parametrize("word", WORDS)
def test_every_command_explains_itself(word: str) -> None:
    shown = run(word, "--help")
    assert shown.returncode == 0 and "--help" in shown.stdout
    assert f"stepwire {word}" in shown.stdout


def test_every_command_is_named() -> None:
    shown = run("--help").stdout
    assert all(word in shown for word in WORDS)
