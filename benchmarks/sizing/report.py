"""The sizing report: rounds as two tables and a figure."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from benchmarks.spread import Spread, error_bars, spread

Row = dict[str, Any]
Variant = tuple[str, int | None]


def list_variants(loads: list[Row]) -> list[Variant]:
    return list(dict.fromkeys((row["policy"], row["r"]) for row in loads))


def over_rounds(loads: list[Row], variant: Variant, field: str) -> Spread:
    return spread([row[field] for row in loads if (row["policy"], row["r"]) == variant])


def tables(content: Row) -> str:
    about, loads, cores = content["about"], content["variants"], content["about"]["host"]["cores"]
    lines = [
        "| policy | r | requests/s | per core | p50 ms | p99 ms | single client: p50 ms |",
        "|---|---:|" + "---:|" * 5,
    ]
    for policy, r in list_variants(loads):
        full, p50, p99, single = (
            over_rounds(loads, (policy, r), field) for field in ("per_second", "p50_ms", "p99_ms", "single_client_ms")
        )
        name, per_core = "adaptive" if r is None else str(r), f"{full.median / cores:.0f}"
        lines.append(
            f"| {policy} | {name} | {full.text()} | {per_core} | {p50.text()} | {p99.text()} | {single.text()} |"
        )
    lines += ["", *_start_lines(content["starts"]), ""]
    lines.append(
        f"{about['model']}, {about['n_images']} distinct JPEGs, {about['connections']} connections, "
        f"{about['rounds']} × {about['seconds']} s per variant, each in a new stack; median (min … max). wrk "
        f"shares {cores} cores with the containers."
    )
    return "\n".join(lines) + "\n"


def _start_lines(starts: list[Row]) -> list[str]:
    def megabytes(service: str, field: str) -> str:
        return spread([start[field][service] / 1e6 for start in starts]).text(0)

    ready, healthy = (spread([start[field] for start in starts]) for field in ("ready_seconds", "healthy_seconds"))
    return [
        "| start, from `docker compose up` | |",
        "|---|---:|",
        f"| ready, s | {ready.text()} |",
        f"| healthy by Docker's checks (every 5 s), s | {healthy.text()} |",
        *(
            f"| memory of {service} {when}, MB | {megabytes(service, field)} |"
            for service in starts[0]["bytes_at_rest"]
            for when, field in (("at rest", "bytes_at_rest"), ("after the load", "bytes_under_load"))
        ),
    ]


def draw_figure(content: Row) -> Figure:
    loads = content["variants"]
    variants = list_variants(loads)
    names = [policy if r is None else f"{policy}\nr = {r}" for policy, r in variants]
    figure = Figure(figsize=(1.5 + 0.75 * len(variants), 6), layout="constrained")
    shown = (("per_second", "requests/s"), ("single_client_ms", "single client: p50, ms"))
    for axes, (field, label) in zip(figure.subplots(2, 1, sharex=True), shown, strict=True):
        found = [over_rounds(loads, variant, field) for variant in variants]
        medians = [one.median for one in found]
        axes.bar(range(len(variants)), medians, yerr=error_bars(found), capsize=3, color="tab:blue")
        axes.set_ylabel(label)
        axes.grid(axis="y", alpha=0.3)
        axes.set_xticks(range(len(variants)), names, fontsize=8)
    figure.suptitle(f"Compose stack on {content['about']['host']['cores']} cores (bars: min … max of the rounds)")
    return figure
