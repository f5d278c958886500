"""The report of the graphs: one row per graph, one column per batch size."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def tables(content: dict[str, Any]) -> str:
    about, timings = content["about"], content["timings"]
    batches = list(dict.fromkeys(row["batch"] for row in timings))
    heads = [f"images/s, batch {batch}" for batch in batches]
    lines = [f"| policy | r | top-1 % (95 % interval) | GMACs | {' | '.join(heads)} |"]
    lines.append("|---|" + "---:|" * (3 + len(batches)))
    baseline = timings[0]["gmacs"]
    by_graph: dict[tuple[str, int | None], list[Row]] = {}
    for row in timings:
        by_graph.setdefault((row["policy"], row["r"]), []).append(row)
    for (policy, r), rows in by_graph.items():
        cells = [f"{row['images_per_second']:.0f} ({row['ratio']:.2f}×)" for row in rows]
        gmacs, accuracy = rows[0]["gmacs"], _accuracy(rows[0]["accuracy"])
        cost = f"{gmacs:.3f} ({gmacs / baseline:.0%})"
        lines.append(f"| {policy} | {'adaptive' if r is None else r} | {accuracy} | {cost} | {' | '.join(cells)} |")
    threads = about["threads"] or "one per core"
    lines += ["", f"{about['model']}, data {about['data']}, {about['rounds']} interleaved rounds, threads: {threads}."]
    return "\n".join(lines) + "\n"


def _accuracy(measured: dict[str, Any] | None) -> str:
    if measured is None:
        return "not measured"
    low, high = (f"{100 * bound:.2f}" for bound in measured["ci95"])
    return f"{100 * measured['top1']:.2f} ({low} … {high})"
