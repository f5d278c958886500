"""Tracing: each request as OpenTelemetry spans, sent over OTLP/HTTP.

Spans are made when a request is over, from the times in its RequestRecord. Probes and scrapes are not traced.
This module is imported only if traces are enabled: its dependencies are large.
"""

import logging
import threading
import time
from collections.abc import Mapping, Sequence

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import Scope

from app.errors import echo
from app.observability.record import RequestRecord

SERVICE_NAME = "dtem-serve"
# Timeout of one export, retries included.
SEND_SECONDS = 5.0
CLOSE_SECONDS = 3.0
# From the end of a request to the export of its spans.
DELAY_MS = 1000.0
# Above it, the oldest spans are dropped.
MAX_WAITING_SPANS = 8192
PROPAGATED = (b"traceparent", b"tracestate")
METHODS = {"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"}
UNTRACED_PREFIXES = ("/health/", "/v2/health/", "/metrics")

logger = logging.getLogger(__name__)


class Tracing:
    """Exports spans in a background thread. A slow or unreachable collector costs spans, never a request."""

    def __init__(self, endpoint: str, sample_ratio: float) -> None:
        exporter = WatchedExporter(OTLPSpanExporter(endpoint, timeout=SEND_SECONDS), endpoint)
        resource = Resource({"service.name": SERVICE_NAME}).merge(OTELResourceDetector().detect())
        sampler = ParentBased(TraceIdRatioBased(sample_ratio))
        self._provider = TracerProvider(sampler, resource, shutdown_on_exit=False)
        self._provider.add_span_processor(
            BatchSpanProcessor(exporter, max_queue_size=MAX_WAITING_SPANS, schedule_delay_millis=DELAY_MS)
        )
        self._tracer = self._provider.get_tracer(SERVICE_NAME)
        self._propagator = TraceContextTextMapPropagator()

    def record(self, scope: Scope, record: RequestRecord, status: int, ended_at: float) -> str | None:
        """Make the spans of a finished request. Returns the trace id, or None if it is not sampled."""
        if scope["path"].startswith(UNTRACED_PREFIXES):
            return None
        to_unix = time.time() - time.perf_counter()
        span = self._tracer.start_span(
            span_name(scope),
            self._read_parent(scope),
            SpanKind.SERVER,
            start_time=_nanoseconds(record.started_at + to_unix),
        )
        if not span.is_recording():
            return None
        span.set_attributes(span_attributes(scope, record, status))
        if status >= 500:
            span.set_status(StatusCode.ERROR)
        context = set_span_in_context(span, Context())
        for stage, started_at, seconds in record.stage_times():
            child = self._tracer.start_span(stage, context, start_time=_nanoseconds(started_at + to_unix))
            child.end(_nanoseconds(started_at + seconds + to_unix))
        span.end(_nanoseconds(ended_at + to_unix))
        return f"{span.get_span_context().trace_id:032x}"

    def _read_parent(self, scope: Scope) -> Context:
        """Continue the client's trace (W3C Trace Context)."""
        carrier = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in PROPAGATED}
        return self._propagator.extract(carrier, Context())

    def close(self) -> None:
        """Flush the queued spans; those not sent within CLOSE_SECONDS are lost."""
        closing = threading.Thread(target=self._provider.shutdown, name="tracing", daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)
        if closing.is_alive():
            logger.warning("spans lost at shutdown: the collector did not respond in time")


def span_name(scope: Scope) -> str:
    """Name a span by its route: paths would be unbounded."""
    method = scope["method"] if scope["method"] in METHODS else "HTTP"
    route = getattr(scope.get("route"), "path", None)
    return method if route is None else f"{method} {route}"


def span_attributes(scope: Scope, record: RequestRecord, status: int) -> Mapping[str, str | int | bool | Sequence[str]]:
    """Describe a request, by OpenTelemetry's semantic conventions where they apply."""
    attributes: dict[str, str | int | bool | Sequence[str]] = {
        "http.request.method": scope["method"] if scope["method"] in METHODS else "_OTHER",
        "http.response.status_code": status,
        "url.path": echo(scope["path"]),
        "url.scheme": scope["scheme"],
        "dtem.request_id": record.request_id,
    }
    if (route := getattr(scope.get("route"), "path", None)) is not None:
        attributes["http.route"] = route
    if record.refusals:
        attributes["dtem.refusals"] = record.refusals
    if status >= 500:
        attributes["error.type"] = record.refusals[-1] if record.refusals else str(status)
    return attributes | {f"dtem.{name}": value for name, value in record.facts().items()}


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


class WatchedExporter(SpanExporter):
    """Logs once when exports start to fail and once when they recover; OpenTelemetry logs every failed export."""

    def __init__(self, exporter: SpanExporter, endpoint: str) -> None:
        self._exporter, self._endpoint = exporter, endpoint
        self._is_failing = False
        if not logger.isEnabledFor(logging.DEBUG):
            for noisy in ("opentelemetry", "urllib3"):
                logging.getLogger(noisy).setLevel(logging.CRITICAL)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        is_failing = result is not SpanExportResult.SUCCESS
        if is_failing and not self._is_failing:
            logger.warning("trace export failing, spans are lost: %s (reason at debug level)", self._endpoint)
        if self._is_failing and not is_failing:
            logger.warning("trace export recovered: %s", self._endpoint)
        self._is_failing = is_failing
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._exporter.force_flush(timeout_millis)
