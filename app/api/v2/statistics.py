"""Statistics: Triton's statistics of the requests under `/v2` since start. Prometheus covers all requests."""

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel

from app.observability.record import ImageResult, RequestRecord
from app.store.manifest import Manifest

NS_PER_SECOND, NS_PER_MS, MS_PER_SECOND = 1_000_000_000, 1_000_000, 1000
# Triton's names to ours.
STAGES = {"queue": "queue", "compute_input": "decode", "compute_infer": "inference"}


class Duration(BaseModel):
    count: int
    ns: int


class InferStatistics(BaseModel):
    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class ModelStatistics(BaseModel):
    name: str
    version: str
    last_inference: int
    inference_count: int
    execution_count: int
    inference_stats: InferStatistics
    batch_stats: list[None]


class AllStatistics(BaseModel):
    model_stats: list[ModelStatistics]


@dataclass
class Tally:
    last_ms: int = 0
    n_images: int = 0
    # A batch shared with other requests counts in proportion.
    n_batches: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    ns: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, ns: int) -> None:
        self.counts[name] += 1
        self.ns[name] += ns

    def duration(self, name: str) -> Duration:
        return Duration(count=self.counts[name], ns=self.ns[name])


class Statistics:
    def __init__(self) -> None:
        self._tallies: defaultdict[tuple[str, str], Tally] = defaultdict(Tally)

    def add_success(self, manifest: Manifest, results: Sequence[ImageResult], record: RequestRecord) -> None:
        tally = self._tallies[manifest.name, manifest.version]
        tally.last_ms = int(time.time() * MS_PER_SECOND)
        tally.n_images += len(results)
        tally.n_batches += sum(1 / item.batch_size for item in results)
        durations = record.durations_ms()
        tally.add("success", int(durations["total"] * NS_PER_MS))
        for triton_name, stage in STAGES.items():
            tally.add(triton_name, int(durations[stage] * NS_PER_MS))
        # Included in the inference.
        tally.add("compute_output", 0)

    def add_failure(self, manifest: Manifest, seconds: float) -> None:
        self._tallies[manifest.name, manifest.version].add("fail", int(seconds * NS_PER_SECOND))

    def describe(self, manifests: Sequence[Manifest]) -> AllStatistics:
        return AllStatistics(model_stats=[self._describe(manifest) for manifest in manifests])

    def _describe(self, manifest: Manifest) -> ModelStatistics:
        tally = self._tallies[manifest.name, manifest.version]
        return ModelStatistics(
            name=manifest.name,
            version=manifest.version,
            last_inference=tally.last_ms,
            inference_count=tally.n_images,
            execution_count=round(tally.n_batches),
            inference_stats=InferStatistics(**{name: tally.duration(name) for name in InferStatistics.model_fields}),
            batch_stats=[],
        )
