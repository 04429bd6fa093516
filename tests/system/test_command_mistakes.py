"""What goes wrong with the commands: one line that says what to do, and an exit code that a script can read."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gateway.cli import main
from tests.system.conftest import Stack, free_port, wait_until
from tests.system.test_commands import environment, run

LONG = ("--max-tokens", "4000")


@pytest.mark.parametrize(
    ("arguments", "needle"),
    [
        (("models", "--urll", "x"), "--url"),
        (("complete", "hi", "--max-tokens", "-4"), "--max-tokens"),
        (("complete", "hi", "--temperature", "warm"), "--temperature"),
        (("run-batch", "in.jsonl"), "target"),
        (("doctor", "--port", "99999"), "--port"),
        (("chat", "one", "two"), "two"),
        (("chta",), "did you mean chat?"),
    ],
)
def test_what_was_typed_wrong(
    arguments: tuple[str, ...],
    needle: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["stepwire", *arguments])
    assert main() == 2
    told = capsys.readouterr()
    assert not told.out and len(told.err.splitlines()) == 1 and needle in told.err


def test_no_server_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}\n')
    url = f"http://127.0.0.1:{free_port()}"
    for arguments in (["chat", "hi"], ["complete", "hi"], ["models"], ["run-batch", str(source), str(target)]):
        monkeypatch.setattr(sys, "argv", ["stepwire", *arguments, "--url", url])
        assert main() == 1
        told = capsys.readouterr()
        assert not told.out and len(told.err.splitlines()) == 1, told.err
        assert url in told.err and "stepwire serve" in told.err
    assert not target.exists()
    bench = run("bench", "random", "--rest", url)
    assert bench.returncode == 1 and len(bench.stderr.splitlines()) == 1 and url in bench.stderr


def test_nothing_was_said(stack: Stack) -> None:
    for word in ("chat", "complete"):
        silent = run(word, "--url", stack.url)
        assert silent.returncode == 1 and "standard input" in silent.stderr
    asked = run("chat", "--url", stack.url, "--max-tokens", "2", text="One line\nand another\n")
    assert asked.returncode == 0 and asked.stdout.strip()


def test_results_never_go_over_their_requests(stack: Stack, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}\n')
    before = source.read_text()
    refused = run("run-batch", str(source), str(tmp_path / "." / "in.jsonl"), "--url", stack.url)
    assert refused.returncode == 1 and "another" in refused.stderr and source.read_text() == before


def start(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "gateway.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )


@pytest.mark.parametrize("word", ["chat", "complete"])
def test_ctrl_c_in_the_middle_of_an_answer(stack: Stack, word: str) -> None:
    process = start(word, "hi", "--url", stack.url, *LONG)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert b"Traceback" not in said
    # A chat keeps what it has heard, and ends well.
    assert process.returncode == (0 if word == "chat" else 130)
    stack.wait_idle(30)


def test_a_reader_that_has_enough(stack: Stack) -> None:
    process = start("complete", "hi", "--url", stack.url, *LONG)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 1
    stack.wait_idle(30)


def test_a_batch_that_is_stopped_goes_on(stack: Stack, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"prompt": "x", "max_tokens": 4}
    requests = [
        {"custom_id": f"r{number}", "method": "POST", "url": "/v1/completions", "body": body} for number in range(4)
    ]
    requests += [{**requests[0], "custom_id": "long", "body": {**body, "max_tokens": 4000, "ignore_eos": True}}]
    source.write_text("\n".join(map(json.dumps, requests)))
    process = start("run-batch", str(source), str(target), "--url", stack.url, "--concurrency", "1")
    wait_until(lambda: target.exists() and target.read_bytes().count(b"\n") == 4, 60)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and b"goes on from there" in said and b"Traceback" not in said
    stack.wait_idle(30)
    requests[-1]["body"] = body
    source.write_text("\n".join(map(json.dumps, requests)))
    done = run("run-batch", str(source), str(target), "--url", stack.url, "--json")
    assert json.loads(done.stdout) == {"total": 5, "completed": 1, "failed": 0, "skipped": 4}


def test_ctrl_c_in_a_conversation_stops_the_answer_alone(stack: Stack, tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway.cli", "chat", "--url", stack.url, *LONG],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=environment(HOME=str(tmp_path), TERM="dumb"),
        start_new_session=True,
    )
    os.close(follower)
    seen = b""

    def wait_for(text: bytes, count: int = 1) -> None:
        nonlocal seen
        deadline = time.monotonic() + 60
        while seen.count(text) < count:
            assert time.monotonic() < deadline, seen
            if select.select([leader], [], [], 0.2)[0]:
                seen += os.read(leader, 65536)

    wait_for(b"> ")
    os.write(leader, b"Hello\n")
    wait_until(lambda: stack.control_plane_metric("stepwire_requests_running") == 1, 60)
    process.send_signal(signal.SIGINT)
    wait_for(b"(stopped)")
    stack.wait_idle(30)
    os.write(leader, b"/nonsense\n")
    wait_for(b"/undo", 2)
    # A wrong turn is told of, and the conversation goes on.
    os.write(leader, b"/undo\n/system " + b"x" * 3000 + b"\n")
    os.write(leader, b"/quit\n")
    assert process.wait(60) == 0
    os.close(leader)
