"""The report of `benchmarks.mixed`: what should not have been seen, and what was, as a table and a picture."""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from matplotlib.figure import Figure

from benchmarks.books import Book, compare_books, read_ran
from benchmarks.mixed_requests import UNSEEN, Request
from benchmarks.open_loop import LOST, Effort, Exchange
from benchmarks.report import percentile

WINDOW_SECONDS = 60.0
N_BINS = 60
MAX_EXAMPLES = 3  # of one kind of violation


@dataclass
class Course:
    """What was seen beside the answers. Units: s from the start; bytes. reloads: version, when it was published, and
    how long it took until it was served.
    """

    started_at: float = 0.0
    memory: list[tuple[float, int]] = field(default_factory=list)
    reloads: list[tuple[str, float, float]] = field(default_factory=list)
    last_versions: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Bounds:
    """max_refused: share of the requests without a deadline; max_growth_bytes: from the first minute to the last."""

    max_refused: float
    max_growth_bytes: float


def find_violations(
    requests: Sequence[Request], exchanges: Sequence[Exchange], course: Course, counted: Book, bounds: Bounds
) -> list[str]:
    answers = list(zip(requests, exchanges, strict=True))
    return [
        *_unexpected(answers),
        *_broken_promises(answers),
        *compare_books(counted, exchanges, UNSEEN),
        *_refusals(answers, bounds.max_refused),
        *_growth(course, bounds.max_growth_bytes),
        *_versions(exchanges, course),
    ]


Answers = Sequence[tuple[Request, Exchange]]


def _unexpected(answers: Answers) -> Iterator[str]:
    examples: Counter[tuple[str, int]] = Counter()
    for request, exchange in answers:
        if exchange.status not in request.statuses:
            examples[request.kind, exchange.status] += 1
            if examples[request.kind, exchange.status] <= MAX_EXAMPLES:
                wanted = ", ".join(map(str, sorted(request.statuses)))
                seen = f"{_line(request)} {exchange.body[:300]!r}"
                yield f"{request.kind}: {_status(exchange.status)}, not {wanted}: {seen}"
    for (kind, status), n in examples.items():
        if n > MAX_EXAMPLES:
            yield f"{kind}: {_status(status)} {n} times in all"


def _status(status: int) -> str:
    return "no answer" if status == LOST else str(status)


def _line(request: Request) -> str:
    return request.call.data.partition(b"\r\n")[0].decode("ascii", "replace")


def _broken_promises(answers: Answers) -> Iterator[str]:
    broken: Counter[str] = Counter()
    for request, exchange in answers:
        if exchange.status == 200 and not request.keeps_promise(json.loads(exchange.body)):
            broken[request.kind] += 1
            if broken[request.kind] <= MAX_EXAMPLES:
                yield f"{request.kind}: not what was asked for: {_line(request)} {exchange.body[:300]!r}"


def _refusals(answers: Answers, max_refused: float) -> Iterator[str]:
    patient = [exchange for request, exchange in answers if 200 in request.statuses and 504 not in request.statuses]
    n_refused = sum(exchange.status == 429 for exchange in patient)
    if n_refused > max_refused * len(patient):
        yield f"{n_refused} of {len(patient)} requests without a deadline were refused, more than {max_refused:.1%}"


def _growth(course: Course, max_bytes: float) -> Iterator[str]:
    first, last = memory_windows(course.memory)
    if last - first > max_bytes:
        yield f"memory grew from {first / 1e6:.0f} MB to {last / 1e6:.0f} MB, more than {max_bytes / 1e6:.0f} MB"


def memory_windows(memory: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Return the medians of the first and the last minute, or quarter if that is shorter. Units: bytes"""
    end = memory[-1][0]
    seconds = min(WINDOW_SECONDS, end / 4)
    first = [size for at, size in memory if at <= seconds]
    last = [size for at, size in memory if at >= end - seconds]
    return statistics.median(first), statistics.median(last)


def _versions(exchanges: Sequence[Exchange], course: Course) -> Iterator[str]:
    answered = versions_that_answered(exchanges)
    for version, _, _ in course.reloads:
        if not answered[version]:
            yield f"version {version} was published and listed, and never answered"
    if len(course.reloads) != 2:
        yield f"of 2 new versions {len(course.reloads)} were served before the end"
    elif course.last_versions != [course.reloads[-1][0]]:
        yield f"versions {course.last_versions} are listed at the end, not just {course.reloads[-1][0]}"


def versions_that_answered(exchanges: Sequence[Exchange]) -> Counter[str]:
    ran = [read_ran(exchange.body) for exchange in exchanges if exchange.status == 200]
    return Counter(one.version for one in ran if one is not None)


def summarise(
    requests: Sequence[Request], exchanges: Sequence[Exchange], course: Course, effort: Effort
) -> dict[str, Any]:
    """Make the JSON's content."""
    by_kind: dict[str, list[Exchange]] = defaultdict(list)
    for request, exchange in zip(requests, exchanges, strict=True):
        by_kind[request.kind].append(exchange)
    first, last = memory_windows(course.memory)
    return {
        "kinds": {kind: _summarise_kind(found) for kind, found in by_kind.items()}
        | {"all": _summarise_kind(exchanges)},
        "memory": {"first_bytes": first, "last_bytes": last, "samples": course.memory},
        "reloads": course.reloads,
        "versions": dict(versions_that_answered(exchanges)),
        "latencies": _bins(exchanges, course.started_at),
        "client": asdict(effort),
    }


def _summarise_kind(exchanges: Sequence[Exchange]) -> dict[str, Any]:
    waits = _waits(exchanges)
    statuses = Counter(_status(exchange.status) for exchange in exchanges)
    return {
        "statuses": dict(sorted(statuses.items())),
        "p50_ms": percentile(waits, 50),
        "p99_ms": percentile(waits, 99),
    }


def _waits(exchanges: Sequence[Exchange]) -> list[float]:
    return [one.latency_ms for one in exchanges if one.status == 200 and one.latency_ms is not None]


def _bins(exchanges: Sequence[Exchange], started_at: float) -> list[tuple[float, float, float]]:
    """Return when, p50 and p99 in ms, of equal parts of the time."""
    width = max(one.due_at - started_at for one in exchanges) / N_BINS
    bins: dict[int, list[Exchange]] = defaultdict(list)
    for one in exchanges:
        bins[min(N_BINS - 1, int((one.due_at - started_at) / width))].append(one)
    waits = {place: _waits(found) for place, found in sorted(bins.items())}
    return [
        ((place + 0.5) * width, percentile(found, 50) or 0.0, percentile(found, 99) or 0.0)
        for place, found in waits.items()
        if found
    ]


def markdown(content: dict[str, Any]) -> str:
    about, memory, client = content["about"], content["memory"], content["client"]
    lines = ["| callers | answered with | p50 ms | p99 ms |", "|---|---|---:|---:|"]
    for kind, found in content["kinds"].items():
        statuses = ", ".join(f"{status}: {n}" for status, n in found["statuses"].items())
        p50, p99 = ("" if found[name] is None else f"{found[name]:.1f}" for name in ("p50_ms", "p99_ms"))
        lines.append(f"| {kind} | {statuses} | {p50} | {p99} |")
    reloads = ", ".join(f"{version} ({after:.1f} s until served)" for version, _, after in content["reloads"]) or "none"
    settings = "".join(f", {name}={value}" for name, value in about["setting"]) or ", none"
    n_violations = len(content["violations"])
    lines += [
        "",
        f"{about['model']}, {about['minutes']:g} minutes at {about['load']:.0%} of the {about['capacity']:.0f} "
        f"requests/s that it answers of this mixture, Poisson arrivals; settings{settings}. Versions published "
        f"meanwhile: {reloads}; answers by version: {content['versions']}. Memory: "
        f"{memory['first_bytes'] / 1e6:.0f} MB in the first minute, {memory['last_bytes'] / 1e6:.0f} MB in the last "
        f"(medians; or quarters, if shorter). Latencies are of answers with 200. Client: {client['cpu_share']:.0%} of "
        f"one core, p99 lag {client['lag_p99_ms']:.1f} ms.",
        "",
        f"**{n_violations} violations**: statuses and promises of every request, the server's counts against its "
        "callers', memory, versions.",
        *(f"- {violation}" for violation in content["violations"]),
    ]
    return "\n".join(lines) + "\n"


def draw_figure(content: dict[str, Any]) -> Figure:
    """Draw memory and latencies over time, and when versions were published."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    times, sizes = zip(*content["memory"]["samples"], strict=True)
    left.plot(times, [size / 1e6 for size in sizes])
    left.set(title="Memory", xlabel="s", ylabel="resident, MB", ylim=(0, None))
    middles, p50s, p99s = zip(*content["latencies"], strict=True)
    right.plot(middles, p50s, label="p50")
    right.plot(middles, p99s, label="p99")
    right.set(title="Latency of answers with 200", xlabel="s", ylabel="ms", yscale="log")
    right.legend()
    for version, published_at, _ in content["reloads"]:
        for axes in (left, right):
            axes.axvline(published_at, color="grey", linestyle=":")
        left.text(published_at, 0, f" version {version}", color="grey", verticalalignment="bottom")
    return figure
