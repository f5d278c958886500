"""More requests than the service can answer at full quality: right and in time, for every fixed rate and for the engine
that chooses the rate by the deadline.

`python -m benchmarks.overload --published model_store/reference/4 --policy tome --deadline-ms 250 --out docs/results/overload`
Arrivals are a Poisson process that waits for no answer. Load 1 is what the service can answer at r = 0. Every arm is a
server that sheds in the same way, by the same deadline; a fixed one has a store with a single variant. All arms meet
the same arrivals with the same images, one after another at one load before the next. An answer is in time if its last
byte came within the deadline after its request was sent, by the client's clock; refused, late and lost are not right.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.effective_accuracy import Point, summarise
from benchmarks.labelled_jpegs import LabelledJpeg, draw_jpegs
from benchmarks.lone_caller import make_request
from benchmarks.open_loop import Call, arrival_times, effort, keep_busy, offer, run_measured
from benchmarks.overload_report import ADAPTIVE, draw_figure, markdown
from benchmarks.report import describe_host, numbers, positive, report
from benchmarks.served import MeasurementError, Served, add_setting_option, serve_store
from benchmarks.sub_store import MANIFEST, Variant, publish_part, rates_of

N_CONNECTIONS = 64  # opened beforehand; more are opened when they are needed
DRAIN_SECONDS = 10.0
WARM_UP_SECONDS = 1.0


@dataclass(frozen=True)
class Traffic:
    """What all arms at one load meet in one round. Units: s, from the start."""

    times: Sequence[float]
    places: Sequence[int]


def make_traffic(per_second: float, seconds: float, n_images: int, seed: int) -> Traffic:
    times = arrival_times(per_second, seconds, seed)
    places = np.random.default_rng([seed, 1]).integers(0, n_images, len(times))
    return Traffic(times.tolist(), places.tolist())


def start_arms(options: argparse.Namespace, rates: Sequence[int], folder: Path, stack: ExitStack) -> dict[str, Served]:
    """Start a server for each fixed rate, on a store of that one variant, and one on a store of the whole policy."""
    arms = {}
    for name, kept in {**{f"r={r}": [r] for r in rates}, ADAPTIVE: list(rates)}.items():
        store = folder / f"store-{name}"
        publish_part(options.published, store, partial(_is_of, options.policy, kept))
        arms[name] = stack.enter_context(serve_store(store, folder / f"{name}.log", dict(options.setting)))
    return arms


def _is_of(policy: str, rates: Sequence[int], variant: Variant) -> bool:
    return variant["policy"] == policy and variant["r"] in rates


def make_calls(path: str, jpegs: Sequence[LabelledJpeg]) -> list[Call]:
    return [Call(make_request(path, jpeg.data)) for jpeg in jpegs]


def measure_capacity(server: Served, path: str, jpegs: Sequence[LabelledJpeg], seconds: float, n_callers: int) -> float:
    """Units: requests/s that a server answers when it is kept busy, and nobody gives it a deadline.

    Raises: MeasurementError if an answer is not 200.
    """

    calls = make_calls(path, jpegs)
    with server.expected_to_listen():
        exchanges, _ = run_measured(server.port, n_callers, lambda client: keep_busy(client, calls, n_callers, seconds))
    for exchange in exchanges:
        if exchange.status != 200 or exchange.answered_at is None:
            raise MeasurementError(f"{path}: the service answered {exchange.status}: {exchange.body[:300]!r}")
    last = max(exchange.answered_at or 0 for exchange in exchanges)
    return len(exchanges) / (last - min(exchange.sent_at for exchange in exchanges))


def measure_point(
    options: argparse.Namespace,
    name: tuple[float, int, str],
    server: Served,
    traffic: Traffic,
    jpegs: Sequence[LabelledJpeg],
) -> Point:
    """Offer the traffic to one arm. name: load, round, arm"""
    images = make_calls(deadline_path(options), jpegs)
    calls = [images[place] for place in traffic.places]
    with server.expected_to_listen():
        exchanges, cpu_share = run_measured(
            server.port, N_CONNECTIONS, lambda client: offer(client, calls, traffic.times, DRAIN_SECONDS)
        )
    server.settle()
    labels = [jpegs[place].label for place in traffic.places]
    own = effort(exchanges, cpu_share)
    return summarise(name, exchanges, labels, traffic.times, options.deadline_ms, own, options.max_lag_ms)


def deadline_path(options: argparse.Namespace) -> str:
    return f"/classify?policy={options.policy}&deadline_ms={options.deadline_ms:g}"


def measure_points(
    options: argparse.Namespace, arms: Mapping[str, Served], jpegs: Sequence[LabelledJpeg], capacity: float
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


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Raises: MeasurementError; ValueError where the version has no such policy."""
    rates = rates_of(json.loads((options.published / MANIFEST).read_text()), options.policy)
    jpegs = draw_jpegs(options.n_images)
    with tempfile.TemporaryDirectory(prefix="dtem-overload-") as name, ExitStack() as stack:
        arms = start_arms(options, rates, Path(name), stack)
        for r in rates:  # also what a server has yet to learn of its own speed
            measure_capacity(arms[f"r={r}"], f"/classify?r={r}", jpegs, WARM_UP_SECONDS, options.connections)
            path = f"/classify?policy={options.policy}&r={r}"
            measure_capacity(arms[ADAPTIVE], path, jpegs, WARM_UP_SECONDS, options.connections)
        slowest = f"r={rates[0]}"
        capacity = measure_capacity(arms[slowest], f"/classify?{slowest}", jpegs, options.seconds, options.connections)
        points = measure_points(options, arms, jpegs, capacity)
    chosen = ("policy", "deadline_ms", "loads", "seconds", "rounds", "n_images", "max_lag_ms", "setting", "seed")
    about = {name: getattr(options, name) for name in chosen}
    about |= {"model": str(options.published), "capacity": capacity, "base": slowest, "host": describe_host()}
    return {"about": about, "points": [asdict(point) for point in points]}


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, default=Path("model_store/reference/4"))
    parser.add_argument("--policy", default="tome", help="a policy with rates")
    parser.add_argument("--deadline-ms", type=float, default=250)
    parser.add_argument("--loads", type=numbers, default=[0.5, 0.75, 1, 1.5, 2, 3, 4], help="of the capacity at r = 0")
    parser.add_argument("--seconds", type=positive, default=15, help="of each arm at each load in each round")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--connections", type=positive, default=32, help="that keep it busy, to measure capacity")
    parser.add_argument("--n-images", type=positive, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-lag-ms", type=float, default=10, help="of the client, p99; above it a point is not kept")
    parser.add_argument("--out", type=Path, help="files <out>.md, <out>.json and <out>.png")
    add_setting_option(parser)
    options = parser.parse_args(arguments)
    if options.deadline_ms <= 0:
        parser.error(f"--deadline-ms {options.deadline_ms:g}: a number above 0 is wanted")
    return options


def main(arguments: list[str] | None = None) -> int:
    return report(
        read_options(arguments),
        measure,
        lambda content: markdown(points_of(content), content["about"]),
        lambda content: draw_figure(points_of(content), content["about"]),
    )


def points_of(content: dict[str, Any]) -> list[Point]:
    return [Point(**point) for point in content["points"]]


if __name__ == "__main__":
    sys.exit(main())
