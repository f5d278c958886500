"""The image: its contents, metadata, permissions, start-up errors and health check."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import app
from deploy.local.compose import DockerError, docker
from tests.app.certificates import make_certificate
from tests.integration.server import wait_until

pytestmark = pytest.mark.container
BASE = "python:3.11-slim-bookworm"
MAX_OWN_BYTES = 350_000_000
CONFINED = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")


def inspect(image: str) -> dict[str, Any]:
    (described,) = json.loads(docker("image", "inspect", image))
    return dict(described)


def run_in(image: str, *command: str) -> str:
    return docker("run", "--rm", *CONFINED, "--entrypoint", command[0], image, *command[1:])


def test_image_adds_at_most_350_mb(image: str) -> None:
    assert inspect(image)["Size"] - inspect(BASE)["Size"] <= MAX_OWN_BYTES


def test_image_has_its_version_and_runs_as_an_unprivileged_user(image: str) -> None:
    config = inspect(image)["Config"]
    assert config["User"] == "10001:10001"
    assert config["StopSignal"] == "SIGTERM"
    assert config["Healthcheck"]["Test"] == ["CMD", "python", "/app/healthcheck.py"]
    assert config["Labels"]["org.opencontainers.image.title"] == "dtem-serve"
    assert config["Labels"]["org.opencontainers.image.version"] == app.__version__


def test_image_contains_no_torch_no_compiler_and_no_training_code(image: str) -> None:
    listing = run_in(image, "sh", "-c", "ls /app /opt/venv/lib/python3*/site-packages; command -v gcc cc g++ || true")
    words = set(listing.split())
    assert {"app", "model_store", "healthcheck.py", "onnxruntime"} <= words
    assert not words & {"torch", "timm", "torchvision", "training", "tests", "pip"}
    assert not re.search(r"/(gcc|cc|g\+\+)$", listing, re.MULTILINE)


def test_image_is_readable_and_not_writable_by_its_user(image: str) -> None:
    """Uses a writable root file system; on a read-only one, `find -writable` finds nothing anyway."""
    find = ("run", "--rm", "--entrypoint", "find", image, "/app", "/opt/venv", "-not", "-type", "l")
    assert docker(*find, "-writable") == ""
    assert docker(*find, "-not", "-readable") == ""
    assert len(docker(*find).splitlines()) > 1000


@pytest.mark.parametrize(
    ("setting", "reason"),
    [("DTEM_DEVICE=cuda", "CUDAExecutionProvider"), ("DTEM_PORTS=1", "no such setting"), ("DTEM_MODEL_STORE=/x", "/x")],
)
def test_failed_start_prints_its_reason(image: str, setting: str, reason: str) -> None:
    with pytest.raises(DockerError, match="cannot start") as caught:
        docker("run", "--rm", *CONFINED, "--env", setting, image)
    assert reason in str(caught.value)


@pytest.mark.parametrize("is_tls", [False, True])
def test_healthcheck_follows_the_settings(image: str, tmp_path: Path, is_tls: bool) -> None:
    settings = ["--env", "DTEM_PORT=9000", "--env", "DTEM_API_KEYS=secret"]
    if is_tls:
        certificate, key = make_certificate(tmp_path)
        key.chmod(0o444)
        tmp_path.chmod(0o755)
        settings += ["--volume", f"{tmp_path}:/tls:ro"]
        settings += ["--env", f"DTEM_TLS_CERTIFICATE=/tls/{certificate.name}", "--env", f"DTEM_TLS_KEY=/tls/{key.name}"]
    container = docker("run", "--detach", *CONFINED, *settings, image)
    try:
        wait_until(lambda: docker("inspect", "--format", "{{.State.Health.Status}}", container) == "healthy")
        docker("exec", container, "python", "/app/healthcheck.py")
        with pytest.raises(DockerError, match="ended with 1"):
            docker("exec", "--env", "DTEM_PORT=9001", container, "python", "/app/healthcheck.py")
    finally:
        docker("rm", "--force", container)
