import asyncio
import time

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from ray.exceptions import TaskCancelledError
from starlette.types import Message, Receive, Scope, Send

from app.api.boundary import STARTED_AT
from deploy.ray.metrics import merge
from deploy.ray.middleware import BODY, ELAPSED, ReplicaMiddleware


async def gather_nothing() -> bytes:
    return b""


async def send_nowhere(message: Message) -> None:
    pass


async def never() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


def scope_of(path: str = "/classify") -> Scope:
    return {"type": "http", "path": path, "headers": []}


def test_cancellation_becomes_a_disconnect() -> None:
    seen: list[str] = []

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append((await receive())["body"])
        seen.append((await receive())["type"])
        # The application itself is not cancelled.
        await asyncio.sleep(0)
        seen.append((await receive())["type"])

    async def cancel() -> None:
        middleware = ReplicaMiddleware(application, "one", gather_nothing)
        task = asyncio.create_task(middleware({**scope_of(), BODY: b"image"}, never, send_nowhere))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert seen == [b"image", "http.disconnect", "http.disconnect"]


def test_dead_proxy_becomes_a_disconnect() -> None:
    seen: list[str] = []

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend([(await receive())["type"], (await receive())["type"]])

    async def fail() -> Message:
        raise TaskCancelledError

    asyncio.run(ReplicaMiddleware(application, "one", gather_nothing)(scope_of(), fail, send_nowhere))
    assert seen == ["http.disconnect", "http.disconnect"]


@pytest.mark.parametrize(("header", "seconds"), [(b"1.5", 1.5), (b"-3", 0), (b"x", 0), (b"nan", 0)])
def test_request_starts_when_it_reaches_the_proxy(header: bytes, seconds: float) -> None:
    found: list[float] = []

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        found.append(time.perf_counter() - scope[STARTED_AT])

    middleware = ReplicaMiddleware(application, "one", gather_nothing)
    asyncio.run(middleware({**scope_of(), "headers": [(ELAPSED, header)]}, never, send_nowhere))
    assert found == [pytest.approx(seconds, abs=0.1)]


@pytest.mark.parametrize(("status", "body"), [(200, b"all"), (401, b"one")])
def test_authorised_scrape_gets_the_metrics_of_all_replicas(status: int, body: bytes) -> None:
    answer: list[Message] = []

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"1000")]})
        await send({"type": "http.response.body", "body": b"one"})

    async def gather() -> bytes:
        return b"all"

    async def take(message: Message) -> None:
        answer.append(message)

    asyncio.run(ReplicaMiddleware(application, "two", gather)(scope_of("/metrics"), never, take))
    assert answer[1]["body"] == body
    assert (b"content-length", b"3") in answer[0]["headers"]
    assert len(answer[0]["headers"]) == 2


def test_merged_metrics_have_a_label_per_replica() -> None:
    expositions = {}
    for replica, n in (("a", 1), ("b", 2)):
        registry = CollectorRegistry()
        Counter("dtem_images", "Images", ["r"], registry=registry).labels("8").inc(n)
        Histogram("dtem_stage_seconds", "Time", buckets=(1.0,), registry=registry).observe(n)
        expositions[replica] = generate_latest(registry)
    lines = merge(expositions).decode().splitlines()
    assert lines.count("# TYPE dtem_images_total counter") == 1
    assert lines.count("# TYPE dtem_stage_seconds histogram") == 1
    assert 'dtem_images_total{r="8",replica="a"} 1.0' in lines
    assert 'dtem_images_total{r="8",replica="b"} 2.0' in lines
    assert 'dtem_stage_seconds_bucket{le="1.0",replica="a"} 1.0' in lines
    assert 'dtem_stage_seconds_sum{replica="b"} 2.0' in lines


def test_missing_proxy_middleware_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        pass

    middleware = ReplicaMiddleware(application, "one", gather_nothing)
    asyncio.run(middleware({**scope_of(), BODY: None}, never, send_nowhere))
    assert not caplog.records
    for _ in range(2):
        asyncio.run(middleware(scope_of(), never, send_nowhere))
    (record,) = caplog.records
    assert "ray.env" in record.message
