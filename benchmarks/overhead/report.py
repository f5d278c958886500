"""The overhead report: rounds as two tables and a figure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from benchmarks.report import describe_settings
from benchmarks.spread import Spread, error_bars, spread

LOOP = "bare loop"
SERVICE, PLAIN = "service", "plain FastAPI"
Row = dict[str, Any]


@dataclass(frozen=True)
class Overhead:
    """Latency of a single client beyond decoding and inference. Units: ms, over rounds.

    reported: by the server's own timings, None if it has none. over_loop: over the bare loop.
    """

    reported: Spread | None
    over_loop: Spread


def fastest_loop(throughput: list[Row], r: int) -> str:
    """Return the bare-loop arm with the highest median throughput."""
    arms: list[str] = [row["arm"] for row in throughput if row["r"] == r and row["arm"].startswith(LOOP)]
    return max(arms, key=lambda arm: over_rounds(throughput, r, arm, "per_second").median)


def over_rounds(rows: list[Row], r: int, arm: str, field: str) -> Spread:
    return spread([row[field] for row in rows if (row["r"], row["arm"]) == (r, arm)])


def ratio(throughput: list[Row], r: int, arm: str, baseline: str) -> Spread:
    """Compare requests/s within each round."""
    speeds = {(row["arm"], row["round"]): row["per_second"] for row in throughput if row["r"] == r}
    return spread([speed / speeds[baseline, index] for (name, index), speed in speeds.items() if name == arm])


def overhead(single_client: list[Row], r: int, arm: str) -> Overhead:
    rounds = {(row["arm"], row["round"]): row for row in single_client if row["r"] == r}
    own = [row for (name, _), row in rounds.items() if name == arm]
    reported = [row["overhead_ms"] for row in own if row["overhead_ms"] is not None]
    over = [row["total_ms"] - rounds[LOOP, row["round"]]["total_ms"] for row in own]
    return Overhead(spread(reported) if reported else None, spread(over))


def tables(content: dict[str, Any]) -> str:
    about, throughput, single_client = content["about"], content["throughput"], content["single_client"]
    lines = [
        "| r | arm | requests/s | relative to the fastest bare loop | CPU ms per request | wrk CPU ms per request "
        "| p50 ms | p99 ms |",
        "|---:|---|" + "---:|" * 6,
    ]
    rates = list(dict.fromkeys(row["r"] for row in throughput))
    for r in rates:
        fastest = fastest_loop(throughput, r)
        for arm in dict.fromkeys(row["arm"] for row in throughput if row["r"] == r):
            lines.append(_throughput_line(throughput, r, arm, fastest))
    lines += [
        "",
        "| r | arm | single client: p50 ms | decoding and inference, as reported | overhead, as reported "
        "| overhead over the bare loop |",
        "|---:|---|" + "---:|" * 4,
    ]
    lines += [_single_client_line(single_client, r, arm) for r in rates for arm in (SERVICE, PLAIN, LOOP)]
    lines += [
        "",
        f"{about['model']}, policy {about['policy']}, {about['n_images']} distinct JPEGs, {about['connections']} "
        f"connections, {about['threads']} threads per graph, settings: {describe_settings(about['setting'])}. "
        f"{about['rounds']} × {about['seconds']} s per arm, interleaved; median (min … max). wrk shares the cores with "
        "the servers.",
    ]
    return "\n".join(lines) + "\n"


def _throughput_line(throughput: list[Row], r: int, arm: str, fastest: str) -> str:
    def cell(field: str, text: Callable[[Spread], str]) -> str:
        rows = [row[field] for row in throughput if (row["r"], row["arm"]) == (r, arm)]
        return "" if rows[0] is None else text(spread(rows))

    def ms(value: Spread) -> str:
        return value.text(2)

    cells = [cell("per_second", Spread.text), ratio(throughput, r, arm, fastest).text(3), cell("cpu_ms", ms)]
    cells += [cell("client_cpu_ms", ms), cell("p50_ms", Spread.text), cell("p99_ms", Spread.text)]
    name = f"**{arm}**" if arm == fastest else arm
    return f"| {r} | {name} | {' | '.join(cells)} |"


def _single_client_line(single_client: list[Row], r: int, arm: str) -> str:
    total = over_rounds(single_client, r, arm, "total_ms").text(2)
    if arm == LOOP:
        return f"| {r} | {arm} | {total} | | | |"
    found = overhead(single_client, r, arm)
    if found.reported is None:
        return f"| {r} | {arm} | {total} | | | {found.over_loop.text(2)} |"
    work = over_rounds(single_client, r, arm, "work_ms").text(2)
    return f"| {r} | {arm} | {total} | {work} | {found.reported.text(2)} | {found.over_loop.text(2)} |"


def draw_figure(content: dict[str, Any]) -> Figure:
    """Draw requests/s by arm and rate, and the overhead for a single client."""
    throughput, single_client = content["throughput"], content["single_client"]
    rates = list(dict.fromkeys(row["r"] for row in throughput))
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    arms = list(dict.fromkeys(row["arm"] for row in throughput))
    width = 0.8 / len(arms)
    for place, arm in enumerate(arms):
        found = [over_rounds(throughput, r, arm, "per_second") for r in rates]
        at = [index + (place - (len(arms) - 1) / 2) * width for index in range(len(rates))]
        left.bar(at, [one.median for one in found], width, label=arm, yerr=error_bars(found))
    ticks = {"xticks": range(len(rates)), "xticklabels": [f"r={r}" for r in rates]}
    left.set(title="Throughput at saturation", ylabel="requests/s", **ticks)
    left.legend(fontsize="small", loc="upper left", bbox_to_anchor=(0, -0.08), ncols=3)
    for place, arm in enumerate((SERVICE, PLAIN)):
        found = [overhead(single_client, r, arm).over_loop for r in rates]
        at = [index + (place - 0.5) * 0.4 for index in range(len(rates))]
        right.bar(at, [one.median for one in found], 0.4, label=arm, yerr=error_bars(found))
    right.set(title="Single client", ylabel="p50 over the bare loop, ms", **ticks)
    right.legend(fontsize="small")
    return figure
