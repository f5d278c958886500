"""The soak report: violations, and a table and figure of the run."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from matplotlib.figure import Figure

from benchmarks.load.open_loop import CallResult, ClientLoad
from benchmarks.report import describe_settings
from benchmarks.soak.requests import Request
from benchmarks.soak.violations import Observations, count_versions, describe_status, memory_windows
from benchmarks.spread import percentile

N_BINS = 60


def summarise(
    requests: Sequence[Request], results: Sequence[CallResult], seen: Observations, client: ClientLoad
) -> dict[str, Any]:
    """Return the content of the JSON file."""
    by_kind: dict[str, list[CallResult]] = defaultdict(list)
    for request, result in zip(requests, results, strict=True):
        by_kind[request.kind].append(result)
    first, last = memory_windows(seen.memory)
    return {
        "kinds": {kind: _summarise_kind(found) for kind, found in by_kind.items()} | {"all": _summarise_kind(results)},
        "memory": {"first_bytes": first, "last_bytes": last, "samples": seen.memory},
        "reloads": seen.reloads,
        "versions": dict(count_versions(results)),
        "latencies": _bins(results, seen.started_at),
        "client": asdict(client),
    }


def _summarise_kind(results: Sequence[CallResult]) -> dict[str, Any]:
    latencies = _latencies(results)
    statuses = Counter(describe_status(result.status) for result in results)
    return {
        "statuses": dict(sorted(statuses.items())),
        "p50_ms": percentile(latencies, 50),
        "p99_ms": percentile(latencies, 99),
    }


def _latencies(results: Sequence[CallResult]) -> list[float]:
    return [one.latency_ms for one in results if one.status == 200 and one.latency_ms is not None]


def _bins(results: Sequence[CallResult], started_at: float) -> list[tuple[float, float, float]]:
    """Return time in s, p50 and p99 in ms for equal parts of the run."""
    width = max(one.due_at - started_at for one in results) / N_BINS
    bins: dict[int, list[CallResult]] = defaultdict(list)
    for one in results:
        bins[min(N_BINS - 1, int((one.due_at - started_at) / width))].append(one)
    latencies = {place: _latencies(found) for place, found in sorted(bins.items())}
    return [
        ((place + 0.5) * width, percentile(found, 50) or 0.0, percentile(found, 99) or 0.0)
        for place, found in latencies.items()
        if found
    ]


def tables(content: dict[str, Any]) -> str:
    about, memory, client = content["about"], content["memory"], content["client"]
    lines = ["| request | responses by status | p50 ms | p99 ms |", "|---|---|---:|---:|"]
    for kind, found in content["kinds"].items():
        statuses = ", ".join(f"{status}: {n}" for status, n in found["statuses"].items())
        p50, p99 = ("" if found[name] is None else f"{found[name]:.1f}" for name in ("p50_ms", "p99_ms"))
        lines.append(f"| {kind} | {statuses} | {p50} | {p99} |")
    reloads = ", ".join(f"{version} (served after {after:.1f} s)" for version, _, after in content["reloads"]) or "none"
    answers = ", ".join(f"{n} by version {version}" for version, n in content["versions"].items()) or "none"
    n_violations = len(content["violations"])
    lines += [
        "",
        f"{about['model']}, {about['minutes']:g} minutes at {about['load']:.0%} of the capacity for this mixture, "
        f"{about['capacity']:.0f} requests/s; Poisson arrivals, settings: {describe_settings(about['setting'])}. "
        f"Versions published during the run: {reloads}. Answers: {answers}. Memory: "
        f"{memory['first_bytes'] / 1e6:.0f} MB in the first minute, {memory['last_bytes'] / 1e6:.0f} MB in the last "
        f"(medians; quarters of runs shorter than 4 minutes). Latencies of responses with status 200. Client: "
        f"{client['cpu_share']:.0%} of one core, p99 lag {client['lag_p99_ms']:.1f} ms.",
        "",
        f"**Violations: {n_violations}.** Checked: the status and content of every response, the server's request "
        "counts against the clients', memory, versions.",
        *(f"- {violation}" for violation in content["violations"]),
    ]
    return "\n".join(lines) + "\n"


def draw_figure(content: dict[str, Any]) -> Figure:
    """Draw memory and latency over time, with the times of publication."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    times, sizes = zip(*content["memory"]["samples"], strict=True)
    left.plot(times, [size / 1e6 for size in sizes])
    left.set(title="Memory", xlabel="s", ylabel="resident, MB", ylim=(0, None))
    middles, p50s, p99s = zip(*content["latencies"], strict=True)
    right.plot(middles, p50s, label="p50")
    right.plot(middles, p99s, label="p99")
    right.set(title="Latency of responses with status 200", xlabel="s", ylabel="ms", yscale="log")
    right.legend()
    for version, published_at, _ in content["reloads"]:
        for axes in (left, right):
            axes.axvline(published_at, color="grey", linestyle=":")
        left.text(published_at, 0, f" version {version}", color="grey", verticalalignment="bottom")
    return figure
