"""Metrics: what Prometheus sees. Each stage is timed once, written to an Exchange, and read from there by the answer,
the log and these collectors.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

BUCKETS_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
BUCKETS_TOKENS = (2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256, 384, 512, 1024)
ReloadResult = Literal["loaded", "refused", "dropped"]
VARIANT = ["model", "policy", "r"]  # r is empty where the policy adapts to the image


@dataclass
class Exchange:
    """One `/classify` request as it goes: which variant, how long each stage took, what was refused."""

    model: str = ""
    policy: str = ""
    r: str = ""
    decode_seconds: list[float] = field(default_factory=list)  # one per image
    queue_seconds: float | None = None
    inference_seconds: float | None = None
    total_seconds: float | None = None
    n_images: int = 0  # classified
    kept_tokens: list[int] = field(default_factory=list)  # one per image classified
    refusals: list[str] = field(default_factory=list)  # codes

    @property
    def stages(self) -> dict[str, list[float]]:
        single = {"queue": self.queue_seconds, "inference": self.inference_seconds, "total": self.total_seconds}
        return {"decode": self.decode_seconds, **{name: [s] for name, s in single.items() if s is not None}}

    def durations_ms(self) -> dict[str, float]:
        """Units: ms per stage, of all images together."""
        return {name: round(sum(seconds) * 1e3, 3) for name, seconds in self.stages.items()}


class Metrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        self._requests = Counter("dtem_requests_total", "Answers to /classify", [*VARIANT, "code"], registry=registry)
        self._images = Counter("dtem_images_total", "Images classified", VARIANT, registry=registry)
        self._refusals = Counter("dtem_refusals_total", "Requests and files refused", ["reason"], registry=registry)
        self._stages = Histogram(
            "dtem_stage_seconds", "Time in each stage", ["stage", *VARIANT], buckets=BUCKETS_SECONDS, registry=registry
        )
        self._kept = Histogram(
            "dtem_kept_tokens",
            "Tokens that an image has left at the end",
            VARIANT,
            buckets=BUCKETS_TOKENS,
            registry=registry,
        )
        self._info = Gauge(
            "dtem_model_info", "Models served", ["model", "version", "format", "device"], registry=registry
        )
        self._reloads = Counter(
            "dtem_reloads_total", "Model versions taken or refused since the start", ["result"], registry=registry
        )
        for result in get_args(ReloadResult):
            self._reloads.labels(result)  # at 0 from the start, so that an alert sees the first one
        self._ready = Gauge("dtem_ready", "Whether the service takes requests", registry=registry)
        self._depth = Gauge("dtem_queue_depth_requests", "Requests waiting for the device", registry=registry)
        self._in_flight = Gauge("dtem_in_flight_images", "Images decoding, queued or running", registry=registry)

    def watch(self, is_ready: Callable[[], bool], n_waiting: Callable[[], int], n_in_flight: Callable[[], int]) -> None:
        """Read the gauges from where the state is, at each scrape."""
        self._ready.set_function(lambda: float(is_ready()))
        self._depth.set_function(lambda: float(n_waiting()))
        self._in_flight.set_function(lambda: float(n_in_flight()))

    def announce_models(self, models: Iterable[tuple[str, str]], graph_format: str, device: str) -> None:
        """Show these models (name and version), and no others any more."""
        self._info.clear()
        for model, version in models:
            self._info.labels(model, version, graph_format, device).set(1)

    def count_reload(self, result: ReloadResult) -> None:
        self._reloads.labels(result).inc()

    def observe(self, exchange: Exchange, code: int) -> None:
        """Count an exchange that has ended."""
        variant = (exchange.model, exchange.policy, exchange.r)
        self._requests.labels(*variant, str(code)).inc()
        for reason in exchange.refusals:
            self._refusals.labels(reason).inc()
        if exchange.n_images:
            self._images.labels(*variant).inc(exchange.n_images)
        for n_tokens in exchange.kept_tokens:
            self._kept.labels(*variant).observe(n_tokens)
        for stage, seconds in exchange.stages.items():
            for value in seconds:
                self._stages.labels(stage, *variant).observe(value)
