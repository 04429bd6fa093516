"""docker/kubernetes: valid by Kubernetes' own schemas, and true of the processes that it starts."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from stepwire.v1 import inference_pb2

from tests.contract.docker_files import DOCKER, SETTINGS, built_image, compose, environment_of_image
from tests.contract.leader_worker_set import SCHEMA as LEADER_WORKER_SET

DIRECTORY = DOCKER / "kubernetes"
# The oldest that has everything used here, and the newest that the schemas know.
VERSIONS = ("1.31", "1.37")
PACKAGES = {"stepwire-gateway": "gateway", "stepwire-control-plane": "control_plane", "stepwire-worker": "gpu_worker"}
DOCKERFILES = {package: (package, None) for package in SETTINGS}
MARGIN_S = 10.0


def documents() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(DIRECTORY.glob("*.yaml")):
        if path.name != "kustomization.yaml":
            for document in yaml.safe_load_all(path.read_text()):
                yield path.name, document


DOCUMENTS = list(documents())


def found(kind: str, name: str) -> dict[str, Any]:
    [document] = [d for _, d in DOCUMENTS if d["kind"] == kind and d["metadata"]["name"] == name]
    return document


def pod_templates() -> dict[str, dict[str, Any]]:
    """By what they are for: every pod that the manifests make."""
    templates = {}
    for _, document in DOCUMENTS:
        name = document["metadata"]["name"]
        if document["kind"] in ("Deployment", "Job"):
            templates[name] = document["spec"]["template"]
        elif document["kind"] == "LeaderWorkerSet":
            group = document["spec"]["leaderWorkerTemplate"]
            templates[f"{name} leader"], templates[f"{name} member"] = group["leaderTemplate"], group["workerTemplate"]
    return templates


def container(template: str) -> dict[str, Any]:
    [only] = pod_templates()[template]["spec"]["containers"]
    return dict(only)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "document", [pytest.param(d, id=f"{name}-{d['kind']}-{d['metadata']['name']}") for name, d in DOCUMENTS]
)
def test_manifests_are_valid(document: dict[str, Any], version: str) -> None:
    if document["kind"] != "LeaderWorkerSet":
        kubernetes_validate.validate(document, version, strict=True)
        return
    jsonschema.validate(document, LEADER_WORKER_SET)
    group = document["spec"]["leaderWorkerTemplate"]
    for template in (group["leaderTemplate"], group["workerTemplate"]):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
        kubernetes_validate.validate(pod, version, strict=True)


def test_the_schemas_refuse_what_is_wrong() -> None:
    wrong = deepcopy(found("Deployment", "stepwire-gateway"))
    wrong["spec"]["template"]["spec"]["containers"][0]["readinessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readinessProb"):
        kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)
    wrong = deepcopy(found("LeaderWorkerSet", "stepwire-worker"))
    wrong["spec"]["leaderWorkerTemplate"]["restartPolicy"] = "Always"
    with pytest.raises(jsonschema.ValidationError, match="Always"):
        jsonschema.validate(wrong, LEADER_WORKER_SET)


def test_kustomize_lists_every_file_and_image() -> None:
    kustomization = yaml.safe_load((DIRECTORY / "kustomization.yaml").read_text())
    files = {path.name for path in DIRECTORY.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(kustomization["resources"]) == files - {"autoscaling.yaml"}
    used = {c["image"] for template in pod_templates().values() for c in template["spec"]["containers"]}
    assert {image["name"] for image in kustomization["images"]} == used
    built = {s["image"].partition(":")[0] for s in compose({})["services"].values() if built_image(s) is not None}
    assert used <= built, "the images that compose builds"


def settings_of_pod(template: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the process in the pod would make of its variables; keys that come from a Secret are made up."""
    only = container(template)
    package = PACKAGES[only["image"]]
    for name in [name for name in os.environ if name.startswith("STEPWIRE_")]:
        monkeypatch.delenv(name)
    variables = environment_of_image(*DOCKERFILES[package])
    for source in only["envFrom"]:
        variables |= found("ConfigMap", source["configMapRef"]["name"])["data"]
    for variable in only.get("env", []):
        assert variable["valueFrom"]["secretKeyRef"]["name"] == "stepwire-keys"
        variables[variable["name"]] = "a-key"
    for name, value in variables.items():
        if name.startswith("STEPWIRE_"):
            assert name.removeprefix("STEPWIRE_").lower() in SETTINGS[package].model_fields, f"{name} is no setting"
            monkeypatch.setenv(name, value)
    return SETTINGS[package]()


def test_addresses_and_ports_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = settings_of_pod("stepwire-gateway", monkeypatch)
    control_plane = settings_of_pod("stepwire-control-plane", monkeypatch)
    service = found("Service", "stepwire-control-plane")
    ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
    assert gateway.control_plane == f"{service['metadata']['name']}:{ports['grpc']}"
    assert gateway.control_plane_admin == f"{service['metadata']['name']}:{ports['admin']}"
    assert (control_plane.grpc_port, control_plane.admin_port, control_plane.metrics_port) == (
        ports["grpc"],
        ports["admin"],
        ports["metrics"],
    )
    assert control_plane.grpc_host == control_plane.admin_host == control_plane.metrics_host == gateway.host
    for name in ("stepwire-gateway", "stepwire-control-plane"):
        targets = {port["targetPort"] for port in found("Service", name)["spec"]["ports"]}
        assert targets <= {port["name"] for port in container(name)["ports"]}
        assert found("Service", name)["spec"]["selector"] == pod_templates()[name]["metadata"]["labels"]
    assert {p["name"]: p["containerPort"] for p in container("stepwire-gateway")["ports"]} == {"http": gateway.port}


def test_the_control_plane_names_every_leader(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = found("LeaderWorkerSet", "stepwire-worker")
    name, replicas = workers["metadata"]["name"], workers["spec"]["replicas"]
    leader = container("stepwire-worker leader")
    [port] = [port["containerPort"] for port in leader["ports"] if port["name"] == "steps"]
    expected = tuple(f"{name}-{number}.{name}:{port}" for number in range(replicas))
    assert settings_of_pod("stepwire-control-plane", monkeypatch).workers == expected
    assert f"--listen=0.0.0.0:{port}" in leader["args"]
    [group] = [port["containerPort"] for port in leader["ports"] if port["name"] == "group"]
    assert f"--group-listen=$(LWS_LEADER_ADDRESS):{group}" in leader["args"]
    assert container("stepwire-worker member")["args"] == [f"--join=$(LWS_LEADER_ADDRESS):{group}"]
    worker = settings_of_pod("stepwire-worker leader", monkeypatch)
    assert worker.device == "cuda", "without its GPUs a worker must say so"
    assert worker.model == settings_of_pod("stepwire-control-plane", monkeypatch).model


def test_ranks_fill_the_nodes() -> None:
    workers = found("LeaderWorkerSet", "stepwire-worker")["spec"]["leaderWorkerTemplate"]
    leader = container("stepwire-worker leader")
    flags = dict(argument.removeprefix("--").split("=", 1) for argument in leader["args"])
    gpus = [
        container(f"stepwire-worker {role}")["resources"]["limits"]["nvidia.com/gpu"] for role in ("leader", "member")
    ]
    num_ranks = int(flags["tensor-parallel-size"]) * int(flags["pipeline-parallel-size"])
    assert num_ranks == gpus[0] + gpus[1] * (workers["size"] - 1)
    assert flags["num-nodes"] == "$(LWS_GROUP_SIZE)"


def test_nothing_is_killed_while_it_drains(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stepwire-gateway", "stepwire-control-plane"):
        before_s = container(name)["lifecycle"]["preStop"]["sleep"]["seconds"]
        drain_s = settings_of_pod(name, monkeypatch).drain_timeout_s
        assert pod_templates()[name]["spec"]["terminationGracePeriodSeconds"] >= before_s + drain_s + MARGIN_S
    grace_s = settings_of_pod("stepwire-worker leader", monkeypatch).shutdown_grace_s
    for role in ("leader", "member"):
        pod = pod_templates()[f"stepwire-worker {role}"]
        assert pod["spec"]["terminationGracePeriodSeconds"] >= grace_s + MARGIN_S


def test_probes_ask_where_and_what_the_processes_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    control_plane = container("stepwire-control-plane")
    service = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
    assert control_plane["readinessProbe"]["grpc"] == {
        "port": settings_of_pod("stepwire-control-plane", monkeypatch).grpc_port,
        "service": service,
    }
    # Not ready without workers is no reason to be killed.
    assert "grpc" not in control_plane["livenessProbe"]
    leader = container("stepwire-worker leader")
    assert {leader[probe]["grpc"]["port"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")} == {50061}
    patience_s = leader["startupProbe"]["periodSeconds"] * leader["startupProbe"]["failureThreshold"]
    # The others may come late, by as much as it takes to pull an image; then the model is still to be loaded.
    group_s = settings_of_pod("stepwire-worker leader", monkeypatch).group_timeout_s
    assert 10 * 60 <= group_s <= patience_s - 15 * 60
    assert settings_of_pod("stepwire-worker member", monkeypatch).group_timeout_s == group_s
    gateway = container("stepwire-gateway")
    assert gateway["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert gateway["livenessProbe"]["httpGet"]["path"] == "/health"


def test_pods_are_hardened_and_mounts_exist() -> None:
    for name, template in pod_templates().items():
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 10001, name
        volumes = {volume["name"] for volume in spec["volumes"]}
        for only in spec["containers"]:
            assert only["securityContext"]["readOnlyRootFilesystem"] is True, name
            assert only["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name
            assert {mount["name"] for mount in only["volumeMounts"]} == volumes, name
    assert not [d for _, d in DOCUMENTS if d["kind"] == "Secret"], "keys are not kept in the repository"


def test_whoever_reads_the_model_waits_for_the_job_that_prepares_it(tmp_path: Path) -> None:
    """Else its first processes end for want of a model, and are started again ever more slowly."""
    readers = {
        name: template["spec"]
        for name, template in pod_templates().items()
        if any(
            volume["name"] == "models" and volume["persistentVolumeClaim"].get("readOnly")
            for volume in template["spec"]["volumes"]
        )
    }
    assert readers.keys() == {"stepwire-control-plane", "stepwire-worker leader", "stepwire-worker member"}
    commands = set()
    for name, spec in readers.items():
        [before] = spec["initContainers"]
        assert before["image"] == spec["containers"][0]["image"], name
        assert before["securityContext"] == spec["containers"][0]["securityContext"], name
        assert before["volumeMounts"] == [{"name": "models", "mountPath": "/models", "readOnly": True}], name
        commands.add(tuple(before["command"]))
    [command] = commands
    assert found("ConfigMap", "stepwire-worker")["data"]["STEPWIRE_MODEL"] in command[-1]
    here = [part.replace("/models/served", f"{tmp_path}/served") for part in command]
    waiting, told = subprocess.Popen(here), subprocess.Popen(here)
    told.terminate()
    # Whatever it was about: an `exit` without a number gives what came before, which may have gone well.
    assert told.wait(60) in (143, -signal.SIGTERM) and waiting.poll() is None
    (tmp_path / "converted").mkdir()
    (tmp_path / "served").symlink_to(tmp_path / "converted")
    assert waiting.wait(60) == 0


def test_workers_hear_their_control_plane_and_one_another_alone() -> None:
    labels = {role: pod_templates()[f"stepwire-worker {role}"]["metadata"]["labels"] for role in ("leader", "member")}
    policy = found("NetworkPolicy", "stepwire-worker")["spec"]
    selected = policy["podSelector"]["matchLabels"]
    assert all(selected.items() <= of_role.items() for of_role in labels.values())
    allowed = [source["podSelector"]["matchLabels"] for rule in policy["ingress"] for source in rule["from"]]
    assert allowed == [pod_templates()["stepwire-control-plane"]["metadata"]["labels"], selected]


def test_autoscaling_names_what_is_there_and_exported() -> None:
    for _, document in DOCUMENTS:
        if document["kind"] == "HorizontalPodAutoscaler":
            target = document["spec"]["scaleTargetRef"]
            assert found(target["kind"], target["name"])["apiVersion"] == target["apiVersion"]
    [metric] = found("HorizontalPodAutoscaler", "stepwire-worker")["spec"]["metrics"]
    page = (DOCKER.parent / "docs" / "operations.md").read_text()
    assert f"`{metric['external']['metric']['name']}`" in page
