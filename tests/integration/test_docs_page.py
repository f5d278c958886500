"""The documentation page in a browser without network access."""

import http.server
import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.server import Server

SECONDS = 60
PREFIX = "/vision"
CHROMIUM = [
    "chromium",
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--enable-logging=stderr",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--virtual-time-budget=10000",
    "--dump-dom",
]
pytestmark = pytest.mark.browser


class Visit:
    """One visit of a page: its document, the errors in its console, and the addresses that it requested."""

    def __init__(self, folder: Path, url: str) -> None:
        log = folder / "net.json"
        command = [*CHROMIUM, f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", url]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS)
        self.document = done.stdout
        # Swagger UI warns of its own plans when it unfolds an operation.
        self.errors = [line for line in done.stderr.splitlines() if ":CONSOLE" in line and "Deprecated:" not in line]
        # The browser's own requests have no initiator.
        origin = "/".join(url.split("/")[:3])
        events = json.loads(log.read_text(encoding="utf-8"))["events"]
        started = [event["params"] for event in events if "initiator" in event.get("params", {})]
        self.requested = {params["url"] for params in started if params["initiator"] == origin}


@pytest.fixture(scope="module")
def server(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(store, tmp_path_factory.mktemp("log") / "log", api_keys="secret") as server:
        yield server


@pytest.mark.parametrize("fragment", ["", "#/default/classify_classify_post"])
def test_page_needs_no_other_origin_and_keeps_the_content_policy(server: Server, tmp_path: Path, fragment: str) -> None:
    visit = Visit(tmp_path, f"http://127.0.0.1:{server.port}/docs{fragment}")
    assert 'data-path="/classify"' in visit.document
    # An unfolded operation has its parameters.
    assert ('data-param-name="max_gmacs"' in visit.document) == bool(fragment)
    assert "Authorize" in visit.document
    assert visit.errors == []
    paths = ["docs/start.js", "docs/swagger-ui-bundle.js", "docs/swagger-ui.css", "openapi.json"]
    assert visit.requested >= {f"http://127.0.0.1:{server.port}/{path}" for path in paths}
    assert all(url.startswith(f"http://127.0.0.1:{server.port}/") for url in visit.requested), visit.requested


@pytest.fixture
def proxy_port(server: Server) -> Iterator[int]:
    """A proxy that strips its prefix, as an ingress does."""

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            reply = server.request("GET", self.path.removeprefix(PREFIX) if self.path.startswith(PREFIX) else "/none")
            self.send_response_only(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(reply.body)

        def log_message(self, *_: object) -> None:
            """Write nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        thread = threading.Thread(target=proxy.serve_forever)
        thread.start()
        yield proxy.server_port
        proxy.shutdown()
        thread.join()


def test_page_works_behind_the_prefix_of_a_proxy(proxy_port: int, tmp_path: Path) -> None:
    visit = Visit(tmp_path, f"http://127.0.0.1:{proxy_port}{PREFIX}/docs")
    assert 'data-path="/classify"' in visit.document
    # "Try it out" sends its requests there.
    assert f'<option value="{PREFIX}">' in visit.document
    assert visit.errors == []
