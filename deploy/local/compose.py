"""The Compose stack as a separate project on free ports. Leaving it removes it and its volumes."""

from __future__ import annotations

import http.client
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Self

import app
from deploy.local.process import ROOT, LaunchError, find_free_port, read_resident_bytes

# Another tag than that of an operator's stack on this machine.
IMAGE = "dtem-serve:measured"
PORTS = {"api": "API_PORT", "prometheus": "PROMETHEUS_PORT", "grafana": "GRAFANA_PORT"}
START_SECONDS = 120.0
COMMAND_SECONDS = 600.0
POLL_SECONDS = 0.1


class DockerError(LaunchError):
    """A Docker command failed. The message has its output."""


def docker(*arguments: str) -> str:
    """Run a Docker command. Returns its output.

    Raises: DockerError.
    """
    return _run(["docker", *arguments])


def _run(command: Sequence[str], environment: dict[str, str] | None = None, folder: Path = ROOT) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
        check=False,
    )
    if done.returncode:
        raise DockerError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}".strip())
    return done.stdout.strip()


def build_image() -> str:
    """Build the CPU image, with its version as deploy/README.md passes it."""
    # The host's network reaches the package index.
    version = f"VERSION={app.__version__}"
    docker("build", "--network", "host", "--target", "cpu", "--build-arg", version, "--tag", IMAGE, ".")
    return IMAGE


@cache
def compose_command() -> tuple[str, ...]:
    """Return the Compose command of this machine: Docker's plugin, or else `docker-compose`."""
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
    return ("docker", "compose") if plugin.returncode == 0 else ("docker-compose",)


class ComposeStack:
    """Services of docker-compose.yml and override files, from the image that `build_image` made.

    variables: of the Compose files, besides the ports and the image.
    """

    def __init__(
        self, project: str, services: Sequence[str], files: Sequence[str] = (), folder: Path = ROOT, **variables: object
    ) -> None:
        self._services, self._folder = services, folder
        named = [part for file in ("docker-compose.yml", *files) for part in ("--file", file)]
        # This file sets no Compose variable. It replaces the operator's .env.
        isolated = ["--env-file", "deploy/settings.env", "--project-name", project]
        self._command = [*compose_command(), *isolated, *named]
        self.ports = {service: find_free_port() for service in PORTS}
        chosen = {PORTS[service]: port for service, port in self.ports.items()} | {"API_IMAGE": IMAGE} | variables
        self._environment = os.environ | {name: str(value) for name, value in chosen.items()}
        # Counted from the start of `up`.
        self.ready_seconds = self.healthy_seconds = 0.0

    def __enter__(self) -> Self:
        """Raises: LaunchError with the logs if a service does not become healthy."""
        started_at = time.monotonic()
        try:
            self.compose("up", "--detach", "--no-build", *self._services)
            self.wait_until("api", self.is_ready)
            self.ready_seconds = time.monotonic() - started_at
            for service in PORTS.keys() & set(self._services):
                self.wait_until_healthy(service)
        except BaseException:
            self.__exit__()
            raise
        self.healthy_seconds = time.monotonic() - started_at
        return self

    def __exit__(self, *_: object) -> None:
        self.compose("down", "--volumes", "--remove-orphans", "--timeout", "5")

    def compose(self, *arguments: str) -> str:
        return _run([*self._command, *arguments], self._environment, self._folder)

    def container(self, service: str) -> str:
        return self.compose("ps", "--quiet", service)

    def inspect(self, service: str, template: str) -> str:
        return docker("inspect", "--format", template, self.container(service))

    def execute(self, service: str, *command: str) -> str:
        """Run a command in the container of a service, as its user. Returns the output."""
        return docker("exec", self.container(service), *command)

    def logs(self, service: str) -> str:
        return self.compose("logs", "--no-color", service)

    def wait_until_healthy(self, service: str) -> None:
        """Wait for Docker's health check. Raises: LaunchError with the log."""
        self.wait_until(service, lambda: self.inspect(service, "{{.State.Health.Status}}") == "healthy")

    def wait_until(self, service: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                logs = self.logs(service)
                raise LaunchError(f"{service} was not ready or healthy after {START_SECONDS:g} s:\n{logs}")
            time.sleep(POLL_SECONDS)

    def is_ready(self) -> bool:
        try:
            return self.ask("api", "GET", "/health/ready")[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def ask(
        self, service: str, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Send one request to the published port of a service. Returns status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.ports[service], timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def resident_bytes(self, service: str) -> int:
        """Return the resident memory of the service's process."""
        return read_resident_bytes(int(self.inspect(service, "{{.State.Pid}}")))
