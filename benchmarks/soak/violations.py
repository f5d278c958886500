"""Violations: how a soak test can fail."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks.load.open_loop import LOST, CallResult
from benchmarks.soak.ledger import Ledger, compare_ledgers, read_variant
from benchmarks.soak.requests import UNSEEN, Request

WINDOW_SECONDS = 60.0
# Per kind of violation.
MAX_EXAMPLES = 3
Answers = Sequence[tuple[Request, CallResult]]


@dataclass
class Observations:
    """Observations besides the responses. Units: s from the start; bytes.

    reloads: version, time of publication, and seconds until it was served.
    """

    started_at: float = 0.0
    memory: list[tuple[float, int]] = field(default_factory=list)
    reloads: list[tuple[str, float, float]] = field(default_factory=list)
    last_versions: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Limits:
    """max_refused: share of the requests without a deadline. max_growth_bytes: from first to last minute."""

    max_refused: float
    max_growth_bytes: float


def find_violations(
    requests: Sequence[Request], results: Sequence[CallResult], seen: Observations, counted: Ledger, limits: Limits
) -> list[str]:
    answers = list(zip(requests, results, strict=True))
    return [
        *_unexpected_statuses(answers),
        *_broken_promises(answers),
        *compare_ledgers(counted, results, UNSEEN),
        *_refusals(answers, limits.max_refused),
        *_memory_growth(seen, limits.max_growth_bytes),
        *_versions(results, seen),
    ]


def _unexpected_statuses(answers: Answers) -> Iterator[str]:
    examples: Counter[tuple[str, int]] = Counter()
    for request, result in answers:
        if result.status not in request.statuses:
            examples[request.kind, result.status] += 1
            if examples[request.kind, result.status] <= MAX_EXAMPLES:
                expected = ", ".join(map(str, sorted(request.statuses)))
                example = f"{_request_line(request)} {result.body[:300]!r}"
                yield f"{request.kind}: {describe_status(result.status)}, expected {expected}: {example}"
    for (kind, status), n in examples.items():
        if n > MAX_EXAMPLES:
            yield f"{kind}: {describe_status(status)} {n} times in total"


def describe_status(status: int) -> str:
    return "no response" if status == LOST else str(status)


def _request_line(request: Request) -> str:
    return request.call.data.partition(b"\r\n")[0].decode("ascii", "replace")


def _broken_promises(answers: Answers) -> Iterator[str]:
    broken: Counter[str] = Counter()
    for request, result in answers:
        if result.status == 200 and not request.keeps_promise(json.loads(result.body)):
            broken[request.kind] += 1
            if broken[request.kind] <= MAX_EXAMPLES:
                example = f"{_request_line(request)} {result.body[:300]!r}"
                yield f"{request.kind}: the answer does not match the request: {example}"


def _refusals(answers: Answers, max_refused: float) -> Iterator[str]:
    without_deadline = [
        result for request, result in answers if 200 in request.statuses and 504 not in request.statuses
    ]
    n_refused = sum(result.status == 429 for result in without_deadline)
    if n_refused > max_refused * len(without_deadline):
        n_sent = len(without_deadline)
        yield f"{n_refused} of {n_sent} requests without a deadline were refused, more than {max_refused:.1%}"


def _memory_growth(seen: Observations, max_bytes: float) -> Iterator[str]:
    first, last = memory_windows(seen.memory)
    if last - first > max_bytes:
        yield f"memory grew from {first / 1e6:.0f} MB to {last / 1e6:.0f} MB, by more than {max_bytes / 1e6:.0f} MB"


def memory_windows(memory: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Return medians of the first and the last minute, or quarter if that is shorter. Units: bytes"""
    end = memory[-1][0]
    seconds = min(WINDOW_SECONDS, end / 4)
    first = [size for at, size in memory if at <= seconds]
    last = [size for at, size in memory if at >= end - seconds]
    return statistics.median(first), statistics.median(last)


def _versions(results: Sequence[CallResult], seen: Observations) -> Iterator[str]:
    answered = count_versions(results)
    for version, _, _ in seen.reloads:
        if not answered[version]:
            yield f"version {version} was published and listed, but answered no request"
    if len(seen.reloads) != 2:
        yield f"{len(seen.reloads)} of 2 new versions were served before the end"
    elif seen.last_versions != [seen.reloads[-1][0]]:
        yield f"versions {seen.last_versions} are listed at the end, expected only {seen.reloads[-1][0]}"


def count_versions(results: Sequence[CallResult]) -> Counter[str]:
    """Count the answers by version."""
    variants = [read_variant(result.body) for result in results if result.status == 200]
    return Counter(one.version for one in variants if one is not None)
