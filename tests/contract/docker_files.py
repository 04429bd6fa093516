"""Reads the Dockerfiles and docker/compose.yaml for the tests beside this file: no Docker engine needed."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import shutil
import tomllib
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
PROFILES = ("cpu", "gpu", "gpu-tp2", "gpu-dp2", "simulated")

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


# ---- compose.yaml ----

_VARIABLE = re.compile(r"\$\{(\w+):-((?:[^${}]|\$\{[^{}]*\})*)\}")


def interpolate(text: str, values: dict[str, str]) -> str:
    """Fill in `${NAME:-default}`; a default may hold variables."""
    return _VARIABLE.sub(lambda match: values.get(match[1]) or interpolate(match[2], values), text)


@cache
def _compose_file() -> Any:
    """As it stands; `compose` makes another one of it."""
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())


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

    loaded: dict[str, Any] = fill(_compose_file())
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
    """The long-running services of ours, by their package; of several workers, the first."""
    found = {}
    for service in services(profile, **values).values():
        key = built_image(service)
        if key is not None and IMAGES[key] in SETTINGS:
            assert IMAGES[key] not in found or IMAGES[key] == "gpu_worker", "two services of one kind in a profile"
            found.setdefault(IMAGES[key], service)
    assert found.keys() == SETTINGS.keys()
    return found


def worker_services(profile: str, **values: str) -> list[dict[str, Any]]:
    """One a group, in the order of the file."""
    keyed = ((built_image(service), service) for service in services(profile, **values).values())
    return [service for key, service in keyed if key is not None and IMAGES[key] == "gpu_worker"]


def names_on_network(service: dict[str, Any], network: str) -> set[str]:
    networks: dict[str, Any] = service["networks"]
    return set((networks[network] or {})["aliases"])
