"""All graphs of a version on the same images, interleaved."""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.host import describe_host
from benchmarks.servers.partial_store import runnable
from benchmarks.timing import open_session, paired_ratio, time_interleaved
from training.cli.model_options import published_rule
from training.data.sources import open_source

# Images per round, rounded up to whole batches.
N_IMAGES = 16


@dataclass(frozen=True)
class Timing:
    """Median over rounds. Units: images/s; ratio to r = 0 in the same round."""

    policy: str
    r: int | None
    gmacs: float
    accuracy: dict[str, Any] | None
    batch: int
    images_per_second: float
    ratio: float


def measure(options: argparse.Namespace) -> dict[str, Any]:
    timings = time_graphs(options.published, options.batches, options.rounds, options.threads, options.data)
    about = {"model": str(options.published), "host": describe_host()}
    about |= {name: getattr(options, name) for name in ("rounds", "threads", "data")}
    return {"about": about, "timings": [asdict(timing) for timing in timings]}


def time_graphs(folder: Path, batches: Sequence[int], n_rounds: int, n_threads: int, data: str) -> list[Timing]:
    """Time the version's float32 ONNX graphs on this CPU, each file once. data: as `open_source` takes it"""
    manifest = json.loads((folder / "manifest.json").read_text())
    # All policies share the graph of r = 0. It keeps the first name.
    variants = {v["file"]: v for v in reversed(runnable(manifest))}
    files = sorted(
        variants, key=lambda file: (variants[file]["r"] != 0, variants[file]["policy"], variants[file]["r"] or 0)
    )
    sessions = {file: open_session(folder / file, n_threads) for file in files}
    rule = published_rule(folder)
    timings = []
    for batch in batches:
        n_images = batch * -(-N_IMAGES // batch)
        images = open_source(data, rule, n_images)
        pixels = np.stack([images[index][0].numpy() for index in range(n_images)])
        parts = [pixels[begin : begin + batch] for begin in range(0, n_images, batch)]
        runs = {file: functools.partial(_run_all, session, parts) for file, session in sessions.items()}
        seconds = time_interleaved(runs, n_rounds, title=f"batch {batch}")
        for file, measured in seconds.items():
            ratio = paired_ratio(seconds[files[0]], measured).median
            about = {name: variants[file][name] for name in ("policy", "r", "gmacs", "accuracy")}
            speed = n_images / statistics.median(measured)
            timings.append(Timing(**about, batch=batch, images_per_second=speed, ratio=ratio))
    return timings


def _run_all(session: Any, parts: Sequence[Any]) -> None:
    for pixels in parts:
        session.run(["logits"], {"pixels": pixels})
