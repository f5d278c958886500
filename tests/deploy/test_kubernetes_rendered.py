"""The overlays as kustomize renders them, and the README's example of an operator's overlay."""

import base64
import json
import re
import subprocess
from pathlib import Path

import pytest

from app.api.keys import Keys, read_keys
from tests.deploy.manifests import FOLDER, ROOT, Object, container, find, read_objects, render
from tests.deploy.schemas import LATEST, OLDEST, validate
from tests.deploy.test_kubernetes import environment, start_with

pytestmark = pytest.mark.container

OVERLAYS = ("base", "overlays/cpu", "overlays/gpu")


def read_block(language: str, word: str) -> str:
    """Return the README's code block that contains a word."""
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    (block,) = (b for b in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL) if word in b)
    assert isinstance(block, str)
    return block


def render_over(folder: Path, kustomization: str) -> list[Object]:
    """Render a kustomization in a folder next to `deploy`, because kustomize refuses absolute paths."""
    (folder / "deploy").symlink_to(FOLDER.parent, target_is_directory=True)
    (folder / "own").mkdir()
    (folder / "own" / "kustomization.yaml").write_text(kustomization, encoding="utf-8")
    return render(folder / "own")


@pytest.fixture
def own(tmp_path: Path) -> list[Object]:
    return render_over(tmp_path, read_block("yaml", "kustomization.yaml"))


@pytest.mark.parametrize("version", [OLDEST, LATEST])
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_is_accepted_by_the_published_schemas(overlay: str, version: str) -> None:
    objects = render(FOLDER / overlay)
    for item in objects:
        validate(item, version)
    assert len(objects) == (7 if overlay == "base" else 10)


@pytest.mark.parametrize(("overlay", "device"), [("base", "cpu"), ("overlays/cpu", "cpu"), ("overlays/gpu", "cuda")])
def test_overlay_has_the_settings_and_image_of_its_device(
    overlay: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = render(FOLDER / overlay)
    deployment, settings = find(objects, "Deployment"), find(objects, "ConfigMap")
    read = start_with(monkeypatch, environment(deployment, settings["data"]))
    only = container(deployment)
    assert read.device == device
    assert only["image"] == f"dtem-serve:{'gpu' if device == 'cuda' else 'cpu'}"
    assert only["resources"]["limits"].get("nvidia.com/gpu") == ("1" if device == "cuda" else None)
    assert only["envFrom"] == [{"configMapRef": {"name": settings["metadata"]["name"]}}]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_puts_everything_into_its_namespace(overlay: str) -> None:
    objects = render(FOLDER / overlay)
    assert {o["metadata"].get("namespace") for o in objects if o["kind"] != "Namespace"} == {"dtem-serve"}


def test_overlay_leaves_the_number_of_replicas_to_the_autoscaler() -> None:
    assert find(render(FOLDER / "base"), "Deployment")["spec"]["replicas"] == 2
    assert "replicas" not in find(render(FOLDER / "overlays/cpu"), "Deployment")["spec"]


def test_gpu_overlay_needs_no_spare_gpu_for_a_rollout() -> None:
    strategy = find(render(FOLDER / "overlays/gpu"), "Deployment")["spec"]["strategy"]["rollingUpdate"]
    assert strategy == {"maxUnavailable": 1, "maxSurge": 0}


def test_readme_overlay_applies_its_changes(own: list[Object], monkeypatch: pytest.MonkeyPatch) -> None:
    for item in own:
        validate(item, LATEST)
    deployment = find(own, "Deployment")
    assert find(own, "Namespace", "vision")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert {o["metadata"].get("namespace") for o in own if o["kind"] != "Namespace"} == {"vision"}
    assert container(deployment)["image"] == "registry.example/dtem-serve:1.0"
    assert find(own, "HorizontalPodAutoscaler")["spec"]["maxReplicas"] == 20
    assert find(own, "ServiceMonitor")["metadata"]["labels"]["release"] == "monitoring"
    settings = start_with(monkeypatch, environment(deployment, find(own, "ConfigMap")["data"]))
    assert (settings.max_batch_images, settings.drain_grace_seconds) == (16, 5)


def test_components_mount_the_paths_in_their_settings(own: list[Object], monkeypatch: pytest.MonkeyPatch) -> None:
    deployment = find(own, "Deployment")
    settings = start_with(monkeypatch, environment(deployment, find(own, "ConfigMap")["data"]))
    mounts = {mount["name"]: mount for mount in container(deployment)["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in deployment["spec"]["template"]["spec"]["volumes"]}
    assert all(mount["readOnly"] for mount in mounts.values())
    assert str(settings.model_store) == mounts["model-store"]["mountPath"]
    claim = find(own, "PersistentVolumeClaim", "model-store")["metadata"]["name"]
    assert volumes["model-store"]["persistentVolumeClaim"]["claimName"] == claim
    (item,) = volumes["keys"]["secret"]["items"]
    assert str(settings.api_key_file) == f"{mounts['keys']['mountPath']}/{item['path']}"


def test_readme_keys_work_for_the_service_and_prometheus(
    own: list[Object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = read_block("sh", "create secret").replace("generic", "generic --dry-run=client --output=json")
    done = subprocess.run(["sh", "-ec", commands], cwd=tmp_path, capture_output=True, text=True, check=True)
    secret = json.loads(done.stdout)
    (volume,) = (v for v in find(own, "Deployment")["spec"]["template"]["spec"]["volumes"] if v["name"] == "keys")
    credentials = find(own, "ServiceMonitor")["spec"]["endpoints"][0]["authorization"]["credentials"]
    assert volume["secret"]["secretName"] == credentials["name"] == secret["metadata"]["name"]
    keys_file = tmp_path / "mounted"
    keys_file.write_bytes(base64.b64decode(secret["data"][volume["secret"]["items"][0]["key"]]))
    keys: Keys = read_keys(start_with(monkeypatch, {"DTEM_API_KEY_FILE": str(keys_file)}))
    sent = b"Bearer " + base64.b64decode(secret["data"][credentials["key"]])
    keys.require({"type": "http", "path": "/metrics", "headers": [(b"authorization", sent)]})
    assert repr(keys) == "<Keys n=2>"


def test_readme_alerts_become_rules_of_the_prometheus_operator(own: list[Object]) -> None:
    commands = read_block("sh", "PrometheusRule").replace("kubectl -n dtem-serve apply -f -", "cat")
    done = subprocess.run(["sh", "-ec", commands], cwd=ROOT, capture_output=True, text=True, check=True)
    (rule,) = read_objects(done.stdout)
    assert (rule["apiVersion"], rule["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert [rule["spec"]] == read_objects((ROOT / "deploy/prometheus/alerts.yml").read_text(encoding="utf-8"))
    job = find(own, "Service")["metadata"]["labels"][find(own, "ServiceMonitor")["spec"]["jobLabel"]]
    assert f'up{{job="{job}"}}' in done.stdout


def test_components_all_work_together_and_without_prometheus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    components = [f"../deploy/kubernetes/components/{name}" for name in ("keys", "model-store", "traces")]
    kustomization = {"namespace": "dtem-serve", "resources": ["../deploy/kubernetes/base"], "components": components}
    objects = render_over(tmp_path, json.dumps(kustomization))
    for item in objects:
        validate(item, LATEST)
    settings = start_with(monkeypatch, environment(find(objects, "Deployment"), find(objects, "ConfigMap")["data"]))
    assert settings.trace_endpoint is not None
    assert [variable["name"] for variable in container(find(objects, "Deployment"))["env"]][:2] == [
        # Before the variable that refers to it.
        "POD_NAME",
        "OTEL_RESOURCE_ATTRIBUTES",
    ]
    (rule, _names) = find(objects, "NetworkPolicy", "dtem-serve-traces")["spec"]["egress"]
    assert f":{rule['ports'][0]['port']}/" in settings.trace_endpoint
    namespace = rule["to"][0]["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
    assert f".{namespace}:" in settings.trace_endpoint
