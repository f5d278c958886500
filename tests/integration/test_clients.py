"""Clients and proxies that others wrote: no request is lost, whether it is answered or refused.

A refusal comes before the body's end, and most of these clients read nothing until they have sent all of it.
"""

import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from string import Template

import pytest

from deploy.local.process import find_free_port
from tests.integration.server import Address

HERE = Path(__file__).parent / "clients"
N_REQUESTS, N_LARGE = 200, 20
# Below the server's limit, and more than a socket buffers.
LARGE_BYTES = 900_000
# Name: template, value of ${buffering}, command.
PROXIES: dict[str, tuple[str, str, Callable[[Path], list[str]]]] = {
    "nginx": ("nginx.conf", "off", lambda file: ["nginx", "-c", str(file)]),
    "nginx, buffering": ("nginx.conf", "on", lambda file: ["nginx", "-c", str(file)]),
    "haproxy": ("haproxy.cfg", "", lambda file: ["haproxy", "-db", "-f", str(file)]),
}
pytestmark = [pytest.mark.container, pytest.mark.slow]

Command = Callable[[str, Path, int], list[str]]


def curl(url: str, file: Path, n: int) -> list[str]:
    one = ["--http2", "-sS", "-o", "/dev/null", "-w", "%{http_code}\n", "--data-binary", f"@{file}", url]
    return ["curl", *one, *(part for _ in range(n - 1) for part in ("--next", *one))]


CLIENTS: dict[str, Command] = {
    "jdk": lambda url, file, n: ["java", str(HERE / "Jdk.java"), url, str(file), str(n)],
    "curl": curl,
    "undici": lambda url, file, n: ["node", str(HERE / "undici.mjs"), url, str(file), str(n)],
    "aiohttp": lambda url, file, n: [sys.executable, str(HERE / "aiohttp_client.py"), url, str(file), str(n)],
    "urllib": lambda url, file, n: [sys.executable, str(HERE / "urllib_client.py"), url, str(file), str(n)],
}


@contextmanager
def proxy(name: str, upstream: int, folder: Path) -> Iterator[int]:
    """Run a proxy in front of a port; yield its own port."""
    template, buffering, command = PROXIES[name]
    port = find_free_port()
    filled = Template((HERE / template).read_text()).substitute(
        port=port, upstream=upstream, folder=folder, buffering=buffering
    )
    (folder / template).write_text(filled)
    with (folder / "proxy.log").open("wb") as log:
        process = subprocess.Popen(command(folder / template), stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 10
        while not is_open(port):
            is_starting = time.monotonic() < deadline and process.poll() is None
            assert is_starting, (folder / "proxy.log").read_text()
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait(10)


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(params=["direct", *PROXIES])
def port(request: pytest.FixtureRequest, server: Address, tmp_path: Path) -> Iterator[int]:
    route: str = request.param
    if route == "direct":
        yield server.port
        return
    with proxy(route, server.port, tmp_path) as port:
        yield port


def statuses(client: str, port: int, path: str, file: Path, n: int) -> Counter[str]:
    command = CLIENTS[client](f"http://127.0.0.1:{port}{path}", file, n)
    found = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0 or client == "curl", found.stderr
    return Counter(found.stdout.split("\n")[:-1])


@pytest.mark.parametrize("client", CLIENTS)
def test_no_request_is_lost(port: int, client: str, image: Path) -> None:
    assert statuses(client, port, "/classify?r=8", image, N_REQUESTS) == {"200": N_REQUESTS}


@pytest.mark.parametrize("client", ["urllib", "jdk"])
def test_no_refusal_is_lost(port: int, client: str, large: Path) -> None:
    assert statuses(client, port, "/classify?r=3", large, N_LARGE) == {"422": N_LARGE}


@pytest.mark.parametrize("server", ["ray"], indirect=True)
@pytest.mark.parametrize("client", CLIENTS)
def test_no_request_is_lost_on_ray(server: Address, client: str, image: Path, large: Path) -> None:
    assert statuses(client, server.port, "/classify?r=8", image, N_REQUESTS) == {"200": N_REQUESTS}
    assert statuses(client, server.port, "/classify?r=3", large, N_LARGE) == {"422": N_LARGE}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("image") / "image.png"
    shutil.copy(next(Path("examples").glob("*.png")), file)
    return file


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("large") / "large.bin"
    file.write_bytes(bytes(LARGE_BYTES))
    return file
