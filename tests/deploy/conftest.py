import subprocess

import pytest

import app
from benchmarks.composed import IMAGE, docker


@pytest.fixture(scope="session")
def image() -> str:
    """Build the CPU image, with its version as deploy/README.md passes it."""
    if subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        pytest.fail("needs a Docker engine; `.ci/containers` can start one")
    # The host's network reaches the package index.
    version = f"VERSION={app.__version__}"
    docker("build", "--network", "host", "--target", "cpu", "--build-arg", version, "--tag", IMAGE, ".")
    return IMAGE
