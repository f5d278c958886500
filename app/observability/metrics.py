"""Metrics: the Prometheus collectors. Stage durations come from the request's record."""

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from app.errors import PROBLEMS, TOO_MANY_CONNECTIONS
from app.observability.record import RequestRecord
from app.store.catalogue import Labels
from app.store.refusals import ReloadResult
from app.system.cgroups import memory_limit_bytes
from app.system.memory import MemoryGauge

BUCKETS_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
BUCKETS_TOKENS = (2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256, 384, 512, 1024)
BUCKETS_IMAGES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
# r is empty for adaptive policies.
VARIANT = ["model", "policy", "r"]
# Refusals that count as missed deadlines.
LATE = ("deadline_unmeetable", "deadline_passed")


class EngineState(Protocol):
    """What the gauges read."""

    def depths_by_label(self) -> Mapping[Labels, int]: ...
    def floors(self) -> Mapping[tuple[str, str, str], int]: ...


class Metrics:
    """Label values are bounded: models, policies, rates and codes, never a path or an id."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        self._requests = self._counter("dtem_requests_total", "Inference requests answered", [*VARIANT, "code"])
        self._images = self._counter("dtem_images_total", "Images processed", VARIANT)
        self._gmacs = self._counter("dtem_gmacs_total", "GMACs computed", VARIANT)
        self._saved = self._counter("dtem_gmacs_saved_total", "GMACs saved by merging", VARIANT)
        self._degraded = self._counter("dtem_degraded_total", "Images degraded to a cheaper variant", VARIANT)
        self._refusals = self._counter("dtem_refusals_total", "Requests and files refused", ["reason"])
        self._misses = self._counter("dtem_deadline_misses_total", "Missed or unmeetable deadlines", ["reason"])
        self._cancelled = self._counter("dtem_cancelled_total", "Images cancelled", ["reason"])
        self._busy = self._counter("dtem_busy_seconds_total", "Run time of batches", VARIANT)
        self._stages = self._histogram(
            "dtem_stage_seconds", "Duration of a stage", ["stage", *VARIANT], BUCKETS_SECONDS
        )
        self._kept = self._histogram("dtem_kept_tokens", "Tokens after the last block", VARIANT, BUCKETS_TOKENS)
        self._sizes = self._histogram("dtem_batch_images", "Images per batch", VARIANT, BUCKETS_IMAGES)
        self._info = Gauge(
            "dtem_model_info", "Models served", ["model", "version", "format", "device"], registry=registry
        )
        self._default = Gauge(
            "dtem_default_model_info", "Model of requests that name none", ["model", "version"], registry=registry
        )
        self._is_default_configured = Gauge(
            "dtem_default_model_configured", "Whether DTEM_DEFAULT_MODEL names the default model", registry=registry
        )
        self._refused = Gauge(
            "dtem_refused_versions", "Bad versions in the model store, not served", ["model"], registry=registry
        )
        self._reloads = self._counter("dtem_reloads_total", "Model versions loaded, refused or dropped", ["result"])
        self._create_at_zero()
        self._ready = Gauge("dtem_ready", "Whether the service is ready", registry=registry)
        self._in_flight = Gauge("dtem_in_flight_images", "Images decoding, queued or running", registry=registry)
        limit = Gauge("dtem_memory_limit_bytes", "Memory limit of the container or host", registry=registry)
        limit.set(memory_limit_bytes())
        self.memory = MemoryGauge()
        used = Gauge("dtem_memory_bytes", "Memory used, shared pages counted once", registry=registry)
        used.set_function(lambda: float(self.memory.read()))

    def _create_at_zero(self) -> None:
        """Create the counters of rare events at 0: an alert on `increase` misses the first event of a new series."""
        for result in get_args(ReloadResult):
            self._reloads.labels(result)
        for reason in (*(code for _, code in PROBLEMS.values()), TOO_MANY_CONNECTIONS):
            self._refusals.labels(reason)
        for reason in LATE:
            self._misses.labels(reason)
        for reason in ("waiting", "running"):
            self._cancelled.labels(reason)

    def _counter(self, name: str, documentation: str, labels: list[str]) -> Counter:
        return Counter(name, documentation, labels, registry=self.registry)

    def _histogram(self, name: str, documentation: str, labels: list[str], buckets: Iterable[float]) -> Histogram:
        return Histogram(name, documentation, labels, buckets=tuple(buckets), registry=self.registry)

    def watch(self, is_ready: Callable[[], bool], engine: EngineState, n_in_flight: Callable[[], int]) -> None:
        """Register the gauges, which read the current state at each scrape."""
        self._ready.set_function(lambda: float(is_ready()))
        self._in_flight.set_function(lambda: float(n_in_flight()))
        self.registry.register(_EngineCollector(engine))

    def announce_models(self, models: Iterable[tuple[str, str]], graph_format: str, device: str) -> None:
        """Replace the models shown: name and version of each."""
        self._info.clear()
        for model, version in models:
            self._info.labels(model, version, graph_format, device).set(1)

    def announce_default(self, model: str, version: str, *, is_configured: bool) -> None:
        """Replace the default model shown."""
        self._default.clear()
        self._default.labels(model, version).set(1)
        self._is_default_configured.set(is_configured)

    def announce_refused(self, n_by_model: Mapping[str, int]) -> None:
        """Replace the numbers of refused versions shown."""
        self._refused.clear()
        for model, n_versions in n_by_model.items():
            self._refused.labels(model).set(n_versions)

    def count_reload(self, result: ReloadResult) -> None:
        self._reloads.labels(result).inc()

    def count_refusal(self, reason: str) -> None:
        self._refusals.labels(reason).inc()

    def observe(self, record: RequestRecord, code: int) -> None:
        """Count an answered request."""
        labels = record.labels
        self._requests.labels(*labels, str(code)).inc()
        for reason in record.refusals:
            self.count_refusal(reason)
            if reason in LATE:
                self._misses.labels(reason).inc()
        for result in record.results:
            self._images.labels(*result.labels).inc()
            self._gmacs.labels(*result.labels).inc(result.gmacs)
            self._saved.labels(*result.labels).inc(result.gmacs_saved)
            self._kept.labels(*result.labels).observe(result.tokens[-1])
            if result.is_degraded:
                self._degraded.labels(*result.labels).inc()
        for stage, seconds in record.stages.items():
            for value in seconds:
                self._stages.labels(stage, *labels).observe(value)

    def observe_run(self, labels: Labels, n_images: int, seconds: float) -> None:
        """Count a finished batch."""
        self._sizes.labels(*labels).observe(n_images)
        self._busy.labels(*labels).inc(seconds)

    def count_cancelled(self, n_waiting: int, n_running: int) -> None:
        """Count images of cancelled requests, by whether they were queued or running."""
        for reason, n in (("waiting", n_waiting), ("running", n_running)):
            if n:
                self._cancelled.labels(reason).inc(n)


class _EngineCollector(Collector):
    """Gauges whose series depend on the state of the engine."""

    def __init__(self, engine: EngineState) -> None:
        self._engine = engine

    def collect(self) -> Iterable[GaugeMetricFamily]:
        depth = GaugeMetricFamily("dtem_queue_depth_images", "Images queued", labels=VARIANT)
        for labels, n_images in self._engine.depths_by_label().items():
            depth.add_metric(list(labels), n_images)
        floor = GaugeMetricFamily(
            "dtem_rate_floor", "Minimum r of requests that opted in, while raised", labels=VARIANT[:2]
        )
        # Over all versions of a model.
        highest: dict[tuple[str, str], int] = {}
        for (model, _, policy), r in self._engine.floors().items():
            highest[model, policy] = max(r, highest.get((model, policy), 0))
        for family, r in highest.items():
            floor.add_metric(list(family), r)
        yield depth
        yield floor
