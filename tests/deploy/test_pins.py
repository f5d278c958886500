"""Every file that names an image pins it."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
BASE = "python:3.11-slim-bookworm"
PINNED = re.compile(r"\$\{API_IMAGE:-dtem-serve:(cpu|gpu)\}|[\w./-]+:v?\d+\.\d+[\w.-]*")


def test_dockerfile_pins_its_base_once() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert f"ARG PYTHON={BASE}\n" in text
    stages = re.findall(r"^FROM (\S+)(?: AS (\S+))?$", text, re.MULTILINE)
    assert {origin for origin, _ in stages} <= {"${PYTHON}", *(name for _, name in stages)}


def test_compose_files_pin_every_image() -> None:
    for name in ("docker-compose.yml", "docker-compose.gpu.yml"):
        images = re.findall(r"image: (\S+)", (ROOT / name).read_text())
        assert images
        assert all(PINNED.fullmatch(image) for image in images), images


def test_container_tests_use_the_pinned_images() -> None:
    script = (ROOT / ".ci/containers").read_text()
    (prometheus,) = re.findall(r"image: (prom/\S+)", (ROOT / "docker-compose.yml").read_text())
    assert set(re.findall(r"\b(?:python|prom/prometheus):[\w.-]+", script)) == {BASE, prometheus}
