import json
import re
import socket
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.app.odd_images import encode, make_photo
from tests.integration.collector import Collector, attributes
from tests.integration.server import Server

PNG = encode(make_photo(8, 8), "PNG")
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
NS_PER_SECOND = 1e9


@pytest.fixture(autouse=True)
def _bypass_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


def test_request_is_a_span_with_its_stages_as_children(store: Path, tmp_path: Path, collector: Collector) -> None:
    with Server(store, tmp_path / "log", trace_endpoint=collector.endpoint) as server:
        began = time.time_ns()
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-ID": "abc-1"}
        assert server.ask("POST", "/classify?r=8", PNG, headers)[0] == 200
        ended = time.time_ns()
        assert server.ask("POST", "/classify?r=3", PNG)[0] == 422
        assert server.ask("GET", "/models/tiny")[0] == 200
        assert server.ask("GET", "/health/ready")[0] == 200
        # The shutdown exports the pending spans.
        assert server.stop() == 0

    assert collector.services == {"dtem-serve"}
    assert sorted(span.name for span in collector.spans if span.kind == Span.SPAN_KIND_SERVER) == [
        "GET /models/{name}",
        "POST /classify",
        "POST /classify",
    ]
    good, refused = sorted(collector.find("POST /classify"), key=lambda span: span.start_time_unix_nano)
    assert (good.trace_id.hex(), good.parent_span_id.hex()) == (TRACE, PARENT)
    assert (
        attributes(good).items()
        >= {
            "http.request.method": "POST",
            "http.response.status_code": 200,
            "url.path": "/classify",
            "dtem.request_id": "abc-1",
            "dtem.model": "tiny",
            "dtem.policy": "tome",
            "dtem.r": 8,
            "dtem.images": 1,
            "dtem.batch_size": 1,
            "dtem.degraded": False,
        }.items()
    )
    assert_stages_inside(collector, good)
    assert (
        began - NS_PER_SECOND / 100
        <= good.start_time_unix_nano
        <= good.end_time_unix_nano
        <= ended + NS_PER_SECOND / 100
    )
    assert refused.trace_id.hex() != TRACE
    assert refused.status.code == Status.STATUS_CODE_UNSET
    assert attributes(refused)["http.response.status_code"] == 422
    assert [span for span in collector.spans if span.parent_span_id == refused.span_id] == []


def assert_stages_inside(collector: Collector, parent: Span) -> None:
    stages = [span for span in collector.spans if span.parent_span_id == parent.span_id]
    stages.sort(key=lambda span: span.start_time_unix_nano)
    assert [span.name for span in stages] == ["decode", "queue", "inference"]
    moments = [parent.start_time_unix_nano]
    for span in stages:
        assert span.trace_id == parent.trace_id
        moments += [span.start_time_unix_nano, span.end_time_unix_nano]
    moments.append(parent.end_time_unix_nano)
    late = [before - after for before, after in pairwise(moments) if before > after]
    # Floating-point rounding.
    assert all(nanoseconds < 5000 for nanoseconds in late), moments
    assert stages[-1].end_time_unix_nano > stages[-1].start_time_unix_nano


def test_log_has_the_trace_id(store: Path, tmp_path: Path, collector: Collector) -> None:
    with Server(store, tmp_path / "log", trace_endpoint=collector.endpoint) as server:
        server.ask("POST", "/classify", PNG, {"traceparent": f"00-{TRACE}-{PARENT}-01"})
        assert server.stop() == 0
        assert f'"trace_id": "{TRACE}"' in server.log


def test_unsampled_request_is_not_traced_and_bad_traceparent_is_ignored(
    store: Path, tmp_path: Path, collector: Collector
) -> None:
    with Server(store, tmp_path / "log", trace_endpoint=collector.endpoint) as server:
        # Not sampled.
        server.ask("POST", "/classify", PNG, {"traceparent": f"00-{TRACE}-{PARENT}-00"})
        server.ask("POST", "/classify", PNG, {"traceparent": "nonsense"})
        assert server.stop() == 0
    (span,) = collector.find("POST /classify")
    assert not span.parent_span_id


@pytest.mark.parametrize("is_listening", [False, True])
def test_unreachable_collector_logs_at_most_two_lines(store: Path, tmp_path: Path, is_listening: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces"
        if not is_listening:
            silent.close()
        with Server(store, tmp_path / "log", trace_endpoint=endpoint) as server:
            for _ in range(50):
                assert server.ask("POST", "/classify", PNG)[0] == 200
            started_at = time.monotonic()
            assert server.stop() == 0
            assert time.monotonic() - started_at < 15
            lines = [json.loads(line) for line in server.log.splitlines()]
        complaints = [line for line in lines if re.search("trace|span|opentelemetry|urllib3", line["logger"])]
        assert len(complaints) <= 2, complaints
        assert all(line["logger"] == "app.observability.tracing" for line in complaints)
