"""Metrics: the Prometheus collectors. Stages are timed once, in the request's record, and counted from there."""

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from app.errors import PROBLEMS
from app.observability.record import RequestRecord
from app.store.catalogue import Labels
from app.store.watcher import ReloadResult
from app.system.cgroups import memory_limit_bytes

BUCKETS_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
BUCKETS_TOKENS = (2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256, 384, 512, 1024)
BUCKETS_IMAGES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
VARIANT = ["model", "policy", "r"]  # r is empty where the policy adapts to the image
LATE = ("deadline_unmeetable", "deadline_passed")  # refusals that are deadlines missed


class EngineState(Protocol):
    """What the gauges read."""

    def depths_by_label(self) -> Mapping[Labels, int]: ...
    def floors(self) -> Mapping[Labels, int]: ...


class Metrics:
    """All labels are few: models, policies, rates and codes; never a path or an id."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        self._requests = self._counter("dtem_requests_total", "Answers to requests to classify", [*VARIANT, "code"])
        self._images = self._counter("dtem_images_total", "Images classified", VARIANT)
        self._gmacs = self._counter("dtem_gmacs_total", "GMACs that images took", VARIANT)
        self._saved = self._counter("dtem_gmacs_saved_total", "GMACs that images took less than unmerged", VARIANT)
        self._degraded = self._counter("dtem_degraded_total", "Images that ran cheaper than preferred", VARIANT)
        self._refusals = self._counter("dtem_refusals_total", "Requests and files refused", ["reason"])
        self._misses = self._counter("dtem_deadline_misses_total", "Requests and files too late", ["reason"])
        self._cancelled = self._counter("dtem_cancelled_total", "Images whose caller had left", ["reason"])
        self._busy = self._counter("dtem_busy_seconds_total", "Time that the device ran", VARIANT)
        self._stages = self._histogram("dtem_stage_seconds", "Time in each stage", ["stage", *VARIANT], BUCKETS_SECONDS)
        self._kept = self._histogram("dtem_kept_tokens", "Tokens an image has left at the end", VARIANT, BUCKETS_TOKENS)
        self._sizes = self._histogram("dtem_batch_images", "Images that ran together", VARIANT, BUCKETS_IMAGES)
        self._info = Gauge(
            "dtem_model_info", "Models served", ["model", "version", "format", "device"], registry=registry
        )
        self._reloads = self._counter(
            "dtem_reloads_total", "Model versions taken or refused since the start", ["result"]
        )
        self._begin_at_zero()
        self._ready = Gauge("dtem_ready", "Whether the service takes requests", registry=registry)
        self._in_flight = Gauge("dtem_in_flight_images", "Images decoding, queued or running", registry=registry)
        limit = Gauge("dtem_memory_limit_bytes", "Memory of the container, else of the machine", registry=registry)
        limit.set(memory_limit_bytes())

    def _begin_at_zero(self) -> None:
        """Make the counters of rare events, so that an alert sees the first one: an increase needs a value before."""
        for result in get_args(ReloadResult):
            self._reloads.labels(result)
        for _, reason in PROBLEMS.values():
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
        """Read the gauges from where the state is, at each scrape."""
        self._ready.set_function(lambda: float(is_ready()))
        self._in_flight.set_function(lambda: float(n_in_flight()))
        self.registry.register(_EngineCollector(engine))

    def announce_models(self, models: Iterable[tuple[str, str]], graph_format: str, device: str) -> None:
        """Show these models (name and version), and no others any more."""
        self._info.clear()
        for model, version in models:
            self._info.labels(model, version, graph_format, device).set(1)

    def count_reload(self, result: ReloadResult) -> None:
        self._reloads.labels(result).inc()

    def count_refusal(self, reason: str) -> None:
        self._refusals.labels(reason).inc()

    def observe(self, record: RequestRecord, code: int) -> None:
        """Count a request that was answered."""
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
        """Count a batch that has run."""
        self._sizes.labels(*labels).observe(n_images)
        self._busy.labels(*labels).inc(seconds)

    def count_cancelled(self, n_waiting: int, n_running: int) -> None:
        """Count images whose caller left while they waited, or ran."""
        for reason, n in (("waiting", n_waiting), ("running", n_running)):
            if n:
                self._cancelled.labels(reason).inc(n)


class _EngineCollector(Collector):
    """Gauges whose labels come and go with what waits."""

    def __init__(self, engine: EngineState) -> None:
        self._engine = engine

    def collect(self) -> Iterable[GaugeMetricFamily]:
        depth = GaugeMetricFamily("dtem_queue_depth_images", "Images waiting for the device", labels=VARIANT)
        for labels, n_images in self._engine.depths_by_label().items():
            depth.add_metric(list(labels), n_images)
        floor = GaugeMetricFamily(
            "dtem_rate_floor", "Least rate of requests that consent, while it is raised", labels=VARIANT[:2]
        )
        highest: dict[tuple[str, str], int] = {}  # of all versions
        for (model, _, policy), r in self._engine.floors().items():
            highest[model, policy] = max(r, highest.get((model, policy), 0))
        for family, r in highest.items():
            floor.add_metric(list(family), r)
        yield depth
        yield floor
