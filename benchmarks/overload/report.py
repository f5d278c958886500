"""The overload report: points as tables and two plots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from benchmarks.overload.effective_accuracy import Outcome, Point, best_fixed, compare, effective_accuracy, select
from benchmarks.report import describe_settings

ADAPTIVE = "adaptive"


def tables(content: dict[str, Any]) -> str:
    points, about = points_of(content), content["about"]
    loads = list(dict.fromkeys(point.load for point in points))
    arms = sorted({point.arm for point in points}, key=_place)
    lines = [
        "| load | requests/s | adaptive % | best fixed rate | best fixed % | difference in points (95 % interval) "
        "| mean r | refused % | late % | incorrect % | p50 ms | p99 ms |",
        "|---:|---:|---:|---|" + "---:|" * 8,
        *(_load_line(points, load, about["capacity"]) for load in loads),
        "",
        f"Effective accuracy in %, by arm and load:\n\n| arm | {' | '.join(f'{load:g}' for load in loads)} |",
        "|---|" + "---:|" * len(loads),
    ]
    for arm in arms:
        cells = [_percent(effective_accuracy(select(points, load, arm))) for load in loads]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    lines += ["", _describe(points, about)]
    return "\n".join(lines) + "\n"


def points_of(content: dict[str, Any]) -> list[Point]:
    return [Point(**point) for point in content["points"]]


def _place(arm: str) -> tuple[bool, int]:
    return arm == ADAPTIVE, 0 if arm == ADAPTIVE else int(arm.removeprefix("r="))


def _load_line(points: Sequence[Point], load: float, capacity: float) -> str:
    own = [point for point in select(points, load, ADAPTIVE) if point.is_kept]
    best = best_fixed(points, load, ADAPTIVE)
    baseline = select(points, load, best) if best else []
    difference = compare(own, baseline)
    less = "—"
    if difference is not None:
        low, high = (f"{100 * bound:+.1f}" for bound in difference.ci95)
        less = f"{100 * difference.value:+.1f} ({low} … {high})"
    shares: list[Outcome] = ["refused", "late", "incorrect"]
    cells = [
        f"{load:g}",
        f"{load * capacity:.0f}",
        _percent(effective_accuracy(own)),
        best or "—",
        _percent(effective_accuracy(baseline)),
        less,
        _number(mean_rate(own)),
        *(_percent(mean_share(own, outcome)) for outcome in shares),
        *(_number(_mean([getattr(point, name) for point in own])) for name in ("p50_ms", "p99_ms")),
    ]
    return f"| {' | '.join(cells)} |"


def mean_rate(points: Sequence[Point]) -> float | None:
    return _mean([point.mean_r for point in points if point.is_kept])


def mean_share(points: Sequence[Point], outcome: Outcome) -> float | None:
    return _mean([point.shares[outcome] for point in points if point.is_kept])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _percent(share: float | None) -> str:
    return "—" if share is None else f"{100 * share:.1f}"


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.1f}"


def _describe(points: Sequence[Point], about: dict[str, Any]) -> str:
    dropped = [point for point in points if not point.is_kept]
    failed = sum(round(point.shares["failed"] * point.n_offered) for point in points)
    settings = describe_settings(about["setting"])
    discarded = (
        f"{len(dropped)} of {len(points)} points are discarded, since the client's p99 lag exceeded "
        f"{about['max_lag_ms']:g} ms"
        if dropped
        else f"no point was discarded (limit: {about['max_lag_ms']:g} ms)"
    )
    return (
        f"{about['model']}, policy {about['policy']}, deadline {about['deadline_ms']:g} ms, {about['n_images']} "
        f"labelled test images, {about['rounds']} × {about['seconds']} s per arm and load, interleaved, settings: "
        f"{settings}. Load 1 is {about['capacity']:.0f} requests/s, the capacity at {about['baseline']}. Shares are of "
        f"all requests offered; {failed} got a 500 or no answer. The best fixed rate is chosen by its measured "
        f"result. The interval is a bootstrap over seconds of the same arrivals. Client: at most "
        f"{max(point.cpu_share for point in points):.0%} of one core, p99 lag at most "
        f"{max(point.lag_p99_ms for point in points):.1f} ms; {discarded}."
    )


def draw_figure(content: dict[str, Any]) -> Figure:
    """Draw effective accuracy by load, and mean rate and refusals of the adaptive engine."""
    points, about = points_of(content), content["about"]
    loads = sorted({point.load for point in points})
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    arms = sorted({point.arm for point in points}, key=_place)
    shades = colormaps["viridis"](np.linspace(0, 0.9, len(arms)))
    for arm, shade in zip(arms, shades, strict=True):
        found = [(load, effective_accuracy(select(points, load, arm))) for load in loads]
        known = [(load, 100 * value) for load, value in found if value is not None]
        style: dict[str, Any] = {"color": shade, "marker": "."}
        if arm == ADAPTIVE:
            style = {"color": "black", "linewidth": 2.5, "marker": "o"}
        left.plot([load for load, _ in known], [value for _, value in known], label=arm, **style)
    title = f"Correct within {about['deadline_ms']:g} ms, policy {about['policy']}"
    left.set(title=title, xlabel="load (1: capacity at r = 0)", ylabel="effective accuracy, %", ylim=(0, 100))
    left.legend(fontsize="small", ncols=2)
    own = [(load, [point for point in select(points, load, ADAPTIVE) if point.is_kept]) for load in loads]
    kept = [(load, found) for load, found in own if found]
    right.plot([load for load, _ in kept], [mean_rate(found) for _, found in kept], color="black", marker="o")
    right.set(title="Adaptive engine", xlabel="load", ylabel="mean r of its answers (black)", ylim=(0, None))
    shares = right.twinx()
    refused = [100 * (mean_share(found, "refused") or 0) for _, found in kept]
    shares.plot([load for load, _ in kept], refused, color="tab:red", marker="s", linestyle="--")
    shares.set(ylabel="refused, % (red)", ylim=(0, 100))
    return figure
