"""Draw the dashboard from real data, except the GPU's row: `python -m tests.deploy.draw_dashboard`.

Runs a service with the reference model, Debian's Prometheus and every kind of traffic. Writes docs/dashboard.png.
"""

import argparse
import json
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from deploy.grafana.page import unit_name
from tests.deploy.prometheus import run_prometheus
from tests.deploy.queries import DASHBOARD, DEPLOY, Sample, ask, fill_in, panels
from tests.deploy.traffic import Address, send_all_kinds
from tests.integration.server import Server

ROOT = DEPLOY.parent
# Clients, in equal parts of the time.
PHASES = (4, 40, 4)
STEP_SECONDS = 2.0
WINDOW = "10s"
COLUMN_INCHES, LINE_INCHES = 0.75, 0.34
COLOURS = {"green": "#3a8f3a", "orange": "#e07b00", "red": "#c4262e", "yellow": "#d9b300", "blue": "#2f6db5"}

# Of time series, to the units below.
SCALES = {"percentunit": 100.0, "s": 1e3, "bytes": 2.0**-20}
UNITS = {"percentunit": "%", "s": "ms", "bytes": "MiB"}

TAB20 = colormaps["tab20"](range(20))

# Legends and their series.
NamedSeries = list[tuple[str, Sample]]


def draw(prometheus_url: str, seconds: float) -> Figure:
    """Draw the last seconds of a Prometheus' data."""
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    rows = [row for row in board["panels"] if row["type"] == "row" and not row.get("collapsed")]
    shown = [panel for row, panel in panels(board) if row in {row["title"] for row in rows}]
    n_lines = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in shown)
    figure = Figure(figsize=(24 * COLUMN_INCHES, n_lines * LINE_INCHES), facecolor="white")
    for row in rows:
        y = 1 - (row["gridPos"]["y"] + 0.7) / n_lines
        figure.text(0.005, y, row["title"], fontsize=14, fontweight="bold", color="#444")
    for panel in shown:
        at = panel["gridPos"]
        # Space for the legend.
        below = 0.4 if panel["type"] == "stat" else 2.2
        left, bottom = (at["x"] + 0.6) / 24, 1 - (at["y"] + at["h"] - below) / n_lines
        axes = figure.add_axes((left, bottom, (at["w"] - 0.8) / 24, (at["h"] - below - 1.2) / n_lines))
        axes.set_prop_cycle(color=TAB20)
        unit = panel["fieldConfig"]["defaults"]["unit"]
        unit = "" if panel["type"] == "stat" else UNITS.get(unit, unit_name(unit))
        axes.set_title(f"{panel['title']}   {unit}", fontsize=9, loc="left")
        DRAWERS[panel["type"]](axes, panel, query(prometheus_url, panel, seconds))
    return figure


def query(prometheus_url: str, panel: dict[str, Any], seconds: float) -> NamedSeries:
    """Run all queries of a panel, and name the series as its legend does."""
    found = [
        (name_series(target["legendFormat"], sample.labels), sample)
        for target in panel["targets"]
        for sample in ask(prometheus_url, fill_in(target["expr"], WINDOW), seconds, STEP_SECONDS)
    ]
    return sorted(((name, sample) for name, sample in found if sample.values), key=lambda item: natural(item[0]))


def name_series(legend: str, labels: dict[str, str]) -> str:
    return re.sub(r"{{(\w+)}}", lambda part: labels.get(part[1], ""), legend)


def natural(name: str) -> list[str]:
    """Return a key for natural sort order: tome 8 before tome 16."""
    return [word.zfill(9) if word.isdigit() else word for word in name.split()]


def align(series: NamedSeries) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Align all series on one time axis, with NaN for missing values. Shapes: (T,), (N, T)."""
    times = np.array(sorted({at for _, sample in series for at in sample.times}))
    values = np.full((len(series), len(times)), np.nan)
    for line, (_, sample) in zip(values, series, strict=True):
        line[np.searchsorted(times, sample.times)] = sample.values
    return times - times[0], values


def draw_timeseries(axes: Axes, panel: dict[str, Any], series: NamedSeries) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    times, values = align(series)
    values *= SCALES.get(defaults["unit"], 1)
    names = [name for name, _ in series]
    if defaults["custom"].get("stacking"):
        axes.stackplot(times, np.nan_to_num(values), labels=names, colors=TAB20)
    else:
        for name, line in zip(names, values, strict=True):
            axes.plot(times, line, label=name, linewidth=1.2)
    for step in defaults["thresholds"]["steps"][1:]:
        level = step["value"] * SCALES.get(defaults["unit"], 1)
        if level < 1.6 * np.nanmax(values):
            axes.axhline(level, color=COLOURS[step["color"]], linestyle="--", linewidth=1)
    axes.set_ylim(0, defaults["max"] * SCALES.get(defaults["unit"], 1) if "max" in defaults else None)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)
    n_columns = 6 if panel["gridPos"]["w"] < 12 else 9
    axes.legend(
        fontsize=6.5,
        handlelength=1,
        columnspacing=1,
        ncols=n_columns,
        loc="upper left",
        bbox_to_anchor=(-0.03, -0.1),
        frameon=False,
    )


def draw_stat(axes: Axes, panel: dict[str, Any], series: NamedSeries) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    words = {key: word for mapping in defaults.get("mappings", []) for key, word in mapping["options"].items()}
    axes.set_axis_off()
    for place, (name, sample) in enumerate(series):
        value = sample.values[-1]
        word = words.get(f"{value:g}", {"text": text(value, defaults["unit"]), "color": colour(value, defaults)})
        x = (place + 0.5) / len(series)
        axes.text(x, 0.55, word["text"], ha="center", va="center", fontsize=16, color=COLOURS[word["color"]])
        if panel["options"]["textMode"] == "value_and_name":
            axes.text(x, 0.1, name, ha="center", va="center", fontsize=8)


def draw_heatmap(axes: Axes, panel: dict[str, Any], series: NamedSeries) -> None:
    ordered = sorted(series, key=lambda item: float(item[0]))
    times, values = align(ordered)
    counts = np.diff(np.nan_to_num(values), axis=0, prepend=0)
    last = max(2, int(np.flatnonzero(counts.sum(axis=1) > 0.5).max()) + 1)
    axes.pcolormesh(times, np.arange(last), counts[:last], cmap="Blues", shading="nearest")
    axes.set_yticks(np.arange(last), [name for name, _ in ordered[:last]], fontsize=7)
    axes.tick_params(labelsize=7)


DRAWERS = {"timeseries": draw_timeseries, "stat": draw_stat, "heatmap": draw_heatmap}


def colour(value: float, defaults: dict[str, Any]) -> str:
    steps = defaults["thresholds"]["steps"]
    reached = [step["color"] for step in steps if step["value"] is None or value >= step["value"]]
    return str(reached[-1])


def text(value: float, unit: str) -> str:
    """Format a value as Grafana does."""
    if unit == "percentunit":
        return f"{100 * value:.1f} %"
    if unit in ("s", "dtdurations"):
        return f"{1e3 * value:.3g} ms" if value < 1 else f"{value:.3g} s"
    return f"{value:.3g} {unit_name(unit)}".strip()


def record(folder: Path, seconds: float) -> Figure:
    """Run a service and a Prometheus, send traffic to the service, and draw the Prometheus' data."""
    image = next(iter(sorted((ROOT / "examples").glob("*.jpg")))).read_bytes()
    with (
        Server(ROOT / "model_store", folder / "server.log") as server,
        run_prometheus(folder / "prometheus", server.port) as url,
    ):
        time.sleep(5)
        for n_clients in PHASES:
            send_all_kinds(Address("127.0.0.1", server.port), image, seconds / len(PHASES), n_clients)
        return draw(url, seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/dashboard.png")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        record(Path(folder), options.seconds).savefig(options.out, dpi=80)
    # A third of the size.
    Image.open(options.out).quantize(128).save(options.out, optimize=True)


if __name__ == "__main__":
    main()
