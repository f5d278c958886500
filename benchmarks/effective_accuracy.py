"""Effective accuracy: of all requests offered, the share whose answer was right and in time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from benchmarks.open_loop import LOST, Effort, Exchange
from benchmarks.report import percentile
from benchmarks.served import MeasurementError

Outcome = Literal["right", "wrong", "late", "refused", "failed"]
OUTCOMES: tuple[Outcome, ...] = ("right", "wrong", "late", "refused", "failed")
BY_STATUS: dict[int, Outcome] = {429: "refused", 503: "refused", 504: "late", 500: "failed", LOST: "failed"}
N_RESAMPLES = 4000


@dataclass(frozen=True)
class Point:
    """One arm at one load in one round.

    Units: shares of all requests offered; latencies of answers with 200, in time or not, by the client's clock.
    mean_r: of those. blocks: for each second of arrivals, how many were offered and how many right in time. is_kept:
    not if the client itself was late.
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
    """Adaptive less fixed, in effective accuracy, with a 95 % interval."""

    value: float
    ci95: tuple[float, float]


def judge(exchange: Exchange, label: int, deadline_ms: float) -> tuple[Outcome, int | None]:
    """Say what a request came to, and the rate that it was answered with, if it was.

    Raises: MeasurementError for a status that a well-formed request with a deadline cannot get.
    """
    latency_ms = exchange.latency_ms
    if exchange.status != 200 or latency_ms is None:
        if exchange.status not in BY_STATUS:
            raise MeasurementError(f"the service answered {exchange.status}: {exchange.body[:300]!r}")
        return BY_STATUS[exchange.status], None
    answer: dict[str, Any] = json.loads(exchange.body)
    if latency_ms > deadline_ms:
        return "late", answer["r"]
    return ("right" if answer["predictions"][0]["index"] == label else "wrong"), answer["r"]


def summarise(
    name: tuple[float, int, str],
    exchanges: Sequence[Exchange],
    labels: Sequence[int],
    times: Sequence[float],
    deadline_ms: float,
    effort: Effort,
    max_lag_ms: float,
) -> Point:
    """Reduce one arm's answers to a point. name: load, round, arm; times: of arrival, in seconds from the start."""
    judged = [judge(exchange, label, deadline_ms) for exchange, label in zip(exchanges, labels, strict=True)]
    counts = Counter(outcome for outcome, _ in judged)
    answered = [one.latency_ms for one in exchanges if one.status == 200 and one.latency_ms is not None]
    found_rates = [r for _, r in judged if r is not None]
    return Point(
        *name,
        n_offered=len(judged),
        shares={outcome: counts[outcome] / max(1, len(judged)) for outcome in OUTCOMES},
        mean_r=sum(found_rates) / len(found_rates) if found_rates else None,
        p50_ms=percentile(answered, 50),
        p99_ms=percentile(answered, 99),
        cpu_share=effort.cpu_share,
        lag_p99_ms=effort.lag_p99_ms,
        is_kept=effort.lag_p99_ms <= max_lag_ms,
        blocks=count_by_second(times, [outcome == "right" for outcome, _ in judged]),
    )


def count_by_second(times: Sequence[float], is_right: Sequence[bool]) -> list[tuple[int, int]]:
    seconds = np.floor(np.asarray(times, float)).astype(int)
    n_offered = np.bincount(seconds)
    n_right = np.bincount(seconds, weights=np.asarray(is_right, float), minlength=len(n_offered))
    return [(int(offered), int(right)) for offered, right in zip(n_offered, n_right, strict=True)]


def effective_accuracy(points: Sequence[Point]) -> float | None:
    """Return it over rounds, None where none was kept."""
    blocks = [block for point in points if point.is_kept for block in point.blocks]
    n_offered = sum(offered for offered, _ in blocks)
    return sum(right for _, right in blocks) / n_offered if n_offered else None


def compare(adaptive: Sequence[Point], fixed: Sequence[Point], seed: int = 0) -> Difference | None:
    """Compare two arms that met the same arrivals, by the rounds that both kept; None where there is none.

    The interval is a bootstrap of seconds, not of requests: neighbours in a queue share their fate.
    """
    base = {point.round: point for point in fixed if point.is_kept}
    pairs = [(own, base[own.round]) for own in adaptive if own.is_kept and own.round in base]
    blocks = [
        (n_offered, right - other)
        for own, same in pairs
        for (n_offered, right), (_, other) in zip(own.blocks, same.blocks, strict=True)
    ]
    if not sum(n_offered for n_offered, _ in blocks):
        return None
    offered, more = np.array(blocks, float).T
    chosen = np.random.default_rng(seed).integers(0, len(blocks), (N_RESAMPLES, len(blocks)))
    resampled = more[chosen].sum(axis=1) / np.maximum(1, offered[chosen].sum(axis=1))
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Difference(float(more.sum() / offered.sum()), (float(low), float(high)))


def best_fixed(points: Sequence[Point], load: float, adaptive_arm: str) -> str | None:
    """Name the fixed arm with the best effective accuracy at a load, chosen with all its rounds in sight: the strongest
    opponent that there could be.
    """
    arms = {point.arm for point in points if point.arm != adaptive_arm and point.load == load}
    scores = {arm: effective_accuracy(select(points, load, arm)) for arm in sorted(arms)}
    known = {arm: score for arm, score in scores.items() if score is not None}
    return max(known, key=lambda arm: known[arm], default=None)


def select(points: Sequence[Point], load: float, arm: str) -> list[Point]:
    return [point for point in points if (point.load, point.arm) == (load, arm)]
