"""Effective accuracy: the share of all requests offered that get a correct answer in time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from benchmarks.errors import MeasurementError
from benchmarks.load.open_loop import LOST, CallResult, ClientLoad
from benchmarks.spread import percentile

Outcome = Literal["correct", "incorrect", "late", "refused", "failed"]
OUTCOMES: tuple[Outcome, ...] = ("correct", "incorrect", "late", "refused", "failed")
BY_STATUS: dict[int, Outcome] = {429: "refused", 503: "refused", 504: "late", 500: "failed", LOST: "failed"}
N_RESAMPLES = 4000


@dataclass(frozen=True)
class Point:
    """One arm at one load in one round.

    Units: shares of all requests offered. Latencies and mean_r: of responses with status 200, in
    time or not, by the client's clock.
    blocks: per second of arrivals, the number of requests offered and of correct answers in time.
    is_kept: False if the client's own lag was too large.
    """

    load: float
    round: int
    arm: str
    n_offered: int
    shares: dict[Outcome, float]
    mean_r: float | None
    p50_ms: float | None
    p99_ms: float | None
    cpu_share: float
    lag_p99_ms: float
    is_kept: bool
    blocks: list[tuple[int, int]]


@dataclass(frozen=True)
class Difference:
    """Effective accuracy of the adaptive arm less that of a fixed arm, with a 95 % interval."""

    value: float
    ci95: tuple[float, float]


def judge(result: CallResult, label: int, deadline_ms: float) -> tuple[Outcome, int | None]:
    """Return the outcome of a request, and the rate of its answer.

    Raises: MeasurementError for a status that a valid request with a deadline cannot get.
    """
    latency_ms = result.latency_ms
    if result.status != 200 or latency_ms is None:
        if result.status not in BY_STATUS:
            raise MeasurementError(f"unexpected status {result.status}: {result.body[:300]!r}")
        return BY_STATUS[result.status], None
    answer: dict[str, Any] = json.loads(result.body)
    if latency_ms > deadline_ms:
        return "late", answer["r"]
    return ("correct" if answer["predictions"][0]["index"] == label else "incorrect"), answer["r"]


def summarise(
    name: tuple[float, int, str],
    results: Sequence[CallResult],
    labels: Sequence[int],
    times: Sequence[float],
    deadline_ms: float,
    client: ClientLoad,
    max_lag_ms: float,
) -> Point:
    """Summarise the results of one arm. name: load, round, arm. times: of arrival, in s from the start."""
    judged = [judge(result, label, deadline_ms) for result, label in zip(results, labels, strict=True)]
    counts = Counter(outcome for outcome, _ in judged)
    answered = [one.latency_ms for one in results if one.status == 200 and one.latency_ms is not None]
    found_rates = [r for _, r in judged if r is not None]
    return Point(
        *name,
        n_offered=len(judged),
        shares={outcome: counts[outcome] / max(1, len(judged)) for outcome in OUTCOMES},
        mean_r=sum(found_rates) / len(found_rates) if found_rates else None,
        p50_ms=percentile(answered, 50),
        p99_ms=percentile(answered, 99),
        cpu_share=client.cpu_share,
        lag_p99_ms=client.lag_p99_ms,
        is_kept=client.lag_p99_ms <= max_lag_ms,
        blocks=count_by_second(times, [outcome == "correct" for outcome, _ in judged]),
    )


def count_by_second(times: Sequence[float], is_correct: Sequence[bool]) -> list[tuple[int, int]]:
    seconds = np.floor(np.asarray(times, float)).astype(int)
    n_offered = np.bincount(seconds)
    n_correct = np.bincount(seconds, weights=np.asarray(is_correct, float), minlength=len(n_offered))
    return [(int(offered), int(correct)) for offered, correct in zip(n_offered, n_correct, strict=True)]


def effective_accuracy(points: Sequence[Point]) -> float | None:
    """Return effective accuracy over rounds, or None if no round was kept."""
    blocks = [block for point in points if point.is_kept for block in point.blocks]
    n_offered = sum(offered for offered, _ in blocks)
    return sum(correct for _, correct in blocks) / n_offered if n_offered else None


def compare(adaptive: Sequence[Point], fixed: Sequence[Point], seed: int = 0) -> Difference | None:
    """Compare two arms with the same arrivals, over rounds kept in both; None if there are none.

    The interval is a bootstrap of seconds, not of requests, since outcomes of requests that share a
    queue are correlated.
    """
    base = {point.round: point for point in fixed if point.is_kept}
    pairs = [(own, base[own.round]) for own in adaptive if own.is_kept and own.round in base]
    blocks = [
        (n_offered, correct - other)
        for own, same in pairs
        for (n_offered, correct), (_, other) in zip(own.blocks, same.blocks, strict=True)
    ]
    if not sum(n_offered for n_offered, _ in blocks):
        return None
    offered, more = np.array(blocks, float).T
    chosen = np.random.default_rng(seed).integers(0, len(blocks), (N_RESAMPLES, len(blocks)))
    resampled = more[chosen].sum(axis=1) / np.maximum(1, offered[chosen].sum(axis=1))
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Difference(float(more.sum() / offered.sum()), (float(low), float(high)))


def best_fixed(points: Sequence[Point], load: float, adaptive_arm: str) -> str | None:
    """Return the fixed arm with the highest effective accuracy at a load.

    It is chosen by the measured result, which makes it the strongest possible baseline.
    """
    arms = {point.arm for point in points if point.arm != adaptive_arm and point.load == load}
    scores = {arm: effective_accuracy(select(points, load, arm)) for arm in sorted(arms)}
    known = {arm: score for arm, score in scores.items() if score is not None}
    return max(known, key=lambda arm: known[arm], default=None)


def select(points: Sequence[Point], load: float, arm: str) -> list[Point]:
    return [point for point in points if (point.load, point.arm) == (load, arm)]
