"""The `stepwire` command: `serve` runs the whole stack on this machine, some words start one process each, the others
ask a running server."""

from __future__ import annotations

import difflib
import importlib.util
import os
import sys

import stepwire

# Word -> module whose __main__ takes the rest of the command line. Only `serve` runs here.
_PROCESSES = {
    "gateway": ("gateway", "the REST gateway alone"),
    "control-plane": ("control_plane", "the control plane alone"),
    "worker": ("gpu_worker", "one worker alone"),
    "replay": ("gpu_worker.replay", "run recorded steps (--record FILE) through a worker again; compare, or profile"),
    "prepare": ("gpu_worker.prepare", "turn a model source into what the services read"),
    "bench": ("load_tests.bench", "send a standard workload to a server and print what came of it"),
}
# Typer's: they are imported when one of them is asked for, for their --help too.
_COMMANDS = {
    "chat": "talk with a running server's model",
    "complete": "have it continue a text",
    "models": "list what it serves",
    "run-batch": "run a file of requests: stepwire run-batch in.jsonl out.jsonl",
    "doctor": "say what is installed, what this machine has, and what would go wrong",
}


def main() -> int:
    word, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if word == "serve":
        from gateway.launcher import serve

        return serve(arguments)
    if word in _PROCESSES:
        module, _ = _PROCESSES[word]
        package = module.partition(".")[0]
        if importlib.util.find_spec(package) is None:
            print(
                f"stepwire {word}: {package} is not installed here; it comes with a clone, not with a wheel",
                file=sys.stderr,
            )
            return 1
        os.execv(sys.executable, [sys.executable, "-m", module, *arguments])
    if word in _COMMANDS:
        from gateway.commands.app import run

        return run([word, *arguments])
    if word in ("--version", "-V", "version"):
        print(f"stepwire {stepwire.__version__}")
        return 0
    if word in ("--help", "-h", "help"):
        print(_usage())
        return 0
    near = difflib.get_close_matches(word, ["serve", *_PROCESSES, *_COMMANDS], n=1)
    meant = f": did you mean {near[0]}?" if near else ""
    print(f"stepwire: there is no command {word!r}{meant} (stepwire --help lists them)", file=sys.stderr)
    return 2


def _usage() -> str:
    lines = ["usage: stepwire COMMAND [flags]        (COMMAND --help explains every flag)", ""]
    lines.append("  serve MODEL     gateway, control plane and worker on this machine, ready to answer OpenAI clients")
    lines += [f"  {word:<15} {text}" for word, (_, text) in _PROCESSES.items()]
    lines += [f"  {word:<15} {text}" for word, text in _COMMANDS.items()]
    lines.append("  version         print the version")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
