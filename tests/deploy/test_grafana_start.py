"""Grafana's entrypoint generates a password and a key on the first start only, and never prints them."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.deploy.queries import DEPLOY

START = DEPLOY / "grafana/start.sh"
SHELLS = [shell for shell in (["sh"], ["busybox", "sh"]) if shutil.which(shell[0])]
# Replaces /run.sh, which reads variables whose names end in __FILE.
STAND_IN = (
    'echo "started $# $1 ${GF_SECURITY_ADMIN_PASSWORD:-}"; cat "${GF_SECURITY_ADMIN_PASSWORD__FILE:-/dev/null}" >&2'
)


def start(shell: list[str], data: Path, **variables: str) -> tuple[str, str]:
    """Run the entrypoint. Returns its output, and the password that its command read."""
    environment = {"PATH": os.environ["PATH"], "GF_PATHS_DATA": str(data), **variables}
    command = [*shell, str(START), "sh", "-c", STAND_IN, "run.sh", "one"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
def test_first_start_generates_a_password_that_the_next_keeps(shell: list[str], tmp_path: Path) -> None:
    output, password = start(shell, tmp_path)
    file = tmp_path / "admin-password"
    assert file.read_text() == password
    assert len(password.strip()) == 32
    assert file.stat().st_mode & 0o777 == 0o600
    assert password.strip() not in output
    assert str(file) in output
    assert "started 1 one" in output
    assert start(shell, tmp_path) == (output, password)
    assert {path.name for path in tmp_path.iterdir()} == {"admin-password", "secret-key"}
    key = tmp_path / "secret-key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert len(key.read_text().strip()) == 32
    assert key.read_text() != password


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
def test_each_volume_has_its_own_password(shell: list[str], tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert start(shell, tmp_path / "a")[1] != start(shell, tmp_path / "b")[1]


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
def test_given_password_is_used_and_none_is_generated(shell: list[str], tmp_path: Path) -> None:
    key = {"GF_SECURITY_SECRET_KEY": "k"}
    assert start(shell, tmp_path, GF_SECURITY_ADMIN_PASSWORD="given", **key) == ("started 1 one given\n", "")
    (tmp_path / "mine").write_text("from a file")
    given = {"GF_SECURITY_ADMIN_PASSWORD__FILE": str(tmp_path / "mine"), "GF_SECURITY_ADMIN_PASSWORD": "", **key}
    assert start(shell, tmp_path, **given) == ("started 1 one \n", "from a file")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
def test_without_a_command_the_images_default_runs(shell: list[str], tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "GF_PATHS_DATA": str(tmp_path)}
    done = subprocess.run([*shell, str(START)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 127
    assert "/run.sh: not found" in done.stderr


def test_unwritable_volume_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        start(["sh"], tmp_path / "missing")
