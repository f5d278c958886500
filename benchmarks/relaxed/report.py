"""The report of relaxed merging: two tables."""

from __future__ import annotations

from typing import Any


def tables(content: dict[str, Any]) -> str:
    lines = [
        "| step | ms | relative to forward | relative to forward and backward | peak memory, MB |",
        "|---|---:|---:|---:|---:|",
    ]
    for cost in content["steps"]:
        ratios = f"{cost['to_forward']:.2f}× | {cost['to_both']:.2f}×"
        lines.append(f"| {cost['step']} | {1e3 * cost['seconds']:.1f} | {ratios} | {cost['peak_bytes'] / 1e6:.0f} |")
    lines += [
        "",
        "| r | grouping, ms | formula under autograd, ms | speed-up | peak memory, MB | formula: peak memory, MB |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row in content["grouping"]:
        times = f"{1e3 * row['seconds']:.2f} | {1e3 * row['plain_seconds']:.2f} | {row['speed_up']:.1f}×"
        memory = f"{row['peak_bytes'] / 1e6:.1f} | {row['plain_peak_bytes'] / 1e6:.1f}"
        lines.append(f"| {row['r']} | {times} | {memory} |")
    settings = ", ".join(f"{key} {value}" for key, value in content["about"].items())
    lines += [
        "",
        f"Medians over interleaved rounds: {settings}. Relaxed steps are forward and backward to the embedding only "
        "(modular training). Grouping: the scores of one block, forward and backward.",
    ]
    return "\n".join(lines) + "\n"
