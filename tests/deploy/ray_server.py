"""The service on a Ray cluster, with the interface of `tests.integration.server.Server`."""

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from deploy.local.process import environment, find_free_port, read_resident_bytes
from tests.app.store.test_watcher import publish
from tests.deploy.manifests import read_settings_file
from tests.integration.server import ROOT, Address, wait_until

DRIVER_SECONDS = 120.0
STOP_SECONDS = 20.0
# In the environment of every process of the cluster.
MARK = "RAY_OF_TEST"


class RayServer(Address):
    """A cluster of two nodes. Leaving the block ends all its processes and removes its files."""

    def __init__(self, model_store: Path, **settings: object) -> None:
        # Paths of sockets must be short.
        self._temp_dir = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
        self._mark = secrets.token_hex(8)
        self.port, self.model_store = find_free_port(), model_store
        variables = {f"DTEM_{name.upper()}": str(value) for name, value in settings.items()}
        self._settings = {"DTEM_MODEL_STORE": str(model_store), **variables}
        self._errors = (self._temp_dir / "driver.log").open("wb")
        self._driver = subprocess.Popen(
            [sys.executable, "-m", "tests.deploy.ray_cluster", str(self.port)],
            cwd=ROOT,
            env=environment() | self._variables(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )

    def _variables(self) -> dict[str, str]:
        return {
            **read_settings_file((ROOT / "deploy" / "ray" / "ray.env").read_text(encoding="utf-8")),
            MARK: self._mark,
            "PYTHONPATH": str(ROOT),
            # The nodes share a machine, so they need two ports.
            "RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(find_free_port()),
            "RAY_TMPDIR": str(self._temp_dir),
        }

    def __enter__(self) -> Self:
        try:
            self._wait_for_done()
            self.deploy()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired, BrokenPipeError):
            self._driver.communicate(timeout=STOP_SECONDS)
        for pid in self.pids(""):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._driver.wait(STOP_SECONDS)
        self._errors.close()
        shutil.rmtree(self._temp_dir, ignore_errors=True)

    def deploy(self, min_replicas: int = 2, max_replicas: int = 2, **scaling: object) -> None:
        """Deploy, or change the deployment in place, and wait until the replicas serve."""
        bounds = {"min_replicas": min_replicas, "max_replicas": max_replicas}
        self.tell("deploy " + json.dumps({"settings": self._settings, "autoscaling": scaling, **bounds}))

    @contextlib.contextmanager
    def published(self, name: str = "tiny", version: str = "2") -> Iterator[None]:
        """Publish another version, served by all replicas until the block is left."""
        folder = publish(self.model_store, name, version)
        shown = f'dtem_model_info{{.*model="{name}".*version="{version}"}}'
        wait_until(lambda: len(self.series(shown)) == len(self.replica_pids()))
        yield
        shutil.rmtree(folder)
        wait_until(lambda: not self.series(shown))

    def tell(self, command: str) -> None:
        """Send a command to the driver, and wait until it is done."""
        assert self._driver.stdin is not None
        self._driver.stdin.write(f"{command}\n".encode())
        self._driver.stdin.flush()
        self._wait_for_done()

    def _wait_for_done(self) -> None:
        assert self._driver.stdout is not None
        deadline, text = time.monotonic() + DRIVER_SECONDS, b""
        while b"done\n" not in text:
            left = max(0.0, deadline - time.monotonic())
            readable, _, _ = select.select([self._driver.stdout], [], [], left)
            chunk = os.read(self._driver.stdout.fileno(), 4096) if readable else b""
            assert chunk, f"the driver failed:\n{(self._temp_dir / 'driver.log').read_text(encoding='utf-8')}"
            text += chunk

    def pids(self, title: str) -> list[int]:
        """Return the processes of this cluster whose title has this prefix."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                is_ours = f"{MARK}={self._mark}".encode() in (folder / "environ").read_bytes()
                if is_ours and (folder / "cmdline").read_bytes().startswith(title.encode()):
                    found.append(int(folder.name))
        return found

    def replica_pids(self) -> list[int]:
        return self.pids("ray::ServeReplica")

    def is_on_head(self, pid: int) -> bool:
        """Tell whether the parent of the process is the raylet of the head node."""
        parent = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1]
        return b"--head" in Path(f"/proc/{parent}/cmdline").read_bytes()

    @property
    def log(self) -> str:
        """The log of all replicas."""
        files = sorted(self._temp_dir.glob("ray/session_2*/logs/worker-*.err"))
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
        return "".join(text for text in texts if ":actor_name:ServeReplica" in text)

    @property
    def resident_bytes(self) -> int:
        return sum(map(read_resident_bytes, self.replica_pids()))
