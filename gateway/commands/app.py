"""The commands that ask a running server, or look at this machine."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from gateway.commands.chat import Conversation, complete
from gateway.commands.doctor import examine
from gateway.commands.run_batch import BatchCounts, BatchRun, finished_ids, read_batch_file
from gateway.commands.server_client import DEFAULT_URL, CommandError, ServerClient, base_url

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

Url = Annotated[str, typer.Option(envvar="STEPWIRE_URL", help="where the server is")]
ApiKey = Annotated[str | None, typer.Option(envvar="STEPWIRE_API_KEY", show_envvar=True, help="key that it needs")]
Model = Annotated[str | None, typer.Option(help="one of its models; default: the first")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="most tokens of an answer")]
Temperature = Annotated[float | None, typer.Option(min=0, max=2, help="0 is greedy; default: the model's own")]
TopP = Annotated[float | None, typer.Option(min=0, max=1, help="default: the model's own")]
Seed = Annotated[int | None, typer.Option(help="the same seed gives the same text")]
AsJson = Annotated[bool, typer.Option("--json", help="for scripts: JSON on standard output")]


# Of wrong flags, of which Typer shows a box of several lines.
_UsageError = typer.BadParameter.__mro__[1]
INTERRUPTED = 130


def run(arguments: list[str]) -> int:
    """The exit code of `stepwire ARGUMENTS`."""
    word = f"stepwire {arguments[0]}"
    try:
        return int(app(args=arguments, prog_name="stepwire", standalone_mode=False) or 0)
    except CommandError as error:
        print(f"{word}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Whoever read has enough; at the end Python would flush into the pipe once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as error:
        if not isinstance(error, _UsageError):
            raise
        message = " ".join(error.format_message().rstrip(".").split())  # type: ignore[attr-defined]
        print(f"{word}: {message} ({word} --help explains every flag)", file=sys.stderr)
        return 2


def _parameters(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _print_json(value: Any) -> None:
    print(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())


@app.command("chat")
def chat_command(
    message: Annotated[
        str | None, typer.Argument(help="one message: answer it and end; default: a conversation")
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    model: Model = None,
    system: Annotated[str | None, typer.Option(help="system message")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    history: Annotated[bool, typer.Option(help="keep the lines that were typed for the next time")] = True,
    as_json: AsJson = False,
) -> None:
    """Talk with the model; answers come as they are generated, and the conversation is remembered."""
    client = ServerClient(url, api_key)
    parameters = _parameters(
        model=model, max_completion_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    console = Console(quiet=as_json)
    talk = Conversation(client, parameters, console, system)
    if message is None and not sys.stdin.isatty():
        message = sys.stdin.read().strip()
        if not message:
            raise CommandError("standard input is empty: write a message there, or give it as an argument")
    if message is None:
        if as_json:
            raise CommandError("--json needs a message: as an argument or on standard input")
        client.models()  # say now if nobody is there
        talk.interact(Path.home() / ".local/state/stepwire/chat_history" if history else None)
        return
    talk.say(message)
    if as_json:
        _print_json({"messages": talk.messages})


@app.command("complete")
def complete_command(
    prompt: Annotated[str | None, typer.Argument(help="text to continue; default: standard input")] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    model: Model = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    as_json: AsJson = False,
) -> None:
    """Continue a text."""
    text = sys.stdin.read() if prompt is None else prompt
    if not text:
        raise CommandError("there is no text to continue: give it as an argument, or on standard input")
    client = ServerClient(url, api_key)
    body = _parameters(model=model, prompt=text, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    if not as_json:
        complete(client, body, Console())
        return
    chunks = list(client.stream("/v1/completions", body))
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    finish_reason = next((choice["finish_reason"] for choice in choices if choice["finish_reason"]), None)
    _print_json({"text": "".join(choice["text"] for choice in choices), "finish_reason": finish_reason})


@app.command("models")
def models_command(url: Url = DEFAULT_URL, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """List what the server serves."""
    models = ServerClient(url, api_key).models()
    if as_json:
        _print_json(models)
        return
    table = Table("model", "context, tokens", box=None)
    for model in models:
        table.add_row(model["id"], str(model.get("max_model_len", "")))
    Console().print(table)


@app.command("run-batch")
def run_batch_command(
    source: Annotated[Path, typer.Argument(help="requests in OpenAI's batch format, one a line")],
    target: Annotated[Path, typer.Argument(help="results, one a line; an earlier run's are kept and not asked again")],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    concurrency: Annotated[int, typer.Option(min=1, max=1024, help="requests sent at one time")] = 32,
    as_json: AsJson = False,
) -> None:
    """Run a file of requests and write a file of results. Exit code 1 if any failed."""
    lines = read_batch_file(source)
    if target.exists() and target.samefile(source):
        raise CommandError(f"{target} is the file of requests: name another one for the results")
    ServerClient(url, api_key).check_there()
    done = finished_ids(target)
    todo = [line for line in lines if line.custom_id not in done]
    counts = BatchCounts(total=len(lines), skipped=len(lines) - len(todo))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True, quiet=as_json)) as progress:
        bar = progress.add_task("requests", total=len(lines), completed=counts.skipped)
        batch = BatchRun(base_url(url), api_key, concurrency=concurrency, on_result=lambda _: progress.advance(bar))
        is_stopped = False
        try:
            with _open_for_append(target) as out:
                asyncio.run(batch.run(todo, out, counts))
        except* CommandError as group:
            raise group.exceptions[0] from None
        except* KeyboardInterrupt:
            is_stopped = True
    summary = {"total": counts.total, "completed": counts.completed, "failed": counts.failed, "skipped": counts.skipped}
    if as_json:
        _print_json(summary)
    else:
        Console(stderr=True).print(", ".join(f"{count} {name}" for name, count in summary.items()))
    if is_stopped:
        print(f"stopped: {target} keeps what was answered; the same command goes on from there", file=sys.stderr)
        raise typer.Exit(INTERRUPTED)
    if counts.failed:
        raise typer.Exit(1)


def _open_for_append(path: Path) -> Any:
    """Positioned after the last whole line: a line that a crash has cut off is written anew."""
    try:
        out = path.open("r+b" if path.exists() else "w+b")
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}") from error
    content = out.read()
    end = content.rfind(b"\n") + 1
    out.seek(end)
    out.truncate()
    return out


@app.command("doctor")
def doctor_command(
    host: Annotated[str, typer.Option(help="address that would be listened on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="of the REST API")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=1, max=65535, help="of the gRPC API")] = 50051,
    metrics_port: Annotated[int, typer.Option(min=1, max=65535, help="of the metrics page")] = 8001,
    cache_dir: Annotated[Path | None, typer.Option(help="where converted models are kept")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what is installed, what this machine has, and what would go wrong. Exit code 1 if something would."""
    ports = {"--port": port, "--grpc-port": grpc_port, "--metrics-port": metrics_port}
    findings = list(examine(host, ports, cache_dir or Path.home() / ".cache" / "stepwire"))
    if as_json:
        _print_json([finding.to_json() for finding in findings])
    else:
        console = Console()
        marks = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "problem": "[red]problem[/]"}
        table = Table(box=None, show_header=False)
        for finding in findings:
            table.add_row(marks[finding.level], finding.subject, finding.text)
        console.print(table)
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(1)
