"""Kubernetes: the manifests are valid and consistent with each other and with the service."""

import re
from typing import Any

import pytest
from jsonschema import ValidationError
from prometheus_client import CollectorRegistry

from app.api.keys import is_open
from app.errors import SettingsError
from app.main import create_app
from app.observability.metrics import Metrics
from app.serving.decoding import CHEAP_BYTES
from app.serving.service import Service
from app.settings import Settings, read_settings
from tests.deploy.manifests import (
    FOLDER,
    ROOT,
    Object,
    container,
    find,
    list_whole_files,
    read_file,
    read_settings_file,
)
from tests.deploy.schemas import LATEST, OLDEST, validate

# docs/operations.md
TRACES_SECONDS = 5
# Measured: the reference store when ready.
READY_BYTES = 825_000_000
UNITS = {"Mi": 1 << 20, "Gi": 1 << 30}
PROBES = ("startup", "readiness", "liveness")


@pytest.fixture
def deployment() -> Object:
    return read_file("base/deployment.yaml")


def base_settings() -> dict[str, str]:
    return read_settings_file((FOLDER / "base/settings.env").read_text(encoding="utf-8"))


def environment(deployment: Object, settings: dict[str, str]) -> dict[str, str]:
    """Return the container's variables, except those filled in from fields of the pod."""
    own = container(deployment).get("env", [])
    return settings | {variable["name"]: variable["value"] for variable in own if "value" in variable}


def start_with(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> Settings:
    """Read the settings with these variables and no other `DTEM_` variables."""
    for name in Settings.model_fields:
        monkeypatch.delenv(f"DTEM_{name.upper()}", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return read_settings()


def quantity_bytes(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(\w+)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * UNITS[unit]


def pod_selectors(item: Object) -> list[dict[str, str]]:
    """List the label selectors of an object."""
    spec = item.get("spec", {})
    if item["kind"] == "Service":
        return [spec["selector"]]
    if item["kind"] == "NetworkPolicy":
        return [spec["podSelector"]["matchLabels"]]
    if item["kind"] == "Deployment":
        spreads = spec["template"]["spec"]["topologySpreadConstraints"]
        return [
            choice["matchLabels"] for choice in (spec["selector"], *(spread["labelSelector"] for spread in spreads))
        ]
    return [spec["selector"]["matchLabels"]] if item["kind"] == "PodDisruptionBudget" else []


@pytest.mark.parametrize("version", [OLDEST, LATEST])
@pytest.mark.parametrize("path", list_whole_files())
def test_manifest_is_accepted_by_the_published_schema(path: str, version: str) -> None:
    validate(read_file(path), version)


@pytest.mark.parametrize("path", list_whole_files())
def test_manifest_with_a_misspelt_field_is_refused(path: str) -> None:
    item = read_file(path)
    item.setdefault("spec", {})["selectorr"] = {}
    with pytest.raises(ValidationError):
        validate(item, LATEST)


def test_manifests_include_every_documented_kind() -> None:
    kinds = {read_file(path)["kind"] for path in list_whole_files()}
    assert kinds >= {
        *("Namespace", "ServiceAccount", "Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"),
        *("ServiceMonitor", "HorizontalPodAutoscaler", "PersistentVolumeClaim"),
    }


def test_settings_are_accepted_by_the_service(deployment: Object, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = start_with(monkeypatch, environment(deployment, base_settings()))
    assert settings.host == "0.0.0.0"
    # The threads follow the quota, so the limit has to be whole CPUs.
    assert settings.n_threads is None
    assert container(deployment)["resources"]["limits"]["cpu"].isdecimal()


def test_service_links_are_off_because_the_service_refuses_their_variables(
    deployment: Object, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = read_file("base/service.yaml")["metadata"]["name"].upper().replace("-", "_")
    variables = environment(deployment, base_settings())
    with pytest.raises(SettingsError, match="no such setting"):
        start_with(monkeypatch, {**variables, f"{prefix}_PORT": "tcp://10.0.0.1:80"})
    assert deployment["spec"]["template"]["spec"]["enableServiceLinks"] is False


def test_termination_leaves_time_for_the_hook_the_drain_and_the_traces(
    deployment: Object, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = start_with(monkeypatch, base_settings())
    hook_seconds = container(deployment)["lifecycle"]["preStop"]["sleep"]["seconds"]
    given = deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert given >= hook_seconds + settings.drain_seconds + TRACES_SECONDS
    assert settings.drain_grace_seconds > 0


def test_memory_holds_models_bodies_and_images_being_decoded(
    deployment: Object, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = start_with(monkeypatch, base_settings())
    decoding = settings.max_decode_bytes + settings.n_decode_threads * CHEAP_BYTES
    needed = READY_BYTES + settings.max_in_flight_bytes + decoding
    assert quantity_bytes(container(deployment)["resources"]["limits"]["memory"]) > 1.2 * needed


def test_probes_use_existing_paths_that_need_no_key(deployment: Object) -> None:
    paths = create_app(Service(Settings(), Metrics(CollectorRegistry()))).openapi()["paths"]
    asked = {
        kind: container(deployment)[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")
    }
    assert asked == {"startup": "/health/ready", "readiness": "/health/ready", "liveness": "/health/live"}
    assert all(path in paths and is_open(path) for path in asked.values())
    assert read_file("components/prometheus/servicemonitor.yaml")["spec"]["endpoints"][0]["path"] in paths


def test_ports_target_the_port_that_the_service_listens_on(deployment: Object, monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = container(deployment)["ports"]
    assert port["containerPort"] == start_with(monkeypatch, base_settings()).port
    (offered,) = read_file("base/service.yaml")["spec"]["ports"]
    (scraped,) = read_file("components/prometheus/servicemonitor.yaml")["spec"]["endpoints"]
    policies = [read_file(f"{place}/networkpolicy.yaml") for place in ("base", "components/prometheus")]
    opened = [port["port"] for policy in policies for rule in policy["spec"]["ingress"] for port in rule["ports"]]
    probed = [container(deployment)[f"{kind}Probe"]["httpGet"]["port"] for kind in PROBES]
    assert {offered["targetPort"], *opened, *probed} == {port["name"]}
    assert scraped["port"] == offered["name"]


def test_selectors_match_the_pods_of_the_deployment(deployment: Object) -> None:
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    objects = [read_file(path) for path in list_whole_files()]
    chosen = [selector for item in objects for selector in pod_selectors(item)]
    assert len(chosen) >= 8
    assert all(selector and selector.items() <= labels.items() for selector in chosen)


def test_service_monitor_and_autoscaler_refer_to_existing_objects(deployment: Object) -> None:
    objects = [read_file(path) for path in list_whole_files()]
    service, monitor = find(objects, "Service"), find(objects, "ServiceMonitor")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["jobLabel"] in service["metadata"]["labels"]
    target = find(objects, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert target == {"apiVersion": "apps/v1", "kind": "Deployment", "name": deployment["metadata"]["name"]}


@pytest.mark.parametrize("path", ["base/deployment.yaml", "components/model-store/publisher.yaml"])
def test_pods_meet_the_security_standard_of_their_namespace(path: str) -> None:
    item = read_file(path)
    pod: dict[str, Any] = item["spec"]["template"]["spec"] if item["kind"] == "Deployment" else item["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"].items() >= {"runAsNonRoot": True, "runAsUser": 10001, "runAsGroup": 10001}.items()
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    for only in pod["containers"]:
        assert only["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert only["resources"]["limits"].keys() == only["resources"]["requests"].keys()
        assert only["resources"]["limits"].keys() >= {"cpu", "memory", "ephemeral-storage"}


def test_image_runs_as_the_user_of_the_pods() -> None:
    assert "\nUSER 10001:10001\n" in (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_network_policy_allows_no_egress() -> None:
    spec = read_file("base/networkpolicy.yaml")["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert not spec.get("egress")


def test_readme_names_existing_files() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    linked = {FOLDER / name for name in re.findall(r"\]\(([^)#]+)\)", text)}
    words = re.findall(r"(?<![\w./])(?:deploy|docs|examples|model_store)/[\w./-]+\w", text)
    named = {ROOT / word for word in words}
    assert len(linked) >= 7
    assert len(named) >= 6
    assert [str(path) for path in linked | named if not path.exists()] == []
