"""Metrics: what Prometheus sees. Each stage is timed once, written to an Exchange, and read from there by the answer,
the log and these collectors.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from app.cgroups import memory_limit_bytes
from app.errors import PROBLEMS

BUCKETS_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
BUCKETS_TOKENS = (2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256, 384, 512, 1024)
BUCKETS_IMAGES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
ReloadResult = Literal["loaded", "refused", "dropped"]
VARIANT = ["model", "policy", "r"]  # r is empty where the policy adapts to the image
LATE = ("deadline_unmeetable", "deadline_passed")  # refusals that are deadlines missed

Labels = tuple[str, str, str]  # of a variant


@dataclass(frozen=True, slots=True)
class Run:
    """One image that was classified: as which variant, and what it took. Units: seconds, GMACs."""

    variant: Labels
    batch_size: int
    started_at: float
    queue_seconds: float
    inference_seconds: float
    kept_tokens: int
    gmacs: float
    gmacs_saved: float
    is_degraded: bool


@dataclass
class Exchange:
    """One request as it goes: which variant, when each stage began and how long it took, what was refused.

    Units: seconds of time.perf_counter.
    """

    request_id: str = ""
    started_at: float = field(default_factory=time.perf_counter)
    model: str = ""
    version: str = ""
    policy: str = ""
    r: str = ""
    decodes: list[tuple[float, float]] = field(default_factory=list)  # began at, took; one per image
    runs: list[Run] = field(default_factory=list)  # one per image classified
    total_seconds: float | None = None
    refusals: list[str] = field(default_factory=list)  # codes

    @property
    def n_images(self) -> int:
        return len(self.runs)

    @property
    def variant(self) -> Labels:
        """Of the first image that was classified; of what was asked for if none was."""
        return self.runs[0].variant if self.runs else (self.model, self.policy, self.r)

    @property
    def stages(self) -> dict[str, list[float]]:
        """Units: seconds, one number per image, but one for the request in total."""
        return {
            "decode": [seconds for _, seconds in self.decodes],
            "queue": [run.queue_seconds for run in self.runs],
            "inference": [run.inference_seconds for run in self.runs],
            "total": [] if self.total_seconds is None else [self.total_seconds],
        }

    def durations_ms(self) -> dict[str, float]:
        """Units: ms per stage, of the image that it took longest for."""
        return {name: round(max(seconds) * 1e3, 3) for name, seconds in self.stages.items() if seconds}

    def stage_times(self) -> list[tuple[str, float, float]]:
        """List the stages that came to an end, each once for all images that went through it together: name, start,
        seconds.
        """
        queues = {("queue", run.started_at - run.queue_seconds, run.queue_seconds) for run in self.runs}
        inferences = {("inference", run.started_at, run.inference_seconds) for run in self.runs}
        return [("decode", *times) for times in self.decodes] + sorted(queues) + sorted(inferences)

    def facts(self) -> dict[str, str | int | bool]:
        """Say what ran, for logs and traces; nothing of a request that was refused before that was known."""
        if not self.model:
            return {}
        model, policy, r = self.variant
        facts: dict[str, str | int | bool] = {"model": model, "version": self.version, "policy": policy}
        if r:
            facts["r"] = int(r)
        if self.runs:
            facts["batch_size"] = max(run.batch_size for run in self.runs)
        return {**facts, "images": self.n_images, "degraded": any(run.is_degraded for run in self.runs)}


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

    def observe(self, exchange: Exchange, code: int) -> None:
        """Count an exchange that has ended."""
        variant = exchange.variant
        self._requests.labels(*variant, str(code)).inc()
        for reason in exchange.refusals:
            self.count_refusal(reason)
            if reason in LATE:
                self._misses.labels(reason).inc()
        for run in exchange.runs:
            self._images.labels(*run.variant).inc()
            self._gmacs.labels(*run.variant).inc(run.gmacs)
            self._saved.labels(*run.variant).inc(run.gmacs_saved)
            self._kept.labels(*run.variant).observe(run.kept_tokens)
            if run.is_degraded:
                self._degraded.labels(*run.variant).inc()
        for stage, seconds in exchange.stages.items():
            for value in seconds:
                self._stages.labels(stage, *variant).observe(value)

    def observe_run(self, variant: Labels, n_images: int, seconds: float) -> None:
        """Count a batch that has run."""
        self._sizes.labels(*variant).observe(n_images)
        self._busy.labels(*variant).inc(seconds)

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
