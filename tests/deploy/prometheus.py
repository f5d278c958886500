"""A real Prometheus with our rules and jobs, on local ports."""

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from deploy.local.process import find_free_port
from tests.deploy.queries import DEPLOY

START_SECONDS = 30.0


@contextmanager
def run_prometheus(folder: Path, service_port: int, gpu_port: int | None = None) -> Iterator[str]:
    """Run Debian's Prometheus (apt-get install prometheus) with a scrape interval of 1 s. Yields its URL."""
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{service_port}"]
    shutil.copytree(DEPLOY / "prometheus", folder)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    # docker-compose.gpu.yml mounts one file over the other.
    if gpu_port is not None:
        given = (folder / "gpu-targets-dcgm.yml").read_text()
        (folder / "gpu-targets.yml").write_text(given.replace("dcgm-exporter:9400", f"127.0.0.1:{gpu_port}"))
    port = find_free_port()
    command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    try:
        _wait_until_ready(f"http://127.0.0.1:{port}", folder / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def get(prometheus_url: str, path: str) -> Any:
    """Call the API. Returns the data."""
    with urllib.request.urlopen(f"{prometheus_url}/api/v1/{path}", timeout=10) as answer:
        return json.load(answer)["data"]


def _wait_until_ready(url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{url}/-/ready", timeout=5).close()
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
        else:
            return
    raise TimeoutError(f"Prometheus did not become ready:\n{log.read_text()}")
