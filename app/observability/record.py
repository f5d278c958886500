"""Record: what happened to one request. Read by its response, the metrics, the log and the traces."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from app.store.catalogue import Labels, ServedVariant


@dataclass(frozen=True, slots=True)
class ImageResult:
    """The result of one image, and what it cost. Units: seconds of time.perf_counter, GMACs.

    outputs: the rows of the graph's outputs that belong to this image, by role ("logits", …).
    tokens: tokens entering each block, and tokens left at the end. Shapes: (blocks + 1,)
    queue_seconds: wait for the device; decode_wait_seconds: before that, for a decoder thread.
    """

    model: str
    variant: ServedVariant
    outputs: Mapping[str, NDArray[Any]]
    tokens: list[int]
    gmacs: float
    batch_size: int
    started_at: float
    decode_seconds: float
    queue_seconds: float
    inference_seconds: float
    is_degraded: bool
    decode_wait_seconds: float = 0.0

    @property
    def wait_seconds(self) -> float:
        """Return the wait for a decoder thread and for the device."""
        return self.decode_wait_seconds + self.queue_seconds

    @property
    def labels(self) -> Labels:
        return (self.model, self.variant.spec.policy, self.variant.rate_label)

    @property
    def gmacs_saved(self) -> float:
        """Return the difference from the unmerged model. Units: GMACs."""
        return max(0.0, self.variant.unmerged_gmacs - self.gmacs)


@dataclass
class RequestRecord:
    """What a request selected, the start and duration of each stage, and the refusals.

    decodes: start and duration of each decoded image, including those that did not run.
    refusals: error codes.
    Units: seconds of time.perf_counter.
    """

    request_id: str = ""
    started_at: float = field(default_factory=time.perf_counter)
    model: str = ""
    version: str = ""
    policy: str = ""
    r: str = ""
    decodes: list[tuple[float, float]] = field(default_factory=list)
    results: list[ImageResult] = field(default_factory=list)
    total_seconds: float | None = None
    refusals: list[str] = field(default_factory=list)

    @property
    def n_images(self) -> int:
        return len(self.results)

    @property
    def labels(self) -> Labels:
        """Return the labels of the first result, or of the selection if there is none."""
        return self.results[0].labels if self.results else (self.model, self.policy, self.r)

    @property
    def stages(self) -> dict[str, list[float]]:
        """Return durations by stage: one per image; for the total, one per request. Units: seconds."""
        return {
            "decode": [seconds for _, seconds in self.decodes],
            "queue": [result.wait_seconds for result in self.results],
            "inference": [result.inference_seconds for result in self.results],
            "total": [] if self.total_seconds is None else [self.total_seconds],
        }

    def durations_ms(self) -> dict[str, float]:
        """Return the duration of each stage for the slowest image. Units: ms."""
        return {name: round(max(seconds) * 1e3, 3) for name, seconds in self.stages.items() if seconds}

    def stage_times(self) -> list[tuple[str, float, float]]:
        """List name, start and duration of each completed stage; images that shared a batch share an item."""
        queues = {("queue", result.started_at - result.queue_seconds, result.queue_seconds) for result in self.results}
        runs = {("inference", result.started_at, result.inference_seconds) for result in self.results}
        return [("decode", *times) for times in self.decodes] + sorted(queues) + sorted(runs)

    def facts(self) -> dict[str, str | int | bool]:
        """Describe the run for logs and traces; empty if the request was refused before selection."""
        if not self.model:
            return {}
        model, policy, r = self.labels
        facts: dict[str, str | int | bool] = {"model": model, "version": self.version, "policy": policy}
        if r:
            facts["r"] = int(r)
        if self.results:
            facts["batch_size"] = max(result.batch_size for result in self.results)
        return {**facts, "images": self.n_images, "degraded": any(result.is_degraded for result in self.results)}
