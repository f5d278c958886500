"""The report of `benchmarks.sizing`: its rounds as two tables and a picture."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from benchmarks.report import Spread, spread

Row = dict[str, Any]
Variant = tuple[str, int | None]


def list_variants(carried: list[Row]) -> list[Variant]:
    return list(dict.fromkeys((row["policy"], row["r"]) for row in carried))


def over_rounds(carried: list[Row], variant: Variant, field: str) -> Spread:
    return spread([row[field] for row in carried if (row["policy"], row["r"]) == variant])


def markdown(content: Row) -> str:
    about, carried, cores = content["about"], content["carried"], content["about"]["host"]["cores"]
    lines = [
        "| policy | r | requests/s | a core | p50 ms | p99 ms | p50 ms of a lone caller |",
        "|---|---:|" + "---:|" * 5,
    ]
    for policy, r in list_variants(carried):
        full, p50, p99, alone = (
            over_rounds(carried, (policy, r), field) for field in ("per_second", "p50_ms", "p99_ms", "alone_ms")
        )
        name, a_core = "adapts" if r is None else str(r), f"{full.median / cores:.0f}"
        lines.append(f"| {policy} | {name} | {full.text()} | {a_core} | {p50.text()} | {p99.text()} | {alone.text()} |")
    lines += ["", *_start_lines(content["starts"]), ""]
    lines.append(
        f"{about['model']}, {about['n_images']} different JPEGs, {about['connections']} connections; {about['rounds']} "
        f"rounds of {about['seconds']} s for each, in turns; medians (least … most). wrk shares {cores} cores with the "
        "containers."
    )
    return "\n".join(lines) + "\n"


def _start_lines(starts: list[Row]) -> list[str]:
    def megabytes(service: str, field: str) -> str:
        return spread([start[field][service] / 1e6 for start in starts]).text(0)

    ready, healthy = (spread([start[field] for start in starts]) for field in ("ready_seconds", "healthy_seconds"))
    return [
        "| `docker-compose up`, from the command on | |",
        "|---|---:|",
        f"| ready, s | {ready.text()} |",
        f"| all healthy by Docker's checks (every 5 s), s | {healthy.text()} |",
        *(
            f"| memory of {service} {when}, MB | {megabytes(service, field)} |"
            for service in starts[0]["bytes_at_rest"]
            for when, field in (("at rest", "bytes_at_rest"), ("after all the load", "bytes_under_load"))
        ),
    ]


def draw_figure(content: Row) -> Figure:
    carried = content["carried"]
    variants = list_variants(carried)
    names = [policy if r is None else f"{policy}\nr = {r}" for policy, r in variants]
    figure = Figure(figsize=(1.5 + 0.75 * len(variants), 6), layout="constrained")
    shown = (("per_second", "requests/s"), ("alone_ms", "p50 of a lone caller, ms"))
    for axes, (field, label) in zip(figure.subplots(2, 1, sharex=True), shown, strict=True):
        found = [over_rounds(carried, variant, field) for variant in variants]
        medians = [one.median for one in found]
        errors = [[one.median - one.least for one in found], [one.most - one.median for one in found]]
        axes.bar(range(len(variants)), medians, yerr=errors, capsize=3, color="tab:blue")
        axes.set_ylabel(label)
        axes.grid(axis="y", alpha=0.3)
        axes.set_xticks(range(len(variants)), names, fontsize=8)
    figure.suptitle(f"What {content['about']['host']['cores']} cores carry, in containers (least … most of the rounds)")
    return figure
