"""The report of `benchmarks.serve`: its rounds as two tables and a picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from benchmarks.report import Spread, spread

LOOP = "bare loop"
SERVICE, PLAIN = "service", "plain FastAPI"
Row = dict[str, Any]


@dataclass(frozen=True)
class Overhead:
    """What a lone caller waits for beside decoding and inference. Units: ms; over rounds."""

    by_own_timings: Spread | None
    over_loop: Spread


def best_loop(busy: list[Row], r: int) -> str:
    """Name the batch size at which the bare loop is fastest."""
    arms: list[str] = [row["arm"] for row in busy if row["r"] == r and row["arm"].startswith(LOOP)]
    return max(arms, key=lambda arm: over_rounds(busy, r, arm, "per_second").median)


def over_rounds(rows: list[Row], r: int, arm: str, field: str) -> Spread:
    return spread([row[field] for row in rows if (row["r"], row["arm"]) == (r, arm)])


def ratio(busy: list[Row], r: int, arm: str, base: str) -> Spread:
    """Compare requests/s within each round."""
    speeds = {(row["arm"], row["round"]): row["per_second"] for row in busy if row["r"] == r}
    return spread([speed / speeds[base, index] for (name, index), speed in speeds.items() if name == arm])


def overhead(alone: list[Row], r: int, arm: str) -> Overhead:
    rounds = {(row["arm"], row["round"]): row for row in alone if row["r"] == r}
    own = [row for (name, _), row in rounds.items() if name == arm]
    told = [row["overhead_ms"] for row in own if row["overhead_ms"] is not None]
    over = [row["total_ms"] - rounds[LOOP, row["round"]]["total_ms"] for row in own]
    return Overhead(spread(told) if told else None, spread(over))


def markdown(content: dict[str, Any]) -> str:
    about, busy, alone = content["about"], content["busy"], content["alone"]
    lines = [
        "| r | | requests/s | of the best bare loop | CPU ms a request | wrk's CPU ms a request | p50 ms | p99 ms |",
        "|---:|---|" + "---:|" * 6,
    ]
    rates = list(dict.fromkeys(row["r"] for row in busy))
    for r in rates:
        best = best_loop(busy, r)
        for arm in dict.fromkeys(row["arm"] for row in busy if row["r"] == r):
            lines.append(_busy_line(busy, r, arm, best))
    lines += [
        "",
        "| r | | p50 of a lone caller, ms | decoding and inference by its own timings | overhead by them "
        "| overhead over the bare loop |",
        "|---:|---|" + "---:|" * 4,
    ]
    lines += [_alone_line(alone, r, arm) for r in rates for arm in (SERVICE, PLAIN, LOOP)]
    settings = "".join(f", {name}={value}" for name, value in about["setting"]) or ", none"
    lines += [
        "",
        f"{about['model']}, policy {about['policy']}, {about['n_images']} different JPEGs, {about['connections']} "
        f"connections, {about['threads']} threads to each graph, settings{settings}; {about['rounds']} rounds of "
        f"{about['seconds']} s for each, in turns; medians (least … most). wrk shares the cores with the servers.",
    ]
    return "\n".join(lines) + "\n"


def _busy_line(busy: list[Row], r: int, arm: str, best: str) -> str:
    def cell(field: str, text: Callable[[Spread], str]) -> str:
        rows = [row[field] for row in busy if (row["r"], row["arm"]) == (r, arm)]
        return "" if rows[0] is None else text(spread(rows))

    def ms(value: Spread) -> str:
        return value.text(2)

    cells = [cell("per_second", Spread.text), ratio(busy, r, arm, best).text(3), cell("cpu_ms", ms)]
    cells += [cell("client_cpu_ms", ms), cell("p50_ms", Spread.text), cell("p99_ms", Spread.text)]
    name = f"**{arm}**" if arm == best else arm
    return f"| {r} | {name} | {' | '.join(cells)} |"


def _alone_line(alone: list[Row], r: int, arm: str) -> str:
    total = over_rounds(alone, r, arm, "total_ms").text(2)
    if arm == LOOP:
        return f"| {r} | {arm} | {total} | | | |"
    found = overhead(alone, r, arm)
    if found.by_own_timings is None:
        return f"| {r} | {arm} | {total} | | | {found.over_loop.text(2)} |"
    work = over_rounds(alone, r, arm, "work_ms").text(2)
    return f"| {r} | {arm} | {total} | {work} | {found.by_own_timings.text(2)} | {found.over_loop.text(2)} |"


def draw_figure(content: dict[str, Any]) -> Figure:
    """Draw requests/s by arm and rate, and the lone caller's overhead."""
    busy, alone = content["busy"], content["alone"]
    rates = list(dict.fromkeys(row["r"] for row in busy))
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    arms = list(dict.fromkeys(row["arm"] for row in busy))
    width = 0.8 / len(arms)
    for place, arm in enumerate(arms):
        found = [over_rounds(busy, r, arm, "per_second") for r in rates]
        at = [index + (place - (len(arms) - 1) / 2) * width for index in range(len(rates))]
        left.bar(at, [one.median for one in found], width, label=arm, yerr=_error_bars(found))
    left.set(
        title="At saturation", ylabel="requests/s", xticks=range(len(rates)), xticklabels=[f"r={r}" for r in rates]
    )
    left.legend(fontsize="small", loc="upper left", bbox_to_anchor=(0, -0.08), ncols=3)
    for place, arm in enumerate((SERVICE, PLAIN)):
        found = [overhead(alone, r, arm).over_loop for r in rates]
        at = [index + (place - 0.5) * 0.4 for index in range(len(rates))]
        right.bar(at, [one.median for one in found], 0.4, label=arm, yerr=_error_bars(found))
    right.set(title="A lone caller", ylabel="p50 over the bare loop's, ms")
    right.set(xticks=range(len(rates)), xticklabels=[f"r={r}" for r in rates])
    right.legend(fontsize="small")
    return figure


def _error_bars(found: list[Spread]) -> list[list[float]]:
    return [[one.median - one.least for one in found], [one.most - one.median for one in found]]
