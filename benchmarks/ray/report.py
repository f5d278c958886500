"""The comparison of servers: one table."""

from __future__ import annotations

from typing import Any

from benchmarks.spread import spread


def tables(content: dict[str, Any]) -> str:
    about, rows = content["about"], content["rows"]
    baseline = rows[0]["server"]
    lines = [
        f"| r | server | requests/s | relative to {baseline} | single client: p50 ms |",
        "|---:|---|---:|---:|---:|",
    ]
    for r, server in dict.fromkeys((row["r"], row["server"]) for row in rows):
        found = [row for row in rows if (row["r"], row["server"]) == (r, server)]
        speeds = {row["round"]: row["per_second"] for row in rows if (row["r"], row["server"]) == (r, baseline)}
        cells = [
            spread([row["per_second"] for row in found]).text(),
            spread([row["per_second"] / speeds[row["round"]] for row in found]).text(2),
            spread([row["single_client_ms"] for row in found]).text(),
        ]
        lines.append(f"| {r} | {server} | {' | '.join(cells)} |")
    lines += [
        "",
        f"{about['connections']} connections, {about['rounds']} × {about['seconds']} s per server, interleaved; "
        "median (min … max). wrk shares the cores with the servers.",
    ]
    return "\n".join(lines) + "\n"
