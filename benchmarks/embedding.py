"""What DTEM costs over ToMe at the same rate: GMACs, and latency of the exported graphs in turns within one process.

`python -m benchmarks.embedding --published model_store/reference/4 --out docs/results/embedding-cost`
On a machine that has other work add `--clock cpu`. Wanted: at most 1.5 % of GMACs and 2 % of latency.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.timing import CLOCKS, Ratio, open_session, paired_ratio, time_in_turns
from training.models import load_vit, matching_macs, vit_macs

MAX_MORE_GMACS, MAX_MORE_LATENCY = 0.015, 0.02
POLICIES = ("tome", "dtem")


@dataclass(frozen=True)
class Compute:
    """One rate's cost. Units: GMACs for one image; embedding: of its rows alone, before what narrower scores save."""

    r: int
    tome: float
    dtem: float
    embedding: float


@dataclass(frozen=True)
class Latency:
    """One batch size at one rate: medians over rounds. Units: ms for the batch; ratio of DTEM to ToMe, by rounds."""

    r: int
    batch: int
    tome_ms: float
    dtem_ms: float
    ratio: Ratio


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises: ValueError where the version has no embedding."""
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    if not manifest.get("embedding"):
        raise ValueError(f"{folder} has no embedding: publish a version with policy dtem")
    return manifest


def find_variant(manifest: dict[str, Any], policy: str, r: int) -> dict[str, Any]:
    """Return the float32 ONNX variant. Raises: ValueError where there is none."""
    wanted = {"policy": policy, "r": r, "format": "onnx", "precision": "float32"}
    for variant in manifest["variants"]:
        if wanted.items() <= variant.items():
            return dict(variant)
    raise ValueError(f"the version has no float32 ONNX graph of policy {policy} at r = {r}")


def compare_compute(manifest: dict[str, Any], rates: Sequence[int]) -> list[Compute]:
    """Compute the MACs by formula, and hold them against those that were counted when the graphs were exported.

    Raises: ValueError where the two differ.
    """
    architecture, dim = manifest["architecture"], manifest["embedding"]["dim"]
    vit = load_vit(architecture["timm_name"], **architecture["timm_arguments"])
    rows = []
    for r in rates:
        gmacs = {}
        for policy in POLICIES:
            variant = find_variant(manifest, policy, r)
            matching = matching_macs(vit, variant["schedule"], embedding_dim=dim if policy == "dtem" else None)
            gmacs[policy] = (vit_macs(vit, variant["schedule"]) + matching) / 1e9
            if abs(gmacs[policy] / variant["gmacs"] - 1) > 1e-9:
                raise ValueError(f"{variant['id']}: {gmacs[policy]} GMACs by formula, {variant['gmacs']} counted")
        merging = [n for n, merged in zip(variant["tokens"], variant["schedule"], strict=False) if merged]
        rows.append(Compute(r, **gmacs, embedding=sum(merging) * architecture["width"] * dim / 1e9))
    return rows


def compare_latency(
    folder: Path, manifest: dict[str, Any], rates: Sequence[int], batches: Sequence[int], options: argparse.Namespace
) -> list[Latency]:
    """Time both policies' graphs in turns, on the same pixels."""
    rows = []
    height, width = manifest["input"]["height"], manifest["input"]["width"]
    for r in rates:
        files = {policy: folder / find_variant(manifest, policy, r)["file"] for policy in POLICIES}
        sessions = {policy: open_session(file, options.threads) for policy, file in files.items()}
        for batch in batches:
            pixels = np.random.default_rng(0).integers(0, 256, (batch, height, width, 3), dtype=np.uint8)
            runs = {policy: functools.partial(s.run, ["logits"], {"pixels": pixels}) for policy, s in sessions.items()}
            seconds = time_in_turns(runs, options.rounds, CLOCKS[options.clock], f"r {r}, batch {batch}")
            tome_ms, dtem_ms = (1e3 * statistics.median(seconds[policy]) for policy in POLICIES)
            rows.append(Latency(r, batch, tome_ms, dtem_ms, paired_ratio(seconds["dtem"], seconds["tome"])))
    return rows


def markdown(compute: Sequence[Compute], latency: Sequence[Latency], about: dict[str, Any]) -> str:
    lines = ["| r | GMACs, ToMe | GMACs, DTEM | more | the embedding's rows alone |", "|---:|---:|---:|---:|---:|"]
    for cost in compute:
        more, rows = cost.dtem / cost.tome - 1, cost.embedding / cost.tome
        lines.append(f"| {cost.r} | {cost.tome:.4f} | {cost.dtem:.4f} | {more:+.2%} | {rows:+.2%} |")
    lines += ["", "| r | batch | ToMe, ms | DTEM, ms | more (95 % interval) |", "|---:|---:|---:|---:|---:|"]
    for time in latency:
        low, high = (f"{bound - 1:+.2%}" for bound in time.ratio.ci95)
        times = f"{time.tome_ms:.2f} | {time.dtem_ms:.2f} | {time.ratio.median - 1:+.2%} ({low} … {high})"
        lines.append(f"| {time.r} | {time.batch} | {times} |")
    lines += [
        "",
        f"{about['model']}, d' = {about['dim']}. GMACs of one image by formula, equal to those counted at export. "
        f"Latency of the exported graphs: {about['clock']} time, {about['threads']} thread(s), {about['rounds']} "
        "rounds in which both took turns; medians, and the median of the rounds' ratios with its interval.",
    ]
    return "\n".join(lines) + "\n"


def plot(compute: Sequence[Compute], latency: Sequence[Latency], file: Path, title: str) -> None:
    """Draw what DTEM costs over ToMe in percent, beside what is wanted."""
    figure = Figure(figsize=(7.5, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar([f"r={cost.r}" for cost in compute], [100 * (cost.dtem / cost.tome - 1) for cost in compute])
    left.set(title="GMACs", ylabel="DTEM over ToMe, %")
    places = [f"r={time.r}, batch {time.batch}" for time in latency]
    more = [100 * (time.ratio.median - 1) for time in latency]
    below = [100 * (time.ratio.median - time.ratio.ci95[0]) for time in latency]
    above = [100 * (time.ratio.ci95[1] - time.ratio.median) for time in latency]
    right.errorbar(places, more, yerr=(below, above), fmt="o", capsize=4)
    right.set(title="latency, 95 % interval")
    right.tick_params(axis="x", rotation=20)
    for axes, limit in ((left, MAX_MORE_GMACS), (right, MAX_MORE_LATENCY)):
        axes.axhline(100 * limit, color="tab:red", linestyle="--", label="wanted: below")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=130)


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0 measured, 2 refused, with the reason on standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = functools.partial(map, int)
    parser.add_argument("--published", type=Path, required=True, help="a version with policies tome and dtem")
    parser.add_argument("--rates", type=lambda text: list(numbers(text.split(","))), default=[8, 16])
    parser.add_argument("--batches", type=lambda text: list(numbers(text.split(","))), default=[1, 8])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--out", type=Path, required=True, help="files <out>.json, <out>.md and <out>.png")
    options = parser.parse_args(arguments)
    try:
        _measure(options)
    except (ValueError, OSError) as err:
        print(f"benchmark refused: {err}", file=sys.stderr)
        return 2
    return 0


def _measure(options: argparse.Namespace) -> None:
    manifest = read_manifest(options.published)
    compute = compare_compute(manifest, options.rates)
    latency = compare_latency(options.published, manifest, options.rates, options.batches, options)
    about = {
        "model": f"{manifest['name']} {manifest['version']}",
        "dim": manifest["embedding"]["dim"],
        **{name: getattr(options, name) for name in ("clock", "threads", "rounds")},
    }
    content = {"about": about, "compute": [asdict(c) for c in compute], "latency": [asdict(t) for t in latency]}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")
    table = markdown(compute, latency, about)
    options.out.with_suffix(".md").write_text(table)
    plot(compute, latency, options.out.with_suffix(".png"), f"The embedding's cost: {about['model']}")
    print(table)


if __name__ == "__main__":
    sys.exit(main())
