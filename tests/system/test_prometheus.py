"""A real Prometheus over the real stack: every expression that is shipped names what the processes really export.

`UPDATE_METRICS_TABLE=1 pytest tests/system/test_prometheus.py` writes the table of metrics in docs/operations.md anew.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.system.conftest import LIMIT_S, ROOT, START_LIMIT_S, STOP_LIMIT_S, Stack, wait_until
from tests.system.ports import free_port

PROMETHEUS_FILES = ROOT / "docker" / "prometheus"
CONFIG_FILE = PROMETHEUS_FILES / "prometheus.yml"
RULES_FILE = PROMETHEUS_FILES / "alerts.yml"
DASHBOARD_FILE = ROOT / "docker" / "grafana" / "dashboards" / "stepwire.json"
OPERATIONS_PAGE = ROOT / "docs" / "operations.md"
UPDATE_TABLE = "UPDATE_METRICS_TABLE"

API_KEY = "the key of this test"
SCRAPE_INTERVAL = "1s"
# What Grafana fills in; long enough for a whole run of these tests.
VARIABLES = {"$__rate_interval": "10m", "$instance": ".*", "$gateway": ".*"}
LONG_ANSWER_TOKENS = 3000
ANSWER_LIMIT_S = 90.0

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="the programs prometheus and promtool are not installed: apt-get install prometheus",
)


class Expression(NamedTuple):
    where: str
    text: str


def dashboard_expressions() -> list[Expression]:
    panels = json.loads(DASHBOARD_FILE.read_text())["panels"]
    found = []
    for panel in panels:
        for target in panel.get("targets", []):
            text = target["expr"]
            for variable, value in VARIABLES.items():
                text = text.replace(variable, value)
            found.append(Expression(f"{panel['title']}: {target['legendFormat'] or target['refId']}", text))
    return found


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES_FILE.read_text())["groups"] for rule in group["rules"]]


def alert_expressions() -> list[Expression]:
    return [Expression(rule.get("alert") or rule["record"], rule["expr"]) for rule in rules()]


# ---- what an expression names ----

_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_RANGE = re.compile(r"\[[^\]]*\]|\boffset\s+\w+")
_NAME = re.compile(r"(?<![\w.:])([a-zA-Z_:][\w:]*)\s*(\{[^}]*\}|\()?")
_MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"(?:\\.|[^"\\])*"')
_OPERATORS = frozenset({"and", "or", "unless", "bool"})


class Names(NamedTuple):
    # metric -> labels that it is matched by
    metrics: dict[str, set[str]]
    grouped_by: set[str]


def names_in(expression: str) -> Names:
    """The metrics and labels that PromQL names: identifiers that are neither functions nor operators."""
    grouped_by = {
        label.strip() for labels in _GROUPING.findall(expression) for label in labels.split(",") if label.strip()
    }
    metrics: dict[str, set[str]] = {}
    for name, rest in _NAME.findall(_RANGE.sub(" ", _GROUPING.sub(" ", expression))):
        if rest != "(" and name not in _OPERATORS:
            metrics.setdefault(name, set()).update(_MATCHER.findall(rest))
    return Names(metrics, grouped_by)


def test_names_are_found_in_expressions() -> None:
    expression = (
        'histogram_quantile(0.9, sum by (le, instance) (rate(a_bucket{code=~"5..",route="/v1/(x)"}[5m] offset 1h))) '
        "/ on (instance) (b:c > 1e3) unless d"
    )
    assert names_in(expression) == Names({"a_bucket": {"code", "route"}, "b:c": set(), "d": set()}, {"le", "instance"})


# ---- the stack and a Prometheus that watches it ----


def complete(stack: Stack, **fields: object) -> httpx.Response:
    body = {"model": "tiny", "prompt": "A worker computes what the control plane decides. " * 4, "max_tokens": 8}
    return httpx.post(f"{stack.url}/v1/completions", json=body | fields, headers=stack.headers, timeout=120)


@contextmanager
def unfinished_stream(stack: Stack) -> Iterator[None]:
    """A request that goes on until the client leaves at the end of the block."""
    body = {"model": "tiny", "prompt": "And so on", "max_tokens": LONG_ANSWER_TOKENS, "stream": True}
    with httpx.stream("POST", f"{stack.url}/v1/completions", json=body, headers=stack.headers, timeout=120):
        yield


def make_every_kind_of_traffic(stack: Stack) -> None:
    """Requests that end well, are wrong, are refused by a full queue, and are left by their client."""
    for _ in range(2):
        assert complete(stack).status_code == 200
        assert complete(stack, stream=True).status_code == 200
    assert complete(stack, model="unknown").status_code == 404
    assert complete(stack, max_tokens=-1).status_code == 400
    with ThreadPoolExecutor(1) as pool:
        with unfinished_stream(stack):
            wait_until(lambda: stack.control_plane_metric("stepwire_requests_running") == 1, LIMIT_S, stack.logs)
            queued = pool.submit(complete, stack)
            wait_until(lambda: stack.control_plane_metric("stepwire_requests_waiting") == 1, LIMIT_S, stack.logs)
            assert complete(stack).status_code == 429
        assert queued.result().status_code == 200
    stack.wait_idle()


class Prometheus:
    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=LIMIT_S)

    def close(self) -> None:
        self._client.close()

    def is_ready(self) -> bool:
        """It answers nothing while it reads its files."""
        try:
            return self._client.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def get(self, path: str, **parameters: str) -> Any:
        answer = self._client.get(f"/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        result: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return result

    def labels_of(self, metric: str) -> set[str]:
        """Every label of every series of a metric; empty if there is no such metric."""
        return {label for series in self.get("series", **{"match[]": metric}) for label in series}

    def num_scrapes(self) -> int:
        """How often each of both targets has been scraped."""
        counts = self.query("min(count_over_time(up[10m])) and count(up) == 2")
        return int(float(counts[0]["value"][1])) if counts else 0


@pytest.fixture(scope="module")
def watched_stack(tiny_model: Path) -> Iterator[Stack]:
    """One row and one place in the queue, so that a third request is refused; and a key, which Prometheus must send."""
    stack = Stack(
        tiny_model,
        worker_flags=["--sim-step-ms", "5", "--sim-max-num-seqs", "1"],
        control_plane_flags=["--max-queued-requests", "1"],
        api_key=API_KEY,
    )
    with stack:
        make_every_kind_of_traffic(stack)
        yield stack


def write_config(stack: Stack, directory: Path) -> Path:
    """The project's own prometheus.yml with this stack's addresses, and faster."""
    config = yaml.safe_load(CONFIG_FILE.read_text())
    key_file = directory / "scrape_key"
    key_file.write_text(API_KEY)
    addresses = {"control-plane:8001": f"127.0.0.1:{stack.metrics_port}", "gateway:8000": f"127.0.0.1:{stack.port}"}
    config["global"] |= {"scrape_interval": SCRAPE_INTERVAL, "evaluation_interval": SCRAPE_INTERVAL}
    config["rule_files"] = [str(PROMETHEUS_FILES / name) for name in config["rule_files"]]
    for job in config["scrape_configs"]:
        for targets in job["static_configs"]:
            targets["targets"] = [addresses.pop(target) for target in targets["targets"]]
        if "authorization" in job:
            job["authorization"]["credentials_file"] = str(key_file)
    assert not addresses, f"prometheus.yml does not scrape {', '.join(addresses)}"
    path = directory / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def config_file(watched_stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(watched_stack, tmp_path_factory.mktemp("prometheus"))


@pytest.fixture(scope="module")
def prometheus(watched_stack: Stack, config_file: Path) -> Iterator[Prometheus]:
    """A Prometheus that has seen requests end between its scrapes."""
    port = free_port()
    server = Prometheus(f"http://127.0.0.1:{port}")
    log_file = config_file.parent / "prometheus.log"
    command = [
        "prometheus",
        f"--config.file={config_file}",
        f"--storage.tsdb.path={config_file.parent / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    with log_file.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:

        def has_scraped(times: int) -> bool:
            if process.poll() is not None:
                raise RuntimeError(f"prometheus ended with {process.returncode}\n{log_file.read_text()}")
            return server.is_ready() and server.num_scrapes() >= times

        wait_until(lambda: has_scraped(1), START_LIMIT_S, log_file.read_text)
        make_every_kind_of_traffic(watched_stack)
        seen = server.num_scrapes()
        wait_until(lambda: has_scraped(seen + 2), START_LIMIT_S, log_file.read_text)
        yield server
    finally:
        server.close()
        process.terminate()
        process.wait(STOP_LIMIT_S)


# ---- the files themselves ----


def promtool(*arguments: str | Path, text: str | None = None) -> None:
    run = subprocess.run(["promtool", *map(str, arguments)], input=text, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_rules_are_valid_and_do_what_their_tests_say() -> None:
    promtool("check", "rules", RULES_FILE)
    promtool("test", "rules", PROMETHEUS_FILES / "alerts.test.yml")


def test_configuration_is_valid(config_file: Path) -> None:
    promtool("check", "config", config_file)


def test_every_alert_is_tested_to_fire_and_not_to() -> None:
    tests = yaml.safe_load((PROMETHEUS_FILES / "alerts.test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    assert alerts == {case["alertname"] for case in cases if case["exp_alerts"]}
    assert alerts == {case["alertname"] for case in cases if not case["exp_alerts"]}


# ---- the scrape ----


def test_targets_are_up_and_the_gateway_asks_for_the_key(prometheus: Prometheus, watched_stack: Stack) -> None:
    def errors() -> dict[str, str]:
        return {target["labels"]["job"]: target["lastError"] for target in prometheus.get("targets")["activeTargets"]}

    wait_until(lambda: not any(errors().values()), ANSWER_LIMIT_S, lambda: str(errors()))
    assert errors().keys() == {"control-plane", "gateway"}
    assert httpx.get(f"{watched_stack.url}/metrics", timeout=LIMIT_S).status_code == 401


def pages(stack: Stack) -> dict[str, str]:
    """Process -> its metrics page."""
    return {
        "Control plane": httpx.get(f"http://127.0.0.1:{stack.metrics_port}/metrics", timeout=LIMIT_S).text,
        "Gateway": httpx.get(f"{stack.url}/metrics", headers=stack.headers, timeout=LIMIT_S).text,
    }


@pytest.mark.parametrize("process", ["Control plane", "Gateway"])
def test_pages_have_every_series_once(watched_stack: Stack, process: str) -> None:
    """Prometheus takes the first of two samples of one series, and says so only in its log."""
    lines = pages(watched_stack)[process].splitlines()
    series = Counter(line.rpartition(" ")[0] for line in lines if line and not line.startswith("#"))
    assert [name for name, times in series.items() if times > 1] == []


@pytest.mark.parametrize("process", ["Control plane", "Gateway"])
def test_pages_follow_prometheus_conventions(watched_stack: Stack, process: str) -> None:
    promtool("check", "metrics", text=pages(watched_stack)[process])


# ---- what dashboards and alerts ask for ----


@pytest.mark.parametrize("expression", dashboard_expressions(), ids=lambda expression: expression.where)
def test_the_dashboard_shows_something(prometheus: Prometheus, expression: Expression) -> None:
    check_names(prometheus, expression)
    # A scrape that a busy machine misses takes every gauge away until the next one.
    wait_until(lambda: bool(prometheus.query(expression.text)), ANSWER_LIMIT_S, lambda: f"nothing: {expression.text}")


@pytest.mark.parametrize("expression", alert_expressions(), ids=lambda expression: expression.where)
def test_rules_name_what_exists(prometheus: Prometheus, expression: Expression) -> None:
    check_names(prometheus, expression)
    prometheus.query(expression.text)


def check_names(prometheus: Prometheus, expression: Expression) -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    names = names_in(expression.text)
    assert names.metrics
    labels_of = {metric: prometheus.labels_of(metric) for metric in names.metrics.keys() - recorded}
    for metric, labels in labels_of.items():
        assert labels, f"{expression.where}: nothing exports {metric}"
        unknown = (names.metrics[metric] | names.grouped_by) - labels
        assert not unknown, f"{expression.where}: {metric} has no label {', '.join(sorted(unknown))}"


def test_dashboard_variables_list_instances(prometheus: Prometheus) -> None:
    variables = json.loads(DASHBOARD_FILE.read_text())["templating"]["list"]
    queries = {variable["name"]: variable["query"]["query"] for variable in variables if variable["type"] == "query"}
    assert {f"${name}" for name in queries} == VARIABLES.keys() - {"$__rate_interval"}
    for query in queries.values():
        match = re.fullmatch(r"label_values\((\w+), (\w+)\)", query)
        assert match, query
        assert match[2] in prometheus.labels_of(match[1])


def test_rules_are_evaluated_and_only_the_full_queue_is_reported(prometheus: Prometheus) -> None:
    evaluated = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert len(evaluated) == len(rules())
    assert [(rule["name"], rule.get("lastError")) for rule in evaluated if rule["health"] != "ok"] == []
    alerts = prometheus.get("alerts")["alerts"]
    assert {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"} == {"StepwireQueueFull"}


# ---- what the images check, and what the documentation says ----


def test_the_images_health_checks_agree_with_a_stack_that_works(watched_stack: Stack) -> None:
    for target in (f"{watched_stack.url}/ready", f"grpc://{watched_stack.grpc_address}"):
        run = subprocess.run(
            [sys.executable, ROOT / "docker" / "check_health.py", target], capture_output=True, text=True
        )
        assert (run.returncode, run.stdout) == (0, f"{target}: healthy\n"), run.stderr


_TABLE = re.compile(r"(<!-- metrics: begin -->\n).*?(<!-- metrics: end -->)", re.DOTALL)
_SUFFIXES = {"counter": "_total", "histogram": "", "gauge": "", "info": "_info"}


def metrics_table(stack: Stack) -> str:
    """Markdown: every metric of both processes with its type, labels and meaning."""
    lines = []
    for process, page in pages(stack).items():
        lines += [f"### {process}", "", "| metric | type | labels | meaning |", "|---|---|---|---|"]
        for family in sorted(text_string_to_metric_families(page), key=lambda family: family.name):
            # What prometheus_client adds: when each series began.
            if not family.name.startswith("stepwire_") or family.name.endswith("_created"):
                continue
            labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
            name = family.name + _SUFFIXES[family.type]
            lines.append(
                f"| `{name}` | {family.type} | {', '.join(labels)} | {' '.join(family.documentation.split())} |"
            )
        lines.append("")
    return "\n".join(lines)


def test_the_table_of_metrics_is_what_the_processes_export(watched_stack: Stack) -> None:
    text = OPERATIONS_PAGE.read_text()
    table = metrics_table(watched_stack)
    assert _TABLE.search(text), f"{OPERATIONS_PAGE} has no '<!-- metrics: begin -->' and '<!-- metrics: end -->'"
    fresh = _TABLE.sub(lambda match: f"{match[1]}{table}{match[2]}", text)
    if os.environ.get(UPDATE_TABLE):
        OPERATIONS_PAGE.write_text(fresh)
    else:
        assert text == fresh, f"run {UPDATE_TABLE}=1 pytest {Path(__file__).relative_to(ROOT)}"
