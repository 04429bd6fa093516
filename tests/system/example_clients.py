"""The clients of examples/, built as their READMEs say, in a copy of their directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from google.rpc import error_details_pb2

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
BUILD_LIMIT_S = 300.0
CALL_LIMIT_S = 90.0
GO_PACKAGES = Path("/usr/share/gocode")
# Where the packages named in examples/go/README.md and examples/java/README.md put what the builds need.
GO_NEEDS = ["google.golang.org/grpc", "google.golang.org/protobuf", "google.golang.org/genproto"]
JAVA_NEEDS = ["grpc-netty", "proto-google-common-protos", "netty-codec-http2", "perfmark-api", "gson"]


@dataclass
class ExampleClient:
    """How a built client is started: its command, and what its environment has besides."""

    command: Sequence[str]
    directory: Path
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, *arguments: str, key: str | None = None) -> subprocess.Popen[str]:
        environment = {**os.environ, **self.environment}
        environment.pop("STEPWIRE_API_KEY", None)
        if key is not None:
            environment["STEPWIRE_API_KEY"] = key
        return subprocess.Popen(
            [*self.command, *arguments],
            cwd=self.directory,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def run(self, *arguments: str, key: str | None = None) -> subprocess.CompletedProcess[str]:
        with self.start(*arguments, key=key) as process:
            try:
                output, errors = process.communicate(timeout=CALL_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def _need(programs: Sequence[str], files: Sequence[Path], language: str) -> None:
    """Skip where something is missing, and say what."""
    missing = [program for program in programs if shutil.which(program) is None]
    missing += [str(file) for file in files if not file.exists()]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (Debian's packages: examples/{language}/README.md)")


def _build(command: Sequence[str], directory: Path, **environment: str) -> None:
    built = subprocess.run(
        command,
        cwd=directory,
        env={**os.environ, **contracts(), **environment},
        capture_output=True,
        text=True,
        timeout=BUILD_LIMIT_S,
    )
    assert built.returncode == 0, built.stdout + built.stderr


def contracts() -> dict[str, str]:
    """Variables that tell the examples where the .proto files are."""
    google = str(Path(error_details_pb2.__file__).parents[2])
    proto = str(ROOT / "proto")
    return {"PROTO": proto, "GOOGLEAPIS": google, "PROTO_PATHS": f"{proto}:{google}"}


def build_python(directory: Path) -> ExampleClient:
    return ExampleClient([sys.executable, "client.py"], EXAMPLES / "python", {"PYTHONPATH": str(ROOT / "proto")})


def build_go(directory: Path) -> ExampleClient:
    """Without modules, as the README says: nothing is fetched."""
    files = [GO_PACKAGES / "src" / name for name in GO_NEEDS]
    _need(["go", "protoc", "protoc-gen-go", "protoc-gen-go-grpc"], files, "go")
    source = directory / "src" / "stepwire.example" / "client"
    shutil.copytree(EXAMPLES / "go", source)
    _build(["./build.sh"], source, GO111MODULE="off", GOPATH=f"{directory}:{GO_PACKAGES}")
    unformatted = subprocess.run(["gofmt", "-l", "main.go"], cwd=source, capture_output=True, text=True, check=True)
    assert unformatted.stdout == ""
    return ExampleClient(["./client"], source)


def build_java(directory: Path) -> ExampleClient:
    files = [Path(f"/usr/share/java/{name}.jar") for name in JAVA_NEEDS]
    _need(["java", "javac", "protoc", "grpc_java_plugin"], [*files, Path("/usr/share/grpc-proto")], "java")
    source = directory / "client"
    shutil.copytree(EXAMPLES / "java", source)
    # They live for a second or two: less to start, and to compile while they run.
    options = {"JAVA_TOOL_OPTIONS": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"}
    _build(["./build.sh"], source, **options)
    return ExampleClient(["./client.sh"], source, options)


def build_node(directory: Path) -> ExampleClient:
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("no node and npm here (Debian: apt-get install nodejs npm)")
    source = directory / "client"
    shutil.copytree(EXAMPLES / "typescript", source)
    command = ["npm", "install", "--no-audit", "--no-fund", "--loglevel=error"]
    installed = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=BUILD_LIMIT_S)
    if installed.returncode != 0:
        pytest.skip(f"npm cannot install the example's packages: {installed.stderr[-300:]}")
    _build(["npm", "run", "build"], source)
    return ExampleClient(["node", "client.js"], source, contracts())


BUILDERS: dict[str, Callable[[Path], ExampleClient]] = {
    "python": build_python,
    "go": build_go,
    "java": build_java,
    "typescript": build_node,
}
