import subprocess

import pytest

from deploy.local.compose import build_image


@pytest.fixture(scope="session")
def image() -> str:
    """Build the CPU image."""
    if subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        pytest.fail("needs a Docker engine; `.ci/containers` can start one")
    return build_image()
