"""Manifests: the objects in deploy/kubernetes, as written and as kustomize renders them."""

import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
KUSTOMIZATION = "kustomization.yaml"

# As sent to the API server.
Object = dict[str, Any]


def read_objects(text: str) -> list[Object]:
    return [item for item in yaml.safe_load_all(text) if item]


def read_file(path: str) -> Object:
    """Read a file with one object. path: relative to deploy/kubernetes."""
    (item,) = read_objects((FOLDER / path).read_text(encoding="utf-8"))
    return item


def list_whole_files() -> list[str]:
    """List the files with complete objects, not patches: all kustomizations' resources, and manual manifests."""
    folders = [path.parent for path in sorted(FOLDER.rglob(KUSTOMIZATION))]
    listed = [folder / name for folder in folders for name in read_kustomization(folder).get("resources", [])]
    manual = [FOLDER / "components/model-store/publisher.yaml"]
    return [str(path.relative_to(FOLDER)) for path in [*listed, *manual] if path.is_file()]


def read_kustomization(folder: Path) -> Object:
    (item,) = read_objects((folder / KUSTOMIZATION).read_text(encoding="utf-8"))
    return item


def render(folder: Path) -> list[Object]:
    """Run kubectl's kustomize."""
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Deprecation warnings.
    assert not done.stderr, done.stderr
    return read_objects(done.stdout)


def find(objects: Iterable[Object], kind: str, name: str = "dtem-serve") -> Object:
    """Return the only object of a kind. Generated names end in a digest."""
    (item,) = (o for o in objects if o["kind"] == kind and o["metadata"]["name"].startswith(name))
    return item


def container(deployment: Object) -> Object:
    (only,) = deployment["spec"]["template"]["spec"]["containers"]
    assert isinstance(only, dict)
    return only


def read_settings_file(text: str) -> dict[str, str]:
    """Parse a file of NAME=value lines, such as kustomize's `envs`."""
    lines = (line for line in text.splitlines() if line.strip() and not line.startswith("#"))
    return dict(line.split("=", 1) for line in lines)
