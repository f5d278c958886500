"""What `docker compose up` carries: requests/s at each rate within the limits of docker-compose.yml, the time until it
is ready, and its memory at rest and under load.

`python -m benchmarks.sizing --out docs/results/sizing`
Needs a Docker engine and wrk, which posts JPEGs of the reference task to the published port and shares the cores with
the containers. Rates are measured in turns, round by round; each round is a stack of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.composed import Composed, build_image
from benchmarks.labelled_jpegs import draw_jpegs, write_jpegs
from benchmarks.report import describe_host, positive, report
from benchmarks.served import MeasurementError
from benchmarks.sizing_report import draw_figure, markdown
from benchmarks.wrk import find_wrk, saturate, write_script

SERVICES = ("api", "prometheus")
PROJECT = "dtem-sizing"
REST_SECONDS = 15.0  # three scrapes
WARM_SECONDS = 1


@dataclass(frozen=True)
class Start:
    """One `docker-compose up`. Units: seconds until the service answered that it is ready, and until Docker knew that
    all are healthy; bytes resident of each service's process.
    """

    round: int
    ready_seconds: float
    healthy_seconds: float
    bytes_at_rest: dict[str, int]
    bytes_under_load: dict[str, int]


@dataclass(frozen=True)
class Carried:
    """One variant in one round, at saturation and with a lone caller. Units: ms."""

    policy: str
    r: int | None
    round: int
    per_second: float
    p50_ms: float
    p99_ms: float
    alone_ms: float


@dataclass(frozen=True)
class Bench:
    wrk: str
    script: Path
    model: str  # of the query
    n_connections: int
    seconds: int


def measure_round(bench: Bench, variants: Sequence[dict[str, Any]], index: int) -> tuple[Start, list[Carried]]:
    with Composed(PROJECT, SERVICES) as stack:
        time.sleep(REST_SECONDS)
        at_rest = {service: stack.resident_bytes(service) for service in SERVICES}
        carried = [measure_variant(bench, stack, variant, index) for variant in variants]
        under_load = {service: stack.resident_bytes(service) for service in SERVICES}
    return Start(index, stack.ready_seconds, stack.healthy_seconds, at_rest, under_load), carried


def measure_variant(bench: Bench, stack: Composed, variant: dict[str, Any], index: int) -> Carried:
    policy, r = variant["policy"], variant["r"]
    rate = "" if r is None else f"&r={r}"
    url = f"http://127.0.0.1:{stack.ports['api']}/classify?{bench.model}&policy={policy}{rate}"
    saturate(bench.wrk, bench.script, url, bench.n_connections, WARM_SECONDS)
    full = saturate(bench.wrk, bench.script, url, bench.n_connections, bench.seconds)
    alone = saturate(bench.wrk, bench.script, url, 1, bench.seconds)
    return Carried(policy, r, index, full.per_second, full.p50_ms, full.p99_ms, alone.p50_ms)


def find_variants(manifest: dict[str, Any], policies: Sequence[str]) -> list[dict[str, Any]]:
    """List the graphs of these policies, in the order of the manifest.

    Raises: MeasurementError if a policy has none.
    """
    found = [one for one in manifest["variants"] if one["format"] == "onnx" and one["policy"] in policies]
    missing = set(policies) - {variant["policy"] for variant in found}
    if missing:
        raise MeasurementError(f"{manifest['name']} has no graph of policy {', '.join(sorted(missing))}")
    return found


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, default=Path("model_store/reference/4"), help="the version served")
    parser.add_argument("--policies", default="none,dtem,adaptive-dtem", help="with commas between")
    parser.add_argument("--seconds", type=positive, default=5, help="of each variant in each round, twice")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--connections", type=positive, default=32)
    parser.add_argument("--n-images", type=positive, default=64, help="different images, sent in turn")
    parser.add_argument("--out", type=Path, help="files <out>.md, <out>.json and <out>.png")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Raises: MeasurementError."""
    wrk = find_wrk()
    manifest = json.loads((options.published / "manifest.json").read_text())
    variants = find_variants(manifest, options.policies.split(","))
    model = f"model={manifest['name']}&version={manifest['version']}"
    build_image()
    starts: list[Start] = []
    carried: list[Carried] = []
    with tempfile.TemporaryDirectory(prefix="dtem-sizing-") as name:
        files = write_jpegs(Path(name) / "images", draw_jpegs(options.n_images))
        script = write_script(Path(name) / "post.lua", files)
        bench = Bench(wrk, script, model, options.connections, options.seconds)
        for index in tqdm(range(options.rounds), unit="round"):
            start, more = measure_round(bench, variants, index)
            starts, carried = [*starts, start], carried + more
    about = {name: getattr(options, name) for name in ("seconds", "rounds", "connections", "n_images")}
    about |= {"model": str(options.published), "host": describe_host()}
    return {"about": about, "starts": [asdict(one) for one in starts], "carried": [asdict(one) for one in carried]}


def main(arguments: list[str] | None = None) -> int:
    return report(read_options(arguments), measure, markdown, draw_figure)


if __name__ == "__main__":
    sys.exit(main())
