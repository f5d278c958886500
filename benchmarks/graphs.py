"""Time every graph of a published version against its r = 0, in turn, in one process, with its accuracy beside.

`python -m benchmarks.graphs --published model_store/reference/1 --batches 1,8 --rounds 30`
The graphs take turns within a round, so that a drift of the machine meets all of them; medians over rounds are given.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tqdm import tqdm


@dataclass(frozen=True)
class Timing:
    """Median over rounds. Units: images/s; ratio to the same round's r = 0."""

    variant: dict[str, Any]
    batch: int
    images_per_second: float
    ratio: float


def time_graphs(folder: Path, batches: Sequence[int], n_rounds: int, n_threads: int) -> list[Timing]:
    """Time the version's float32 ONNX graphs on this CPU."""
    manifest = json.loads((folder / "manifest.json").read_text())
    variants = {v["r"]: v for v in manifest["variants"] if v["format"] == "onnx" and v["precision"] == "float32"}
    sessions = {r: _session(folder / variants[r]["file"], n_threads) for r in sorted(variants)}
    height, width = manifest["input"]["height"], manifest["input"]["width"]
    timings = []
    for batch in batches:
        pixels = np.random.default_rng(0).integers(0, 256, (batch, height, width, 3), dtype=np.uint8)
        seconds = _rounds(sessions, pixels, n_rounds)
        for r, measured in seconds.items():
            ratio = statistics.median(base / own for base, own in zip(seconds[0], measured, strict=True))
            timings.append(Timing(variants[r], batch, batch / statistics.median(measured), ratio))
    return timings


def _session(file: Path, n_threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = n_threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle graphs must not slow the others
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _rounds(sessions: dict[int, Any], pixels: np.ndarray[Any, Any], n_rounds: int) -> dict[int, list[float]]:
    """Return seconds by rate and round, after one round to warm up."""
    seconds: dict[int, list[float]] = {r: [] for r in sessions}
    for _ in tqdm(range(n_rounds + 1), desc=f"batch {len(pixels)}", unit="round"):
        for r, session in sessions.items():
            start = time.perf_counter()
            session.run(["logits"], {"pixels": pixels})
            seconds[r].append(time.perf_counter() - start)
    return {r: measured[1:] for r, measured in seconds.items()}


def markdown(timings: Sequence[Timing]) -> str:
    """Lay the timings out, a row a rate, a pair of columns a batch size."""
    batches = list(dict.fromkeys(timing.batch for timing in timings))
    heads = [f"images/s, batch {batch}" for batch in batches]
    lines = [f"| r | top-1 % (95 % interval) | GMACs | {' | '.join(heads)} |", "|" + "---:|" * (3 + len(batches))]
    base = timings[0].variant["gmacs"]
    for variant in (timing.variant for timing in timings if timing.batch == batches[0]):
        row = [t for batch in batches for t in timings if (t.variant["r"], t.batch) == (variant["r"], batch)]
        cells = [f"{t.images_per_second:.0f} ({t.ratio:.2f}×)" for t in row]
        cost = f"{variant['gmacs']:.3f} ({variant['gmacs'] / base:.0%})"
        lines.append(f"| {variant['r']} | {_accuracy(variant['accuracy'])} | {cost} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _accuracy(measured: dict[str, Any] | None) -> str:
    if measured is None:
        return "not measured"
    low, high = (f"{100 * bound:.2f}" for bound in measured["ci95"])
    return f"{100 * measured['top1']:.2f} ({low} … {high})"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, default=Path("model_store/reference/1"))
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as there are cores")
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    options = parser.parse_args(arguments)
    table = markdown(time_graphs(options.published, options.batches, options.rounds, options.threads))
    print(table)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(table)


if __name__ == "__main__":
    main()
