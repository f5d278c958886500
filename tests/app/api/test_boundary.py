import asyncio
import json
import logging
import re
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.types import Message, Receive, Scope, Send

from app.api.boundary import Boundary
from app.api.headers import server_headers, with_headers
from app.api.keys import Keys
from app.errors import InferenceFailed
from app.observability.logs import FIELDS, REQUEST_ID
from app.observability.metrics import Metrics
from tests.app.conftest import ClientFactory
from tests.app.odd_images import encode, make_photo

PNG = encode(make_photo(8, 8), "PNG")
PATHS = ["/classify", "/models", "/health/live", "/metrics", "/openapi.json", "/docs", "/nothing"]


def log_fields(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [getattr(record, FIELDS) for record in caplog.records if record.name == "app.api.boundary"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS", "DELETE"])
def test_every_response_has_the_security_headers(make_client: ClientFactory, method: str, path: str) -> None:
    headers = make_client().request(method, path, headers={"Origin": "https://evil.example"}).headers
    assert headers["cache-control"] == "no-store"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert len(headers.get_list("x-request-id")) == 1
    assert not [name for name in headers if name.startswith("access-control-")]


@pytest.mark.parametrize("path", ["/classify", "/models"])
def test_preflight_is_refused(make_client: ClientFactory, path: str) -> None:
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    assert make_client().options(path, headers=headers).status_code == 405


@pytest.mark.parametrize("path", ["/docs", "/docs/start.js", "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css"])
def test_docs_need_no_key_and_no_other_origin(make_client: ClientFactory, path: str) -> None:
    response = make_client(api_keys="secret").get(path)
    assert response.status_code == 200
    # Except in the sources of Swagger UI, which has links.
    assert path.startswith("/docs/swagger") or "://" not in response.text
    if path == "/docs":
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; img-src data:;")
        assert not re.search(r"<script>|<style| style=| on\w+=|<script[^>]*>[^<]", response.text)


def test_content_policy_of_a_response_is_kept() -> None:
    own = (b"content-security-policy", b"default-src 'self'")
    headers = with_headers({"type": "http.response.start", "status": 200, "headers": [own]}, "id")["headers"]
    assert [value for name, value in headers if name == own[0]] == [own[1]]


def test_hsts_is_sent_only_with_tls() -> None:
    assert "Strict-Transport-Security" in dict(server_headers(is_tls=True))
    assert "Strict-Transport-Security" not in dict(server_headers(is_tls=False))


def test_request_id_is_in_header_and_problem(make_client: ClientFactory, caplog: pytest.LogCaptureFixture) -> None:
    client = make_client()
    response = client.post("/classify", content=b"text", headers={"X-Request-ID": "abc-1"})
    assert response.headers["x-request-id"] == "abc-1"
    assert response.json()["request_id"] == "abc-1"
    assert client.post("/classify", content=b"text").json()["request_id"] not in ("", "abc-1")


def test_shared_error_is_rendered_with_the_id_of_each_request() -> None:
    error = InferenceFailed()

    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        raise error

    assert [answer(fail, b"one")["request_id"], answer(fail, b"two")["request_id"]] == ["one", "two"]
    assert error.members == {}


def answer(app: Any, request_id: bytes) -> dict[str, Any]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {"type": "http", "method": "POST", "path": "/classify", "headers": [(b"x-request-id", request_id)]}
    asyncio.run(Boundary(app, Metrics(CollectorRegistry()), Keys([]), None, [])(scope, receive, send))
    document: dict[str, Any] = json.loads(sent[1]["body"])
    return document


def test_log_of_an_unexpected_error_has_the_request_id(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str | None] = []

    class Watcher(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            seen.append(REQUEST_ID.get())
            return True

    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        raise KeyError("secret")

    watcher = Watcher()
    logging.getLogger("app.api.boundary").addFilter(watcher)
    try:
        assert answer(fail, b"abc")["code"] == "internal_error"
    finally:
        logging.getLogger("app.api.boundary").removeFilter(watcher)
    assert "abc" in seen


def test_classify_logs_what_ran_and_its_timings(make_client: ClientFactory, caplog: pytest.LogCaptureFixture) -> None:
    client = make_client()
    with caplog.at_level(logging.INFO):
        client.post("/classify?r=8", content=PNG)
    (line,) = log_fields(caplog)
    stages = {name: line.pop(name) for name in list(line) if name.endswith("_ms")}
    assert line == {
        "method": "POST",
        "path": "/classify",
        "status": 200,
        "model": "tiny",
        "version": "1",
        "policy": "tome",
        "r": 8,
        "batch_size": 1,
        "images": 1,
        "degraded": False,
    }
    assert set(stages) == {"decode_ms", "queue_ms", "inference_ms", "total_ms", "duration_ms"}
    assert stages["duration_ms"] >= stages["total_ms"] >= stages["inference_ms"] > 0


def test_refused_request_logs_the_error_code(make_client: ClientFactory, caplog: pytest.LogCaptureFixture) -> None:
    client = make_client()
    with caplog.at_level(logging.INFO):
        client.post("/classify?r=3", content=PNG)
    (line,) = log_fields(caplog)
    assert (line["status"], line["refusals"]) == (422, ["rate_not_exported"])
    assert "model" not in line


def test_other_paths_are_logged_at_debug_level(make_client: ClientFactory, caplog: pytest.LogCaptureFixture) -> None:
    client = make_client()
    with caplog.at_level(logging.INFO):
        client.get("/models")
    assert log_fields(caplog) == []
    with caplog.at_level(logging.DEBUG):
        client.get("/" + "x" * 1000)
    (line,) = log_fields(caplog)
    assert line["status"] == 404
    assert len(line["path"]) < 200


def test_refused_key_is_logged_without_the_key(make_client: ClientFactory, caplog: pytest.LogCaptureFixture) -> None:
    client = make_client(api_keys="hunter2")
    with caplog.at_level(logging.INFO):
        client.get("/models", headers={"X-API-Key": "hunter3"})
    (line,) = log_fields(caplog)
    assert (line["path"], line["status"], line["refusals"]) == ("/models", 401, ["unauthorized"])
    assert "hunter" not in caplog.text + str(line)
