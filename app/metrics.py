"""Metrics: what Prometheus sees. Each stage is timed once, written to an Exchange, and read from there by the answer,
the log and these collectors.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

BUCKETS_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
BUCKETS_TOKENS = (2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256, 384, 512, 1024)
VARIANT = ["model", "policy", "r"]  # r is empty where the policy adapts to the image


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
    batch_size: int | None = None
    degraded: bool = False
    decode_started_at: list[float] = field(default_factory=list)  # as decode_seconds
    decode_seconds: list[float] = field(default_factory=list)  # one per image
    queue_started_at: float | None = None
    queue_seconds: float | None = None
    inference_started_at: float | None = None
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

    def stage_times(self) -> list[tuple[str, float, float]]:
        """List the stages that came to an end: name, start, seconds."""
        decodes = zip(self.decode_started_at, self.decode_seconds, strict=True)
        times = [("decode", started_at, seconds) for started_at, seconds in decodes]
        if self.queue_started_at is not None and self.queue_seconds is not None:
            times.append(("queue", self.queue_started_at, self.queue_seconds))
        if self.inference_started_at is not None and self.inference_seconds is not None:
            times.append(("inference", self.inference_started_at, self.inference_seconds))
        return times

    def facts(self) -> dict[str, str | int | bool]:
        """Say what ran, for logs and traces; nothing of a request that was refused before that was known."""
        if not self.model:
            return {}
        facts: dict[str, str | int | bool] = {"model": self.model, "version": self.version, "policy": self.policy}
        if self.r:
            facts["r"] = int(self.r)
        if self.batch_size is not None:
            facts["batch_size"] = self.batch_size
        return {**facts, "images": self.n_images, "degraded": self.degraded}


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
        self._ready = Gauge("dtem_ready", "Whether the service takes requests", registry=registry)
        self._depth = Gauge("dtem_queue_depth_requests", "Requests waiting for the device", registry=registry)
        self._in_flight = Gauge("dtem_in_flight_images", "Images decoding, queued or running", registry=registry)

    def watch(self, is_ready: Callable[[], bool], n_waiting: Callable[[], int], n_in_flight: Callable[[], int]) -> None:
        """Read the gauges from where the state is, at each scrape."""
        self._ready.set_function(lambda: float(is_ready()))
        self._depth.set_function(lambda: float(n_waiting()))
        self._in_flight.set_function(lambda: float(n_in_flight()))

    def announce_model(self, model: str, version: str, graph_format: str, device: str) -> None:
        self._info.labels(model, version, graph_format, device).set(1)

    def count_refusal(self, reason: str) -> None:
        self._refusals.labels(reason).inc()

    def observe(self, exchange: Exchange, code: int) -> None:
        """Count an exchange that has ended."""
        variant = (exchange.model, exchange.policy, exchange.r)
        self._requests.labels(*variant, str(code)).inc()
        for reason in exchange.refusals:
            self.count_refusal(reason)
        if exchange.n_images:
            self._images.labels(*variant).inc(exchange.n_images)
        for n_tokens in exchange.kept_tokens:
            self._kept.labels(*variant).observe(n_tokens)
        for stage, seconds in exchange.stages.items():
            for value in seconds:
                self._stages.labels(stage, *variant).observe(value)
