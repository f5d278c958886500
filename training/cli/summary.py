"""Summarise a published version: its variants, what each costs, how accurate it is, and how to ask for it."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.cli.command import report
from training.evaluate.latency import median_ms
from training.evaluate.results import read_evaluation, with_suffix
from training.evaluate.table import in_order, plot
from training.export.formats import find_format
from training.tasks import find_measure
from training.tasks.measure import TOP1

CURL = "curl --data-binary @image.jpg 'http://127.0.0.1:8000/{task}?model={model}&{selector}'"


def run(options: Namespace) -> int:
    folder: Path = options.version
    manifest = json.loads((folder / "manifest.json").read_text())
    # Policies share the unmerged graph.
    variants = list({variant["file"]: variant for variant in reversed(manifest["variants"])}.values())[::-1]
    table = markdown(manifest, variants, _latencies(folder, variants))
    print(table)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        title = f"{manifest['name']} version {manifest['version']}"
        summary = f"Variants of a model that tells {len(manifest['labels'])} classes apart."
        with_suffix(options.out, ".md").write_text(report(title, summary, options.command_line, table))
        plot(in_order(read_evaluation(folder / "evaluation.json").rows), with_suffix(options.out, ".png"), title)
        print(f"wrote {with_suffix(options.out, '.md')} and {with_suffix(options.out, '.png')}\n")
    print("Serve it and ask for an image:\n")
    print(f"  dtem serve --store {folder.resolve().parents[1]}")
    print(f"  {CURL.format(task=manifest['task'], model=manifest['name'], selector=_selector(manifest))}")
    return 0


def _latencies(folder: Path, variants: list[dict[str, Any]]) -> dict[str, float]:
    """Return the median ms of one image by graph file."""
    with np.load(folder / "golden.npz") as golden:
        images = torch.from_numpy(golden["pixels"])
    graphs = {one["file"]: find_format(one["format"], one["precision"]).load(folder / one["file"]) for one in variants}
    return median_ms(graphs, images)


def markdown(manifest: dict[str, Any], variants: list[dict[str, Any]], ms: dict[str, float]) -> str:
    unmerged = max(variant["gmacs"] for variant in variants)
    label = find_measure(_measured(variants[0])[0]).label
    lines = [f"| policy | r | GMACs | {label} % | 95 % interval | ms |", "|---|---:|---:|---:|---:|---:|"]
    for one in variants:
        _, value, (low, high) = _measured(one)
        saved = "" if one["r"] == 0 else f" (−{100 * (1 - one['gmacs'] / unmerged):.0f} %)"
        lines.append(
            f"| {one['policy']} | {'adapts' if one['r'] is None else one['r']} | {one['gmacs']:.3f}{saved} "
            f"| {100 * value:.2f} | {100 * low:.2f} … {100 * high:.2f} | {ms[one['file']]:.1f} |"
        )
    accuracy = variants[0]["accuracy"]
    lines += ["", f"{label} on {accuracy['n_images']} images of {accuracy['dataset']}, split {accuracy['split']}."]
    lines += ["ms: median time of one image in one thread of this CPU, the graph alone."]
    return "\n".join(lines) + "\n"


def _measured(variant: dict[str, Any]) -> tuple[str, float, tuple[float, float]]:
    """Return the measure, its value and its 95 % interval."""
    accuracy = variant["accuracy"]
    is_top1 = TOP1.name in accuracy
    name, value = (TOP1.name, accuracy[TOP1.name]) if is_top1 else (accuracy["measure"], accuracy["value"])
    return name, value, tuple(accuracy["ci95"])


def _selector(manifest: dict[str, Any]) -> str:
    """Return the query of the default variant, except that an adaptive policy has no rate."""
    default = manifest["default"]
    return f"policy={default['policy']}" if default["r"] is None else f"r={default['r']}"
