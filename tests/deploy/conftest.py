import subprocess

import pytest

from benchmarks.composed import build_image


@pytest.fixture(scope="session")
def image() -> str:
    """Build the image for the CPU."""
    if subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        pytest.fail("needs a Docker engine: `.ci/containers` starts one where it can")
    return build_image()
