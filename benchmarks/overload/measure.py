"""The same Poisson arrivals for a server of each fixed rate and for the adaptive engine."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.errors import MeasurementError
from benchmarks.host import describe_host
from benchmarks.load.http1 import make_request
from benchmarks.load.labelled_jpegs import LabelledJpeg, draw_jpegs
from benchmarks.load.open_loop import Call, arrival_times, client_load, offer, run_measured, saturate
from benchmarks.overload.effective_accuracy import Point, summarise
from benchmarks.overload.report import ADAPTIVE
from benchmarks.servers.partial_store import MANIFEST, Variant, publish_part, rates_of
from deploy.local.process import ServerProcess, ServiceProcess

# Opened beforehand. The client opens more when it needs them.
N_CONNECTIONS = 64
DRAIN_SECONDS = 10.0
WARM_UP_SECONDS = 1.0


@dataclass(frozen=True)
class Traffic:
    """Arrivals of one load and round. times: s from the start. images: indices."""

    times: Sequence[float]
    images: Sequence[int]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Raises: MeasurementError, LaunchError; ValueError where the version has no such policy."""
    rates = rates_of(json.loads((options.published / MANIFEST).read_text()), options.policy)
    jpegs = draw_jpegs(options.n_images)
    with tempfile.TemporaryDirectory(prefix="dtem-overload-") as name, ExitStack() as stack:
        arms = start_arms(options, rates, Path(name), stack)
        # Also warms up the servers' cost estimates.
        for r in rates:
            measure_capacity(arms[f"r={r}"], f"/classify?r={r}", jpegs, WARM_UP_SECONDS, options.connections)
            path = f"/classify?policy={options.policy}&r={r}"
            measure_capacity(arms[ADAPTIVE], path, jpegs, WARM_UP_SECONDS, options.connections)
        slowest = f"r={rates[0]}"
        capacity = measure_capacity(arms[slowest], f"/classify?{slowest}", jpegs, options.seconds, options.connections)
        points = measure_points(options, arms, jpegs, capacity)
    chosen = ("policy", "deadline_ms", "loads", "seconds", "rounds", "n_images", "max_lag_ms", "setting", "seed")
    about = {name: getattr(options, name) for name in chosen}
    about |= {"model": str(options.published), "capacity": capacity, "baseline": slowest, "host": describe_host()}
    return {"about": about, "points": [asdict(point) for point in points]}


def make_traffic(per_second: float, seconds: float, n_images: int, seed: int) -> Traffic:
    times = arrival_times(per_second, seconds, seed)
    images = np.random.default_rng([seed, 1]).integers(0, n_images, len(times))
    return Traffic(times.tolist(), images.tolist())


def start_arms(
    options: argparse.Namespace, rates: Sequence[int], folder: Path, stack: ExitStack
) -> dict[str, ServerProcess]:
    """Start one server per fixed rate, with a store of that variant, and one with the whole policy."""
    arms: dict[str, ServerProcess] = {}
    for name, kept in {**{f"r={r}": [r] for r in rates}, ADAPTIVE: list(rates)}.items():
        store = folder / f"store-{name}"
        publish_part(options.published, store, partial(_is_of, options.policy, kept))
        server = ServiceProcess(store, folder / f"{name}.log", dict(options.setting))
        arms[name] = stack.enter_context(server)
    return arms


def _is_of(policy: str, rates: Sequence[int], variant: Variant) -> bool:
    return variant["policy"] == policy and variant["r"] in rates


def make_calls(path: str, jpegs: Sequence[LabelledJpeg]) -> list[Call]:
    return [Call(make_request(path, jpeg.data)) for jpeg in jpegs]


def measure_capacity(
    server: ServerProcess, path: str, jpegs: Sequence[LabelledJpeg], seconds: float, concurrency: int
) -> float:
    """Return requests/s at saturation, without deadlines.

    Raises: MeasurementError if a response is not 200.
    """

    calls = make_calls(path, jpegs)
    with server.expected_to_listen():
        results, _ = run_measured(
            server.port, concurrency, lambda client: saturate(client, calls, concurrency, seconds)
        )
    for result in results:
        if result.status != 200 or result.answered_at is None:
            raise MeasurementError(f"{path}: expected status 200, received {result.status}: {result.body[:300]!r}")
    last = max(result.answered_at or 0 for result in results)
    return len(results) / (last - min(result.sent_at for result in results))


def measure_point(
    options: argparse.Namespace,
    name: tuple[float, int, str],
    server: ServerProcess,
    traffic: Traffic,
    jpegs: Sequence[LabelledJpeg],
) -> Point:
    """Offer the traffic to one arm. name: load, round, arm"""
    by_image = make_calls(deadline_path(options), jpegs)
    calls = [by_image[image] for image in traffic.images]
    with server.expected_to_listen():
        results, cpu_share = run_measured(
            server.port, N_CONNECTIONS, lambda client: offer(client, calls, traffic.times, DRAIN_SECONDS)
        )
    server.wait_until_idle()
    labels = [jpegs[image].label for image in traffic.images]
    load = client_load(results, cpu_share)
    return summarise(name, results, labels, traffic.times, options.deadline_ms, load, options.max_lag_ms)


def deadline_path(options: argparse.Namespace) -> str:
    return f"/classify?policy={options.policy}&deadline_ms={options.deadline_ms:g}"


def measure_points(
    options: argparse.Namespace, arms: Mapping[str, ServerProcess], jpegs: Sequence[LabelledJpeg], capacity: float
) -> list[Point]:
    points = []
    bar = tqdm(total=options.rounds * len(options.loads) * len(arms), unit="point")
    for index in range(options.rounds):
        for place, load in enumerate(options.loads):
            seed = options.seed + 1000 * index + place
            traffic = make_traffic(load * capacity, options.seconds, len(jpegs), seed)
            for name in list(arms) if index % 2 else list(reversed(list(arms))):
                points.append(measure_point(options, (load, index, name), arms[name], traffic, jpegs))
                bar.update()
    bar.close()
    return points
