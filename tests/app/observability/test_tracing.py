import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from app.observability import tracing
from app.observability.record import RequestRecord
from app.observability.tracing import Tracing, WatchedExporter, span_attributes, span_name
from tests.app.results import make_result

ROOT = Path(__file__).parents[3]


class ListExporter(SpanExporter):
    """Stores the spans; fails if `is_failing`."""

    def __init__(self, *_: object, **__: object) -> None:
        self.spans: list[ReadableSpan] = []
        self.is_failing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.spans += spans
        return SpanExportResult.FAILURE if self.is_failing else SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        pass


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[ListExporter]:
    exporter = ListExporter()
    monkeypatch.setattr(tracing, "OTLPSpanExporter", lambda *_, **__: exporter)
    levels = {name: logging.getLogger(name).level for name in ("opentelemetry", "urllib3")}
    yield exporter
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def scope(path: str = "/classify", *headers: tuple[bytes, bytes], method: str = "POST") -> dict[str, Any]:
    route = SimpleNamespace(path="/classify")
    return {"method": method, "path": path, "scheme": "http", "headers": list(headers), "route": route}


def record(exporter: ListExporter, ratio: float = 1.0, status: int = 200, **arguments: Any) -> list[ReadableSpan]:
    traces = Tracing("http://collector", ratio)
    record = arguments.pop("record", RequestRecord(request_id="abc"))
    request = arguments.pop("scope", scope())
    traces.record(request, record, status, record.started_at + 0.1)
    traces.close()
    return exporter.spans


def finished_record() -> RequestRecord:
    return RequestRecord(
        request_id="abc",
        started_at=100.0,
        model="vit",
        version="2",
        policy="dtem",
        r="16",
        decodes=[(100.01, 0.001), (100.02, 0.002)],
        results=[
            make_result(
                "dtem",
                16,
                batch_size=8,
                started_at=100.034,
                queue_seconds=0.004,
                inference_seconds=0.05,
                tokens=[197, 9],
                gmacs=1.0,
                gmacs_saved=1.0,
                is_degraded=degraded,
            )
            for degraded in (False, True)
        ],
    )


def test_request_becomes_a_span_with_a_timed_child_per_stage(exporter: ListExporter) -> None:
    *stages, server = record(exporter, record=finished_record())
    assert (server.name, server.parent) == ("POST /classify", None)
    assert server.start_time is not None
    assert server.end_time is not None
    assert server.end_time - server.start_time == pytest.approx(1e8, abs=1e3)
    assert server.start_time / 1e9 == pytest.approx(time.time() - time.perf_counter() + 100, abs=5)
    times = [((s.start_time or 0) - server.start_time, (s.end_time or 0) - (s.start_time or 0)) for s in stages]
    assert [s.name for s in stages] == ["decode", "decode", "queue", "inference"]
    assert [start / 1e6 for start, _ in times] == pytest.approx([10, 20, 30, 34], abs=0.01)
    assert [length / 1e6 for _, length in times] == pytest.approx([1, 2, 4, 50], abs=0.01)
    assert {s.parent.span_id for s in stages if s.parent} == {server.context.span_id if server.context else 0}


def test_span_attributes_describe_the_run() -> None:
    attributes = span_attributes(scope(), finished_record(), 200)
    assert attributes == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": "/classify",
        "url.path": "/classify",
        "url.scheme": "http",
        "dtem.request_id": "abc",
        "dtem.model": "vit",
        "dtem.version": "2",
        "dtem.policy": "dtem",
        "dtem.r": 16,
        "dtem.batch_size": 8,
        "dtem.images": 2,
        "dtem.degraded": True,
    }


def test_only_server_failures_set_the_error_status(exporter: ListExporter) -> None:
    refused = RequestRecord(refusals=["rate_not_exported"])
    failed = RequestRecord(refusals=["inference_failed"])
    assert record(exporter, status=422, record=refused)[-1].status.is_unset
    span = record(exporter, status=500, record=failed)[-1]
    assert not span.status.is_ok
    assert span.attributes is not None
    assert span.attributes["error.type"] == "inference_failed"


def test_span_is_named_by_route_and_known_methods() -> None:
    assert span_name(scope("/classify")) == "POST /classify"
    assert span_name({"method": "GET", "path": "/x"}) == "GET"
    assert span_name({"method": "BREW", "path": "/x"}) == "HTTP"


def test_trace_of_the_client_is_continued(exporter: ListExporter) -> None:
    parent = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    (span,) = record(exporter, scope=scope("/classify", (b"traceparent", parent), (b"tracestate", b"a=b")))
    assert span.context is not None
    assert f"{span.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"
    assert span.context.trace_state["a"] == "b"


@pytest.mark.parametrize("parent", [b"", b"x", b"00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-01", b"\xff" * 55])
def test_invalid_traceparent_starts_a_new_trace(exporter: ListExporter, parent: bytes) -> None:
    (span,) = record(exporter, scope=scope("/classify", (b"traceparent", parent)))
    assert span.parent is None


def test_client_decides_sampling_else_the_ratio(exporter: ListExporter) -> None:
    parent = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0"
    assert record(exporter, 0.0) == []
    assert record(exporter, 1.0, scope=scope("/classify", (b"traceparent", parent + b"0"))) == []
    assert len(record(exporter, 0.0, scope=scope("/classify", (b"traceparent", parent + b"1")))) == 1


@pytest.mark.parametrize("path", ["/health/live", "/v2/health/ready", "/metrics"])
def test_probes_and_scrapes_are_not_traced(exporter: ListExporter, path: str) -> None:
    assert record(exporter, scope=scope(path, method="GET")) == []


def test_export_failure_and_recovery_are_logged_once_each(
    exporter: ListExporter, caplog: pytest.LogCaptureFixture
) -> None:
    watched = WatchedExporter(exporter, "http://collector")
    for is_failing in (False, True, True, True, False, False, True):
        exporter.is_failing = is_failing
        watched.export([])
    messages = [record.getMessage() for record in caplog.records if record.name == "app.observability.tracing"]
    failing = "trace export failing, spans are lost: http://collector (reason at debug level)"
    assert messages == [failing, "trace export recovered: http://collector", failing]


def test_close_returns_in_time_if_the_collector_does_not_respond(
    exporter: ListExporter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    released = threading.Event()
    monkeypatch.setattr(exporter, "export", lambda spans: released.wait(60))
    monkeypatch.setattr(tracing, "CLOSE_SECONDS", 0.05)
    traces = Tracing("http://collector", 1.0)
    traces.record(scope(), RequestRecord(), 200, 1.0)
    started_at = time.monotonic()
    traces.close()
    assert time.monotonic() - started_at < 30
    assert "spans lost at shutdown: the collector did not respond in time" in caplog.text
    released.set()


def test_tracing_is_not_imported_without_an_endpoint() -> None:
    program = (
        "import sys; from prometheus_client import CollectorRegistry; from app.main import create_app;"
        "from app.observability.metrics import Metrics; from app.serving.service import Service;"
        "from app.settings import Settings;"
        "create_app(Service(Settings(), Metrics(CollectorRegistry()))); print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    names = set(done.stdout.split())
    assert not {name for name in names if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))}
    assert not {"requests", "google.protobuf", "app.observability.tracing"} & names
