"""Time every graph of a published version against its r = 0, in turn, in one process, with its accuracy beside.

`python -m benchmarks.graphs --published model_store/reference/4 --batches 1,8 --rounds 30`
The graphs take turns within a round, so that a drift of the machine meets all of them; medians over rounds are given.
A round is the same test images for each graph, in batches: what a policy that adapts does depends on the images.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import open_session, paired_ratio, time_in_turns
from training.cli.model_options import published_rule
from training.data.sources import open_source

_N_IMAGES = 16  # in a round, or as many as a batch holds


@dataclass(frozen=True)
class Timing:
    """Median over rounds. Units: images/s; ratio to the same round's r = 0."""

    variant: dict[str, Any]
    batch: int
    images_per_second: float
    ratio: float


def time_graphs(folder: Path, batches: Sequence[int], n_rounds: int, n_threads: int, data: str) -> list[Timing]:
    """Time the version's float32 ONNX graphs on this CPU, each file once. data: as `open_source` takes it"""
    manifest = json.loads((folder / "manifest.json").read_text())
    entries = [v for v in manifest["variants"] if v["format"] == "onnx" and v["precision"] == "float32"]
    variants = {v["file"]: v for v in reversed(entries)}  # of r = 0, which every policy shares, the first name stays
    files = sorted(
        variants, key=lambda file: (variants[file]["r"] != 0, variants[file]["policy"], variants[file]["r"] or 0)
    )
    sessions = {file: open_session(folder / file, n_threads) for file in files}
    rule = published_rule(folder)
    timings = []
    for batch in batches:
        n_images = batch * -(-_N_IMAGES // batch)
        images = open_source(data, rule, n_images)
        pixels = np.stack([images[index][0].numpy() for index in range(n_images)])
        parts = [pixels[begin : begin + batch] for begin in range(0, n_images, batch)]
        runs = {file: functools.partial(_run_all, session, parts) for file, session in sessions.items()}
        seconds = time_in_turns(runs, n_rounds, title=f"batch {batch}")
        for file, measured in seconds.items():
            ratio = paired_ratio(seconds[files[0]], measured).median
            timings.append(Timing(variants[file], batch, n_images / statistics.median(measured), ratio))
    return timings


def _run_all(session: Any, parts: Sequence[Any]) -> None:
    for pixels in parts:
        session.run(["logits"], {"pixels": pixels})


def markdown(timings: Sequence[Timing]) -> str:
    """Lay the timings out, a row a graph, a column a batch size."""
    batches = list(dict.fromkeys(timing.batch for timing in timings))
    heads = [f"images/s, batch {batch}" for batch in batches]
    lines = [f"| policy | r | top-1 % (95 % interval) | GMACs | {' | '.join(heads)} |"]
    lines.append("|---|" + "---:|" * (3 + len(batches)))
    base = timings[0].variant["gmacs"]
    for variant in (timing.variant for timing in timings if timing.batch == batches[0]):
        row = [t for batch in batches for t in timings if (t.variant["file"], t.batch) == (variant["file"], batch)]
        cells = [f"{t.images_per_second:.0f} ({t.ratio:.2f}×)" for t in row]
        cost = f"{variant['gmacs']:.3f} ({variant['gmacs'] / base:.0%})"
        rate = "adapts" if variant["r"] is None else variant["r"]
        accuracy = _accuracy(variant["accuracy"])
        lines.append(f"| {variant['policy']} | {rate} | {accuracy} | {cost} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _accuracy(measured: dict[str, Any] | None) -> str:
    if measured is None:
        return "not measured"
    low, high = (f"{100 * bound:.2f}" for bound in measured["ci95"])
    return f"{100 * measured['top1']:.2f} ({low} … {high})"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, default=Path("model_store/reference/4"))
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--data", default="digits", help="'digits' or a folder with one folder a class")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as there are cores")
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    options = parser.parse_args(arguments)
    table = markdown(time_graphs(options.published, options.batches, options.rounds, options.threads, options.data))
    print(table)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(table)


if __name__ == "__main__":
    main()
