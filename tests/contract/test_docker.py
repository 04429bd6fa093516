"""What the images and docker/compose.yaml promise, held against the code: no Docker engine needed.

`docker compose config` itself runs where the compose plugin is installed. Everything else is checked on the files: an
image's files and packages are laid out as its Dockerfile says and imported from there, and every STEPWIRE_* variable
goes through the settings class of the process that gets it.
"""

from __future__ import annotations

import fnmatch
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from control_plane.config import ControlPlaneSettings
from gateway.config import GatewaySettings
from gpu_worker.config import WorkerSettings

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
PROFILES = ("cpu", "gpu", "simulated")
CHECK_HEALTH = DOCKER / "check_health.py"

SETTINGS = {"gateway": GatewaySettings, "control_plane": ControlPlaneSettings, "gpu_worker": WorkerSettings}
# What each image is for: Dockerfile and target -> the package that it starts.
IMAGES = {
    ("gateway", None): "gateway",
    ("control_plane", None): "control_plane",
    ("gpu_worker", None): "gpu_worker",
    ("gpu_worker", "simulated"): "gpu_worker",
    ("gpu_worker", "prepare"): "gpu_worker.prepare",
}


# ---- Dockerfiles ----


@dataclass
class Stage:
    name: str
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, keyword: str) -> list[str]:
        return [argument for name, argument in self.instructions if name == keyword]


@cache
def stages(dockerfile: str) -> list[Stage]:
    """The stages of docker/<dockerfile>.Dockerfile, with the default build arguments put in."""
    text = (DOCKER / f"{dockerfile}.Dockerfile").read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    arguments: dict[str, str] = {}
    found: list[Stage] = []
    for line in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        keyword, _, rest = line.strip().partition(" ")
        if keyword == "ARG" and not found:
            name, _, value = rest.partition("=")
            arguments[name] = value
        elif keyword == "FROM":
            for name, value in arguments.items():
                rest = rest.replace(f"${{{name}}}", value)
            base, _, name = rest.partition(" AS ")
            found.append(Stage(name or str(len(found)), base))
        elif keyword:
            found[-1].instructions.append((keyword, rest.strip()))
    return found


def image(dockerfile: str, target: str | None) -> list[Stage]:
    """The stages that an image is made of, its own first: the last stage, or the target, and what it is based on."""
    by_name = {stage.name: stage for stage in stages(dockerfile)}
    chain = [by_name[target] if target else stages(dockerfile)[-1]]
    while chain[-1].base in by_name:
        chain.append(by_name[chain[-1].base])
    return chain


def instruction(dockerfile: str, target: str | None, keyword: str) -> list[str]:
    """Every instruction of the kind that holds for the image, the ones that win first."""
    return [argument for stage in image(dockerfile, target) for argument in reversed(stage.all(keyword))]


def environment_of_image(dockerfile: str, target: str | None) -> dict[str, str]:
    values: dict[str, str] = {}
    for line in reversed(instruction(dockerfile, target, "ENV")):
        values |= dict(pair.split("=", 1) for pair in shlex.split(line))
    return values


def stages_copied_from(dockerfile: str, target: str | None) -> Iterator[Stage]:
    by_name = {stage.name: stage for stage in stages(dockerfile)}
    for copy in instruction(dockerfile, target, "COPY"):
        if match := re.match(r"--from=(\S+)", copy):
            yield by_name[match[1]]


def copied_files(dockerfile: str, target: str | None) -> dict[str, str]:
    """Path in the image -> path in the repository, of what is copied from the build context."""
    found = {}
    for stage in [*image(dockerfile, target), *stages_copied_from(dockerfile, target)]:
        for copy in stage.all("COPY"):
            *sources, goal = copy.split()
            if not goal.startswith("/app"):
                continue
            for source in sources:
                if not source.startswith(("--", "/")):
                    found[goal + Path(source).name if goal.endswith("/") else goal] = source
    return found


def requirements_of_image(dockerfile: str, target: str | None) -> set[str]:
    """Names of everything that is installed, direct or not, by what its build stage asks for."""
    stage = next(s for s in stages_copied_from(dockerfile, target) if any("uv pip install" in r for r in s.all("RUN")))
    wanted: list[Requirement] = []
    for line in stage.all("RUN"):
        for command in re.findall(r"uv pip install (.*?)(?:&&|$)", line):
            words = shlex.split(re.sub(r"\$\{\w+:\+\S+\}", "", command))
            if "--no-deps" in words:
                continue
            assert words[words.index("-c") + 1] == "constraints.txt", "versions are pinned"
            extras = [words[index + 1] for index, word in enumerate(words) if word == "--extra"]
            if "pyproject.toml" in words:
                wanted += project_requirements(*extras)
            options = {index + 1 for index, word in enumerate(words) if word in ("-c", "-r", "--extra")}
            wanted += [
                Requirement(word)
                for index, word in enumerate(words)
                if index not in options and not word.startswith("-") and "$" not in word
            ]
    return closure(wanted)


def project_requirements(*extras: str) -> list[Requirement]:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


def closure(wanted: list[Requirement]) -> set[str]:
    """The names of distributions that these requirements install, by the metadata of what is installed here."""
    found: set[str] = set()
    queue = [(requirement, "") for requirement in wanted]
    seen = set()
    while queue:
        requirement, extra = queue.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        found.add(name)
        for wanted_extra in ("", *requirement.extras):
            if (name, wanted_extra) in seen:
                continue
            seen.add((name, wanted_extra))
            try:
                lines = importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:
                continue  # of another platform; what is imported is checked below
            queue += [(Requirement(line), wanted_extra) for line in lines]
    return found


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


def lay_out(dockerfile: str, target: str | None, directory: Path) -> Path:
    """The image's /app in `directory`; sources are copied, so that nothing is found beside them."""
    app = directory / "app"
    for goal, source in copied_files(dockerfile, target).items():
        path = app / Path(goal).relative_to("/app")
        path.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, path, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, path)
    return app


def clean_environment(**values: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("STEPWIRE_")} | values


def test_the_default_model_is_that_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    package = re.search(r"^DEFAULT_MODEL_PACKAGE := (\S+)$", makefile, re.MULTILINE)
    model = re.search(r"^MODEL \?= (\S+)$", makefile, re.MULTILINE)
    assert package and model
    assert f"ARG MODEL_PACKAGE={package[1]}\n" in (DOCKER / "gpu_worker.Dockerfile").read_text()
    assert json.loads(instruction("gpu_worker", "prepare", "CMD")[0]) == [model[1]]
    assert compose({})["services"]["prepare"]["command"] == [model[1]]


# ---- compose.yaml ----

_VARIABLE = re.compile(r"\$\{(\w+):-((?:[^${}]|\$\{[^{}]*\})*)\}")


def interpolate(text: str, values: dict[str, str]) -> str:
    """Fill in `${NAME:-default}`; a default may hold variables."""
    return _VARIABLE.sub(lambda match: values.get(match[1]) or interpolate(match[2], values), text)


def compose(values: dict[str, str]) -> dict[str, Any]:
    """The file as compose reads it with these variables: YAML first, and then the strings in it are filled in."""

    def fill(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: fill(value) for key, value in node.items()}
        if isinstance(node, list):
            return [fill(value) for value in node]
        if isinstance(node, str):
            node = interpolate(node, values)
            assert "$" not in node, f"a variable without a default: {node}"
        return node

    loaded: dict[str, Any] = fill(yaml.safe_load((DOCKER / "compose.yaml").read_text()))
    return loaded


def services(profile: str, **values: str) -> dict[str, dict[str, Any]]:
    return {name: service for name, service in compose(values)["services"].items() if profile in service["profiles"]}


def built_image(service: dict[str, Any]) -> tuple[str, str | None] | None:
    """The key in IMAGES of what a service runs; None for an image of others."""
    if "build" not in service:
        return None
    build = service["build"]
    assert (DOCKER / build["context"]).resolve() == ROOT
    dockerfile = Path(build["dockerfile"])
    assert (ROOT / dockerfile).is_file()
    target = build.get("target")
    return dockerfile.stem, None if target == stages(dockerfile.stem)[-1].name else target


def settings_of(service: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The settings that the container's process would have: by the image's variables and the service's."""
    key = built_image(service)
    assert key is not None
    for name in [name for name in os.environ if name.startswith("STEPWIRE_")]:
        monkeypatch.delenv(name)
    settings_class = SETTINGS[IMAGES[key]]
    variables = environment_of_image(*key) | service["environment"]
    for name, value in variables.items():
        if name.startswith("STEPWIRE_"):
            assert name.removeprefix("STEPWIRE_").lower() in settings_class.model_fields, f"{name} is no setting"
            monkeypatch.setenv(name, value)
    return settings_class()


def process_services(profile: str, **values: str) -> dict[str, dict[str, Any]]:
    """The long-running services of ours, by their package."""
    found = {}
    for service in services(profile, **values).values():
        key = built_image(service)
        if key is not None and IMAGES[key] in SETTINGS:
            assert IMAGES[key] not in found, "two services of one kind in a profile"
            found[IMAGES[key]] = service
    assert found.keys() == SETTINGS.keys()
    return found


each_profile = pytest.mark.parametrize("profile", PROFILES)


def has_compose_plugin() -> bool:
    docker = shutil.which("docker")
    return docker is not None and subprocess.run([docker, "compose", "version"], capture_output=True).returncode == 0


@each_profile
@pytest.mark.skipif(not has_compose_plugin(), reason="docker's compose plugin is not installed: the files are checked")
def test_docker_compose_accepts_the_file(profile: str) -> None:
    run = subprocess.run(
        ["docker", "compose", "-f", "docker/compose.yaml", "--profile", profile, "config", "--format", "json"],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["services"].keys() == services(profile).keys()


@each_profile
def test_a_profile_is_the_whole_stack(profile: str) -> None:
    running = services(profile)
    assert {"gateway", "prometheus", "grafana"} < running.keys()
    assert ("prepare" in running) == (profile != "simulated")
    process_services(profile)


@each_profile
def test_dependencies_exist_or_may_be_missing(profile: str) -> None:
    whole, running = compose({})["services"], services(profile)
    for name, service in running.items():
        for dependency, how in service.get("depends_on", {}).items():
            assert dependency in whole, f"{name} depends on {dependency}, which is no service"
            assert dependency in running or how.get("required") is False, f"{name}: {dependency} is not in {profile}"
            if how["condition"] == "service_healthy":
                assert "healthcheck" in whole[dependency]
            else:
                assert how["condition"] == "service_completed_successfully" and whole[dependency]["restart"] == "no"


@each_profile
def test_processes_end_in_the_order_in_which_requests_flow(profile: str) -> None:
    """compose stops whoever depends on a service before the service."""
    running = services(profile)
    names = {key: next(name for name in running if running[name] is service) for key, service in process_of(running)}
    assert names["control_plane"] in running["gateway"]["depends_on"]
    assert names["gpu_worker"] in running[names["control_plane"]]["depends_on"]


def process_of(running: dict[str, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for service in running.values():
        key = built_image(service)
        if key is not None and IMAGES[key] in SETTINGS:
            yield IMAGES[key], service


@each_profile
def test_every_variable_is_a_setting_and_addresses_meet(profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    running = process_services(profile)
    gateway = settings_of(running["gateway"], monkeypatch)
    control_plane = settings_of(running["control_plane"], monkeypatch)
    worker = settings_of(running["gpu_worker"], monkeypatch)

    assert gateway.host == control_plane.grpc_host == control_plane.metrics_host == "0.0.0.0"
    host, _, port = gateway.control_plane.rpartition(":")
    assert int(port) == control_plane.grpc_port
    assert host in names_on_network(running["control_plane"], "default")
    host, _, port = control_plane.workers[0].rpartition(":")
    assert worker.listen == f"0.0.0.0:{port}"
    assert host in names_on_network(running["gpu_worker"], "steps")
    assert worker.model == control_plane.model or profile == "simulated"
    assert worker.runner == ("simulated" if profile == "simulated" else "torch")
    assert worker.device == {"cpu": "cpu", "gpu": "cuda", "simulated": "auto"}[profile]


def names_on_network(service: dict[str, Any], network: str) -> set[str]:
    networks: dict[str, Any] = service["networks"]
    return set((networks[network] or {})["aliases"])


def test_choices_reach_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "MODEL": "some/model",
        "STEPWIRE_API_KEY": "one,two",
        "STEPWIRE_MAX_MODEL_LEN": "512",
        "STEPWIRE_ENABLE_PREFIX_CACHING": "false",
        "STEPWIRE_LOG_FORMAT": "json",
    }
    running = process_services("cpu", **values)
    gateway = settings_of(running["gateway"], monkeypatch)
    assert gateway.api_keys == ("one", "two")
    assert gateway.log_format == "json"
    control_plane = settings_of(running["control_plane"], monkeypatch)
    assert control_plane.served_model_name == ("some/model",)
    assert control_plane.enable_prefix_caching is False
    assert [key.get_secret_value() for key in control_plane.api_key] == ["one", "two"]
    assert settings_of(running["gpu_worker"], monkeypatch).max_model_len == 512
    assert compose(values)["services"]["prepare"]["command"] == ["some/model"]
    assert compose(values)["configs"]["scrape-key"]["content"] == "one,two"
    assert compose(values | {"STEPWIRE_SCRAPE_KEY": "two"})["configs"]["scrape-key"]["content"] == "two"


def test_the_example_lists_every_choice() -> None:
    used = set(re.findall(r"\$\{(\w+)", (DOCKER / "compose.yaml").read_text()))
    listed = set(re.findall(r"^#([A-Z_]+)=", (DOCKER / "example.env").read_text(), re.MULTILINE))
    assert listed == used


@each_profile
def test_nothing_is_killed_while_it_drains(profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    running = process_services(profile)
    margin_s = 5
    for name in ("gateway", "control_plane"):
        drain_s = settings_of(running[name], monkeypatch).drain_timeout_s
        assert seconds(running[name]["stop_grace_period"]) >= drain_s + margin_s
    grace_s = settings_of(running["gpu_worker"], monkeypatch).shutdown_grace_s
    assert seconds(running["gpu_worker"]["stop_grace_period"]) >= grace_s + margin_s


def seconds(duration: str) -> float:
    match = re.fullmatch(r"(\d+)(s|m)", duration)
    assert match, duration
    return int(match[1]) * {"s": 1, "m": 60}[match[2]]


@each_profile
def test_the_worker_is_reached_by_the_control_plane_alone(profile: str) -> None:
    running = process_services(profile)
    assert "ports" not in running["gpu_worker"]
    assert running["gpu_worker"]["networks"].keys() == {"steps"}
    assert compose({})["networks"]["steps"] == {"internal": True}
    on_steps = [name for name, service in services(profile).items() if "steps" in service.get("networks", {})]
    assert len(on_steps) == 2


@each_profile
def test_published_ports_are_the_processes_and_local_by_default(profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    running = process_services(profile)
    inside = {
        "gateway": settings_of(running["gateway"], monkeypatch).port,
        "control_plane": settings_of(running["control_plane"], monkeypatch).grpc_port,
    }
    for name, port in inside.items():
        assert running[name]["ports"] == [f"127.0.0.1:{port}:{port}"]
    for service in services(profile).values():
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", []))


@each_profile
def test_services_are_hardened_and_come_back(profile: str) -> None:
    for name, service in services(profile).items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["restart"] == ("no" if name == "prepare" else "unless-stopped")
        if "build" in service:
            assert service["read_only"] is True, name
        else:
            assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", service["image"]), f"{name}: pin the version"


def test_volumes_are_declared_and_all_used() -> None:
    whole = compose({})
    used = set()
    for service in whole["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DOCKER / source).is_dir(), f"docker would create {source} as root"
            else:
                used.add(source)
    assert used == whole["volumes"].keys()


def test_the_gpu_profile_reserves_a_gpu_and_installs_cuda() -> None:
    worker = process_services("gpu")["gpu_worker"]
    device = worker["deploy"]["resources"]["reservations"]["devices"][0]
    assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]
    assert (
        worker["build"]["args"]["TORCH_BACKEND"]
        != process_services("cpu")["gpu_worker"]["build"]["args"]["TORCH_BACKEND"]
    )
    triton_cache = environment_of_image("gpu_worker", None)["TRITON_CACHE_DIR"]
    assert f"triton-cache:{triton_cache}" in worker["volumes"]


# ---- health ----


@each_profile
def test_health_checks_ask_where_the_process_listens(profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    running = process_services(profile)
    settings = {name: settings_of(service, monkeypatch) for name, service in running.items()}
    targets = {
        "gateway": f"http://127.0.0.1:{settings['gateway'].port}/ready",
        "control_plane": f"grpc://127.0.0.1:{settings['control_plane'].grpc_port}",
        "gpu_worker": f"grpc://127.0.0.1:{settings['gpu_worker'].listen.rpartition(':')[2]}",
    }
    for name, target in targets.items():
        key = built_image(running[name])
        assert key is not None
        command = ["python", "/app/check_health.py", target]
        assert running[name]["healthcheck"]["test"] == ["CMD", *command]
        of_image = instruction(*key, "HEALTHCHECK")[0]
        assert json.loads(of_image.partition("CMD ")[2]) == command
        assert copied_files(*key)["/app/check_health.py"] == "docker/check_health.py"


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
    return subprocess.run([sys.executable, CHECK_HEALTH, target], capture_output=True, text=True, timeout=30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
        codes = [process.wait(20) for process in processes]
    assert codes == [0, 0]


def answer_of(target: str) -> str:
    """What the health check says once somebody listens there."""
    deadline = time.monotonic() + 30
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


# ---- monitoring ----


def test_prometheus_scrapes_where_metrics_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    config = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    for profile in PROFILES:
        running = process_services(profile)
        control_plane = settings_of(running["control_plane"], monkeypatch)
        assert targets_of(jobs["control-plane"]) == [f"control-plane:{control_plane.metrics_port}"]
        assert "control-plane" in names_on_network(running["control_plane"], "default")
        assert targets_of(jobs["gateway"]) == [f"gateway:{settings_of(running['gateway'], monkeypatch).port}"]
    assert all(job.get("metrics_path", "/metrics") == "/metrics" for job in jobs.values())
    key_file = jobs["gateway"]["authorization"]["credentials_file"]
    whole = compose({})
    assert whole["services"]["prometheus"]["configs"] == [{"source": "scrape-key", "target": key_file}]
    assert whole["configs"]["scrape-key"]["content"], "a config without content cannot be mounted"


def targets_of(job: dict[str, Any]) -> list[str]:
    return [target for entry in job["static_configs"] for target in entry["targets"]]


def test_prometheus_and_grafana_find_their_files() -> None:
    whole = compose({})["services"]
    mounts = {
        goal: DOCKER / source
        for service in ("prometheus", "grafana")
        for source, goal, *_ in (volume.split(":") for volume in whole[service]["volumes"])
        if source.startswith(".")
    }
    config = next(word for word in whole["prometheus"]["command"] if word.startswith("--config.file="))
    assert locate(mounts, config.partition("=")[2]).is_file()
    rule_files = yaml.safe_load(locate(mounts, config.partition("=")[2]).read_text())["rule_files"]
    assert all((DOCKER / "prometheus" / name).is_file() for name in rule_files)

    provisioning = locate(mounts, "/etc/grafana/provisioning")
    [provider] = yaml.safe_load((provisioning / "dashboards" / "stepwire.yaml").read_text())["providers"]
    home = whole["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert locate(mounts, home).is_relative_to(locate(mounts, provider["options"]["path"]))
    assert locate(mounts, home).is_file()
    [source] = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    scrape_interval = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())["global"][
        "scrape_interval"
    ]
    assert source["jsonData"]["timeInterval"] == scrape_interval, "else $__rate_interval is too short for a rate"


def locate(mounts: dict[str, Path], path: str) -> Path:
    """A path in a container as a path in the repository."""
    goal = max((goal for goal in mounts if path.startswith(goal)), key=len)
    return mounts[goal] / Path(path).relative_to(goal)


def test_dashboard_has_the_promised_rows_and_fits_together() -> None:
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "stepwire.json").read_text())
    panels = dashboard["panels"]
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert rows == ["Traffic", "Latency", "Queue and admission", "KV cache", "Steps", "Workers", "Gateway"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24, f"{panel['title']} lies on another panel"
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["description"] and panel["targets"], panel["title"]
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}


def test_the_documentation_lists_every_alert_and_image() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    groups = yaml.safe_load((DOCKER / "prometheus" / "alerts.yml").read_text())["groups"]
    alerts = {rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule}
    assert set(re.findall(r"^\| `(Stepwire\w+)`", page, re.MULTILINE)) == alerts
    images = {service["image"] for service in compose({})["services"].values() if "build" in service}
    assert set(re.findall(r"^\| `(stepwire-[\w:-]+)`", page, re.MULTILINE)) == images
