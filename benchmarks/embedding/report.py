"""The report of the embedding's cost: two tables and a figure."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

MAX_MORE_GMACS, MAX_MORE_LATENCY = 0.015, 0.02


def tables(content: dict[str, Any]) -> str:
    about = content["about"]
    lines = [
        "| r | GMACs, ToMe | GMACs, DTEM | difference | embedding only |",
        "|---:|---:|---:|---:|---:|",
    ]
    for cost in content["compute"]:
        more, embedding = cost["dtem"] / cost["tome"] - 1, cost["embedding"] / cost["tome"]
        lines.append(f"| {cost['r']} | {cost['tome']:.4f} | {cost['dtem']:.4f} | {more:+.2%} | {embedding:+.2%} |")
    lines += ["", "| r | batch | ToMe, ms | DTEM, ms | difference (95 % interval) |", "|---:|---:|---:|---:|---:|"]
    for row in content["latency"]:
        low, high = (f"{bound - 1:+.2%}" for bound in row["ratio"]["ci95"])
        times = f"{row['tome_ms']:.2f} | {row['dtem_ms']:.2f} | {row['ratio']['median'] - 1:+.2%} ({low} … {high})"
        lines.append(f"| {row['r']} | {row['batch']} | {times} |")
    lines += [
        "",
        f"{about['model']}, d' = {about['dim']}. GMACs per image by formula, equal to those counted at export. Latency "
        f"of the exported graphs: {about['clock']} time, {about['threads']} thread(s), {about['rounds']} interleaved "
        "rounds; medians, and the median ratio within rounds with its interval.",
    ]
    return "\n".join(lines) + "\n"


def draw_figure(content: dict[str, Any]) -> Figure:
    """Draw the cost of DTEM over ToMe in percent, with the targets."""
    compute, latency = content["compute"], content["latency"]
    figure = Figure(figsize=(7.5, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar([f"r={cost['r']}" for cost in compute], [100 * (cost["dtem"] / cost["tome"] - 1) for cost in compute])
    left.set(title="GMACs", ylabel="DTEM over ToMe, %")
    places = [f"r={row['r']}, batch {row['batch']}" for row in latency]
    ratios = [row["ratio"] for row in latency]
    more = [100 * (ratio["median"] - 1) for ratio in ratios]
    below = [100 * (ratio["median"] - ratio["ci95"][0]) for ratio in ratios]
    above = [100 * (ratio["ci95"][1] - ratio["median"]) for ratio in ratios]
    right.errorbar(places, more, yerr=(below, above), fmt="o", capsize=4)
    right.set(title="Latency, 95 % interval")
    right.tick_params(axis="x", rotation=20)
    for axes, limit in ((left, MAX_MORE_GMACS), (right, MAX_MORE_LATENCY)):
        axes.axhline(100 * limit, color="tab:red", linestyle="--", label="target: below")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"Cost of the embedding: {content['about']['model']}", fontsize=10)
    return figure
