import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client import CollectorRegistry
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from app.api.boundary import Boundary
from app.api.keys import Keys
from app.observability.metrics import Metrics
from app.store.catalogue import Catalogue
from tests.app.api.test_classify import PNG, SECONDS, Gate, assert_problem, gate_all
from tests.app.api.test_models import sample
from tests.app.conftest import ClientFactory, wait_until

PROBES = ("/health/live", "/health/ready")


def test_hanging_batch_is_neither_live_nor_ready_until_it_ends(
    make_client: ClientFactory, catalogue: Catalogue
) -> None:
    gate = Gate()
    client = make_client(gate_all(catalogue, gate), stall_seconds=0.2)
    with ThreadPoolExecutor(1) as pool:
        hung = pool.submit(client.post, "/classify", content=PNG)
        assert gate.started.wait(SECONDS)
        wait_until(lambda: client.get("/health/live").status_code == 503)
        for path in PROBES:
            assert_problem(client.get(path), 503, "engine_stalled")
        assert sample(client, "dtem_ready") == 0
        refused = client.post("/classify", content=PNG)
        assert int(refused.headers["retry-after"]) >= 1
        assert_problem(refused, 503, "engine_stalled")
        # The pending request is answered, not left hanging.
        assert_problem(hung.result(SECONDS), 503, "engine_stalled")
        gate.opened.set()
    wait_until(lambda: client.get("/health/live").status_code == 200)
    assert client.get("/health/ready").status_code == 200


def test_engine_with_a_dead_worker_is_neither_live_nor_ready(make_client: ClientFactory, catalogue: Catalogue) -> None:
    gate = Gate()
    gate.opened.set()
    gate.error = SystemExit()
    client = make_client(gate_all(catalogue, gate))
    assert_problem(client.post("/classify", content=PNG), 500, "inference_failed")
    wait_until(lambda: client.get("/health/live").status_code == 503)
    for path in PROBES:
        assert_problem(client.get(path), 503, "engine_stalled")
    assert_problem(client.post("/classify", content=PNG), 503, "engine_stalled")


def test_stopped_engine_is_neither_live_nor_ready(client: TestClient) -> None:
    assert [client.get(path).status_code for path in PROBES] == [200, 200]
    client.service.engine.stop(SECONDS)  # type: ignore[attr-defined]
    for path in PROBES:
        assert_problem(client.get(path), 503, "engine_stalled")


def test_loading_service_is_live_but_not_ready(make_client: ClientFactory) -> None:
    client = make_client(None)
    assert client.get("/health/live").json() == {"status": "alive"}
    assert_problem(client.get("/health/ready"), 503, "not_ready")


@pytest.mark.parametrize("path", PROBES)
def test_health_documents_its_503(client: TestClient, path: str) -> None:
    documented = client.get("/openapi.json").json()["paths"][path]["get"]["responses"]
    assert "application/problem+json" in documented["503"]["content"]


def test_aborted_request_gets_a_response() -> None:
    sent: list[Message] = []
    begun = threading.Event()

    async def hang(scope: Scope, receive: Receive, send: Send) -> None:
        begun.set()
        await asyncio.sleep(1e6)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    async def cut_off() -> None:
        boundary = Boundary(hang, Metrics(CollectorRegistry()), Keys([]), None, [])
        task = asyncio.ensure_future(
            boundary({"type": "http", "method": "GET", "path": "/", "headers": []}, receive, send)
        )
        while not begun.is_set():
            await asyncio.sleep(0)
        task.cancel()
        await task

    asyncio.run(cut_off())
    assert sent[0]["status"] == 503
    assert b"shutting_down" in sent[1]["body"]
