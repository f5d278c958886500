"""`docker compose up` on a real engine, tested through the published ports."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.local.compose import ComposeStack, docker
from tests.deploy.prometheus import get
from tests.deploy.queries import DASHBOARD, alert_queries, ask, dashboard_queries, find_faults
from tests.deploy.traffic import Address, send_all_kinds
from tests.integration.load import Load
from tests.integration.server import wait_until

pytestmark = pytest.mark.container
ROOT = Path(__file__).parents[2]
README = (ROOT / "deploy/README.md").read_text(encoding="utf-8")
EXAMPLES = sorted(path for path in (ROOT / "examples").iterdir() if path.suffix in (".jpg", ".png"))
NO_CAPABILITIES = "0" * 16
SERVICES = ("api", "prometheus", "grafana")
SCRAPE_SECONDS = 5
TRAFFIC_SECONDS = 60
# Requests answered before the signal.
N_BEFORE = 100


@pytest.fixture(scope="module")
def model_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store on the host with the reference model's last version."""
    store = tmp_path_factory.mktemp("model_store")
    shutil.copytree(ROOT / "model_store/reference/5", store / "reference/5")
    # Temporary folders are private, and the service runs as another user.
    store.chmod(0o755)
    return store


@pytest.fixture(scope="module")
def stack(image: str, model_store: Path) -> Iterator[ComposeStack]:
    docker("build", "--tag", "dtem-grafana-stand-in", "--file", "tests/deploy/grafana.Dockerfile", "tests/deploy")
    services, files = ["api", "grafana", "dcgm-exporter"], ["tests/deploy/docker-compose.test.yml"]
    variables: dict[str, Any] = {"MODEL_STORE": model_store, "API_MEMORY": "2g", "API_CPUS": 2}
    with ComposeStack("dtem-test", services, files, **variables) as stack:
        yield stack


def classify(stack: ComposeStack, image: Path, query: str) -> dict[str, object]:
    status, body = stack.ask("api", "POST", f"/classify?{query}", image.read_bytes())
    assert status == 200, body
    return dict(json.loads(body))


def test_stack_classifies_through_the_published_port(stack: ComposeStack) -> None:
    answers = [classify(stack, image, f"r={r}&top_k=1") for image in EXAMPLES for r in (0, 8, 16)]
    assert {answer["r"] for answer in answers} == {0, 8, 16}
    wanted = [image.stem.rsplit("-", 1)[1] for image in EXAMPLES for _ in (0, 8, 16)]
    found = [answer["predictions"][0]["label"] for answer in answers]  # type: ignore[index]
    # 11 of the 12 images, as the README says.
    assert sum(a == b for a, b in zip(wanted, found, strict=True)) >= 33


def test_every_query_returns_plausible_data_after_traffic(stack: ComposeStack) -> None:
    """With the stack's own Prometheus, which scrapes every 5 s."""
    prometheus = f"http://127.0.0.1:{stack.ports['prometheus']}"
    wait_until(lambda: [sample.values[-1] for sample in ask(prometheus, "up")] == [1, 1])
    # An increase needs a first value.
    time.sleep(2 * SCRAPE_SECONDS)
    image = EXAMPLES[0].read_bytes()
    statuses = send_all_kinds(Address("127.0.0.1", stack.ports["api"]), image, TRAFFIC_SECONDS, n_clients=64)
    assert {200, 404, 415, 422, 429, 504} <= set(statuses), statuses
    time.sleep(2 * SCRAPE_SECONDS)
    queries = dashboard_queries() + alert_queries()
    assert len({query.title for query in queries}) > 40
    found = [text for query in queries for text in find_faults(query, ask(prometheus, query.expr, 120))]
    assert found == []
    (group,) = get(prometheus, "rules")["groups"]
    assert {rule["health"] for rule in group["rules"]} == {"ok"}


@pytest.mark.parametrize("service", SERVICES)
def test_stack_is_confined(stack: ComposeStack, service: str) -> None:
    status = dict(line.split(":\t", 1) for line in stack.execute(service, "cat", "/proc/1/status").splitlines())
    assert 0 not in {int(uid) for uid in status["Uid"].split()}
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {NO_CAPABILITIES}
    assert status["NoNewPrivs"] == "1"
    for folder in ("/", "/etc", "/app" if service == "api" else "/usr", "/var" if service == "grafana" else "/tmp"):
        refused = stack.execute(service, "sh", "-c", f"touch {folder}/probe 2>&1 || true")
        assert "Read-only file system" in refused, refused


def test_stack_listens_only_on_loopback(stack: ComposeStack) -> None:
    for service in SERVICES:
        ports = json.loads(stack.inspect(service, "{{json .NetworkSettings.Ports}}"))
        assert {binding["HostIp"] for bindings in ports.values() for binding in bindings or []} == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("service", "limits"),
    [("api", (2 << 30, 2e9, 1024)), ("prometheus", (1 << 30, 1e9, 256)), ("grafana", (1 << 30, 1e9, 1024))],
)
def test_stack_is_limited(stack: ComposeStack, service: str, limits: tuple[int, float, int]) -> None:
    """Memory in bytes, CPUs in billionths, processes and threads."""
    template = "{{.HostConfig.Memory}} {{.HostConfig.NanoCpus}} {{.HostConfig.PidsLimit}}"
    assert tuple(int(word) for word in stack.inspect(service, template).split()) == limits


def test_stack_has_time_to_drain_and_reports_its_memory_limit(stack: ComposeStack) -> None:
    assert int(stack.inspect("api", "{{.Config.StopTimeout}}")) >= 20 + 5
    exposition = stack.ask("api", "GET", "/metrics")[1].decode()
    (limit,) = [line.split()[1] for line in exposition.splitlines() if line.startswith("dtem_memory_limit_bytes ")]
    assert float(limit) == 2 << 30


def test_stack_generates_grafanas_password_once_and_never_logs_it(stack: ComposeStack) -> None:
    def read() -> str:
        return stack.execute("grafana", "cat", "/var/lib/grafana/admin-password")

    password = read()
    assert len(password) >= 32
    assert stack.execute("grafana", "stat", "--format", "%a %u", "/var/lib/grafana/admin-password") == "600 472"
    assert password not in stack.logs("grafana")
    assert "docker compose exec grafana cat" in stack.logs("grafana")
    stack.compose("restart", "grafana")
    stack.wait_until_healthy("grafana")
    assert read() == password


def test_stack_gives_grafana_its_dashboard_and_its_prometheus(stack: ComposeStack) -> None:
    home = stack.execute("grafana", "sh", "-c", "cat $GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH")
    assert json.loads(home) == json.loads(DASHBOARD.read_text())
    (source,) = read_provisioning(stack, "datasources")
    # The data source's address resolves in Grafana's container.
    answer = stack.execute("grafana", "curl", "-fsS", f"{source['url']}/api/v1/query?query=up")
    assert json.loads(answer)["status"] == "success"
    (provider,) = read_provisioning(stack, "dashboards")
    assert "dtem-serve.json" in stack.execute("grafana", "ls", provider["options"]["path"])


def read_provisioning(stack: ComposeStack, kind: str) -> list[dict[str, Any]]:
    """Read Grafana's only provisioning file of a kind."""
    content = yaml.safe_load(stack.execute("grafana", "sh", "-c", f"cat /etc/grafana/provisioning/{kind}/*.yml"))
    found: list[dict[str, Any]] = content["datasources" if kind == "datasources" else "providers"]
    return found


def test_stack_serves_a_version_published_on_the_host(stack: ComposeStack, model_store: Path) -> None:
    """The store is mounted read-only and updated on the host; removing the version rolls it back."""
    unfinished, published = model_store / "reference/.6.partial", model_store / "reference/6"
    shutil.copytree(model_store / "reference/5", unfinished)
    manifest = unfinished / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": "5"', '"version": "6"'))
    unfinished.rename(published)

    def version() -> object:
        return classify(stack, EXAMPLES[0], "r=8")["model"]["version"]  # type: ignore[index]

    assert version() == "5"
    wait_until(lambda: version() == "6")
    published.rename(model_store / ".6.gone")
    wait_until(lambda: version() == "5")
    shutil.rmtree(model_store / ".6.gone")


def test_docker_stop_under_load_loses_nothing(stack: ComposeStack) -> None:
    """Uses the container's own address: Docker's proxy for published ports accepts connections for a stopped container,
    and drops them.
    """
    container = stack.container("api")
    address = stack.inspect("api", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}")
    try:
        with Load(
            8000, EXAMPLES[0].read_bytes(), n_clients=16, is_kept=True, path="/classify?r=16", host=address
        ) as load:
            wait_until(lambda: load.outcomes[200] >= N_BEFORE)
            docker("stop", container)
            load.join()
        assert set(load.outcomes) == {200}, load.outcomes
        assert docker("inspect", "--format", "{{.State.ExitCode}}", container) == "0"
        assert "Traceback" not in docker("logs", container)
    finally:
        docker("start", container)
        stack.wait_until_healthy("api")


def test_readme_commands_set_up_api_keys(image: str, tmp_path: Path) -> None:
    """Runs the README's block except its last line."""
    (block,) = re.findall(r"```sh\n(mkdir -m 700 secrets.*?)docker compose up --detach\n```", README, re.DOTALL)
    shutil.copy(ROOT / "docker-compose.yml", tmp_path)
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    subprocess.run(["bash", "-euc", block], cwd=tmp_path, check=True)
    key = {"X-API-Key": (tmp_path / "secrets/client.key").read_text().strip()}
    files, store = ["docker-compose.override.yml"], ROOT / "model_store"
    with ComposeStack("dtem-keys", ["api", "prometheus"], files, tmp_path, MODEL_STORE=store) as stack:
        assert stack.ask("api", "GET", "/models")[0] == 401
        assert stack.ask("api", "GET", "/models", headers=key)[0] == 200
        wait_until(lambda: [s.values[-1] for s in ask(f"http://127.0.0.1:{stack.ports['prometheus']}", "up")] == [1])
