"""The report as a page and a picture: `python -m benchmarks.gpu.page runs/gpu.json --out docs/results/gpu`."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Report = dict[str, Any]
EMPTY = "–"


def write_page(report: Report, out: Path, is_final: bool) -> str:
    """Write <out>.json and <out>.md, in the end <out>.png too; return the text of the page."""
    out.with_suffix(".json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    text = markdown(report, out.name)
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    if is_final:
        draw(report, out.with_suffix(".png"))
    return text


def rows_of(report: Report, kind: str) -> list[Row]:
    return [row for step in report["steps"] for row in step["rows"] if row["kind"] == kind]


def markdown(report: Report, name: str) -> str:
    """Lay out every step that has rows."""
    parts = ["# On a GPU", _machine(report)]
    if report["size"] == "smoke":
        parts.append("**A smoke run: tiny models on a CPU. It shows that every step runs; its figures mean nothing.**")
    parts += ["## Steps", _steps(report), _tests(report)]
    sections: list[tuple[str, Callable[[Report], str]]] = [
        ("The models alone", _forward),
        ("The service", _service),
        ("A training step", _training),
    ]
    for title, section in sections:
        if text := section(report):
            parts += [f"## {title}", text]
    parts.append(f"![speed-up by token merging]({name}.png)")
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(heads: Sequence[str], n_texts: int, lines: Iterable[Sequence[object]]) -> str:
    rule = "|" + "---|" * n_texts + "---:|" * (len(heads) - n_texts)
    return "\n".join([f"| {' | '.join(heads)} |", rule, *(f"| {' | '.join(map(str, line))} |" for line in lines)])


def _machine(report: Report) -> str:
    found = rows_of(report, "machine")
    if not found:
        return f"{report['date']}."
    (machine,) = found
    card = machine.get("nvidia_smi") or machine["card"] or "no GPU"
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    limits = [f"{row['tflops']:.1f} in {row['precision']}" for row in rows_of(report, "matrix product")]
    side = next((row["side"] for row in rows_of(report, "matrix product")), 0)
    copies = [f"{row['bytes_per_second'] / 1e12:.2f} TB/s" for row in rows_of(report, "copy on the device")]
    return (
        f"{report['date']}, {card}, {machine['cores']} CPU cores, Python {machine['python']}, commit "
        f"{machine['commit'][:12]}. {packages}.\n\nMatrix products of side {side}, TFLOP/s: {', '.join(limits)}"
        + (f"; a copy on the device, bytes read and written: {copies[0]}." if copies else ".")
    )


def _steps(report: Report) -> str:
    lines = [(one["step"], one["outcome"], one["reason"], f"{one['seconds']:.0f}") for one in report["steps"]]
    return _table(["step", "outcome", "why", "s"], 3, [[_cell(part) for part in line] for line in lines])


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:300]


def _tests(report: Report) -> str:
    lines = [
        (f"`{row['test']}`", row["outcome"], row["warnings"], _cell(row["reason"])) for row in rows_of(report, "test")
    ]
    return _table(["test marked gpu", "outcome", "warnings as", "why"], 4, lines) if lines else ""


def _forward(report: Report) -> str:
    rows = rows_of(report, "forward")
    if not rows:
        return ""
    limit = max((row["tflops"] for row in rows_of(report, "matrix product")), default=None)
    rates = list(dict.fromkeys(row["r"] for row in rows))
    keys = list(dict.fromkeys((row["model"], row["precision"], row["batch"], row["engine"]) for row in rows))
    lines = []
    for key in keys:
        by_rate = {row["r"]: row for row in rows if _key(row) == key}
        cells = [_speed(by_rate.get(r)) for r in rates]
        first = by_rate.get(rates[0])
        share = EMPTY
        if first is not None and limit:
            share = f"{first['images_per_second'] * 2 * first['macs'] / 1e12 / limit:.1%}"
        peaks = [by_rate[r]["peak_bytes"] for r in rates if r in by_rate]
        memory = EMPTY if None in peaks or not peaks else " … ".join(f"{peak / 1e6:.0f}" for peak in peaks)
        lines.append((*key, *cells, share, memory))
    heads = ["model", "precision", "batch", "engine", *(f"r={r}" for r in rates)]
    table = _table([*heads, f"r={rates[0]}: of the best matrix product", "peak MB by r"], 2, lines)
    refused = [
        f"- {row['model']} {row['precision']} batch {row['batch']} {row['engine']} r={row['r']}: {_cell(row['reason'])}"
        for row in rows_of(report, "refused")
    ]
    text = (
        "Images/s of the forward pass, pixels on the device, random weights, policy `tome`; in brackets the speed over "
        f"r={rates[0]}, median of ratios within rounds. float32 without TF32. Peak memory is beyond weights and pixels."
    )
    return "\n\n".join([text, table, *(["Could not be run:\n\n" + "\n".join(refused)] if refused else [])])


def _key(row: Row) -> tuple[str, str, int, str]:
    return row["model"], row["precision"], row["batch"], row["engine"]


def _speed(row: Row | None) -> str:
    if row is None:
        return EMPTY
    ratio = "" if row["ratio"] is None else f" ({row['ratio']:.2f}×)"
    return f"{row['images_per_second']:.0f}{ratio}"


def _service(report: Report) -> str:
    parts = [_exports(report), _parity(report), _load(report), _decode(report)]
    engine = report.get("engine", "torchscript")
    text = (
        f"`python -m app` with the engine {engine} in float32, policy `tome`. Requests/s of clients in one Python "
        "process that ask again as soon as they are answered; a JPEG is decoded and resized by the service, pixels "
        "come as a binary tensor over `/v2`. The bare loop is the same graphs through the same backend: no HTTP, no "
        "queue, batches from the host's memory."
    )
    found = [part for part in parts if part]
    return "\n\n".join([text, *found]) if found else ""


def _exports(report: Report) -> str:
    lines = []
    for row in rows_of(report, "export"):
        worst = max(row["parity"].values())
        loaded = [one["device_bytes"] for one in rows_of(report, "loaded") if one["model"] == row["model"]]
        memory = " + ".join(f"{n_bytes / 1e6:.0f}" for n_bytes in loaded) or EMPTY
        start = next((one for one in rows_of(report, "start") if one["model"] == row["model"]), None)
        begun = EMPTY if start is None else f"{start['seconds']:.0f}"
        lines.append((row["model"], f"{row['seconds']:.0f}", f"{worst:.1e}", begun, memory))
    heads = ["model", "export, s", "largest difference from eager", "start until ready, s", "graphs on the device, MB"]
    return _table(heads, 1, lines) if lines else ""


def _parity(report: Report) -> str:
    lines = [
        (
            *(row["model"], row["r"], f"{row['n_clear']} of {row['n_images']}"),
            *(_small(row["logit_difference"]), _small(row["logit_difference_of_all"])),
            *(f"{row['largest_logit']:.2f}", f"{row['same_label']} of {row['n_images']}"),
            _small(row["probability_difference"]),
        )
        for row in rows_of(report, "parity")
    ]
    heads = ["model", "r", "clearly decided", "largest logit difference, those", "all"]
    heads += ["largest logit", "same label", "probability difference, JPEGs"]
    text = "Answers of the service against eager PyTorch on the CPU:"
    return f"{text}\n\n{_table(heads, 1, lines)}" if lines else ""


def _small(value: float | None) -> str:
    return EMPTY if value is None else f"{value:.1e}"


def _load(report: Report) -> str:
    rows = rows_of(report, "load")
    loops = {(row["model"], row["r"]): row for row in rows_of(report, "bare loop")}
    lines: list[Sequence[object]] = []
    for model in dict.fromkeys(row["model"] for row in [*rows_of(report, "bare loop"), *rows]):
        rates = [r for name, r in loops if name == model]
        speeds = [loops[model, r]["images_per_second"] for r in rates]
        cells = {r: f"{speed:.0f} ({speed / speeds[0]:.2f}×)" for r, speed in zip(rates, speeds, strict=True)}
        used = list(dict.fromkeys(row["r"] for row in rows if row["model"] == model)) or [rates[0], rates[-1]]
        batch = next(loops[model, r]["batch"] for r in rates)
        lines.append((model, f"bare loop, batch {batch}", *(cells[r] for r in used), *[EMPTY] * 5))
        for body, n in dict.fromkeys((row["body"], row["connections"]) for row in rows if row["model"] == model):
            by_rate = {
                r: [
                    row
                    for row in rows
                    if (row["model"], row["body"], row["connections"], row["r"]) == (model, body, n, r)
                ]
                for r in used
            }
            lines.append((model, f"{body}, {n} connections", *_load_cells(by_rate, model, loops)))
    if not lines:
        return ""
    heads = ["model", "", *(f"r={r}" for r in used), "of the bare loop, by r", "batch, by r", "p50 ms, by r"]
    return _table([*heads, "server's CPU cores, by r", "refused"], 2, lines)


def _load_cells(by_rate: dict[int, list[Row]], model: str, loops: dict[tuple[str, int], Row]) -> list[str]:
    medians = {r: _median(rows, "requests_per_second") for r, rows in by_rate.items()}
    first = next(iter(medians.values()))
    speeds = [EMPTY if one is None else f"{one:.0f} ({_ratio(one, first)})" for one in medians.values()]
    shares = [
        _ratio(medians[r], loops[model, r]["images_per_second"] if (model, r) in loops else None) for r in by_rate
    ]
    batches = [_number(_median(rows, "batch_size"), 1) for rows in by_rate.values()]
    latencies = [_number(_median(rows, "p50_ms"), 0) for rows in by_rate.values()]
    cores = [_number(_median(rows, "server_cpu"), 1) for rows in by_rate.values()]
    refused = sum(
        count
        for rows in by_rate.values()
        for row in rows
        for status, count in row["statuses"].items()
        if status != "200"
    )
    return [*speeds, *(" … ".join(cells) for cells in (shares, batches, latencies, cores)), str(refused)]


def _median(rows: Sequence[Row], field: str) -> float | None:
    values = [row[field] for row in rows if row[field] is not None]
    return statistics.median(values) if values else None


def _ratio(value: float | None, base: float | None) -> str:
    return EMPTY if value is None or not base else f"{value / base:.2f}×"


def _number(value: float | None, digits: int) -> str:
    return EMPTY if value is None else f"{value:.{digits}f}"


def _decode(report: Report) -> str:
    rows = [row for row in rows_of(report, "decode") if row["model"] == rows_of(report, "decode")[0]["model"]]
    cells = ", ".join(f"{row['images_per_second']:.0f} in {row['threads']} threads" for row in rows)
    return f"Decoding and resizing these JPEGs alone, images/s: {cells}." if rows else ""


def _training(report: Report) -> str:
    rows = rows_of(report, "training step")
    if not rows:
        return ""
    lines = [
        (
            *(row["step"], f"{1e3 * row['seconds']:.1f}", f"{row['to_frozen']:.2f}×", f"{row['to_both']:.2f}×"),
            f"{row['peak_bytes'] / 1e6:.0f}",
        )
        for row in rows
    ]
    about = f"{rows[0]['model']}, batch {rows[0]['batch']}, autocast to {rows[0]['precision']}. A relaxed step learns "
    text = f"{about}the embedding alone, the ViT frozen; ratios are medians within rounds."
    heads = ["step", "ms", "of a frozen step", "of a step that learns all weights", "peak memory, MB"]
    return f"{text}\n\n{_table(heads, 1, lines)}"


def draw(report: Report, file: Path) -> None:
    """Draw the speed-up of the highest rate: of the models alone by batch, and of the service."""
    from matplotlib.figure import Figure  # noqa: PLC0415  # the page must not fail where only the picture can

    rows = [row for row in rows_of(report, "forward") if row["ratio"] is not None]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(4.5 * len(models) + 5, 5), layout="constrained")
    *places, last = figure.subplots(1, len(models) + 1, squeeze=False)[0]
    for place, model in zip(places, models, strict=True):
        _draw_model(place, [row for row in rows if row["model"] == model])
        place.set_title(f"{model} alone")
    if places:
        figure.legend(
            *places[0].get_legend_handles_labels(),
            fontsize="x-small",
            loc="outside lower center",
            ncols=4,
            handlelength=4,
        )
    _draw_service(last, rows_of(report, "load"))
    figure.savefig(file, dpi=120)


def _draw_model(place: Any, rows: Sequence[Row]) -> None:
    """Draw an engine in a colour of its own, the first precision with a solid line."""
    highest = max(row["r"] for row in rows)
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    for engine, precision in ((engine, precision) for engine in engines for precision in precisions):
        line = [row for row in rows if (row["engine"], row["precision"], row["r"]) == (engine, precision, highest)]
        style = {"color": f"C{engines.index(engine)}", "linestyle": "-" if precision == precisions[0] else "--"}
        speeds = [row["ratio"] for row in line]
        place.plot([row["batch"] for row in line], speeds, marker="o", label=f"{engine}, {precision}", **style)
    place.axhline(1, color="grey", linewidth=0.8)
    place.set(xscale="log", xlabel="batch", ylabel=f"speed of r={highest} over r=0")


def _draw_service(place: Any, load: Sequence[Row]) -> None:
    labels, speeds = [], []
    for key in dict.fromkeys((row["model"], row["body"], row["connections"], row["r"]) for row in load):
        found = [row for row in load if (row["model"], row["body"], row["connections"], row["r"]) == key]
        labels.append(f"{key[0]}, {key[1]}, {key[2]} connections, r={key[3]}")
        speeds.append(statistics.median(row["requests_per_second"] for row in found))
    place.barh(range(len(labels)), speeds)
    place.set(yticks=range(len(labels)), xlabel="requests/s", title="The service")
    place.set_yticklabels(labels, fontsize="x-small")
    place.invert_yaxis()


def main(arguments: list[str] | None = None) -> int:
    """Write the page of a report again. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="the JSON file of a run")
    parser.add_argument("--out", type=Path, required=True, help="<out>.json, .md and .png")
    options = parser.parse_args(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_page(json.loads(options.report.read_text(encoding="utf-8")), options.out, is_final=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
