"""What the service costs over the model alone: requests/s at saturation, CPU time and a lone caller's wait, against a
bare loop around the same graph and against plain FastAPI, in turns within one run.

`python -m benchmarks.serve --published model_store/reference/4 --rates 0,16 --out docs/results/serve`
The client is wrk, which posts JPEGs of the reference task over HTTP. All three decode with the same code, and run the
graph with as many threads as there are cores. The bare loop has no client: what wrk uses of the same cores is the
service's loss too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.bare_loop import ALONE, LoopProcess
from benchmarks.embedding import find_variant
from benchmarks.labelled_jpegs import draw_jpegs, write_jpegs
from benchmarks.lone_caller import Wait, ask_alone, make_request
from benchmarks.report import describe_host, positive, report
from benchmarks.serve_report import draw_figure, markdown
from benchmarks.served import (
    Served,
    add_setting_option,
    n_cores,
    serve_module,
    serve_store,
)
from benchmarks.sub_store import publish_part
from benchmarks.wrk import find_wrk, saturate, write_script
from training.cli.model_options import rates

BATCHES = (1, 8, 16, 32)
SERVERS = ("service", "plain FastAPI")
DECODE_THREADS = 2  # the service's default


@dataclass(frozen=True)
class Busy:
    """One arm in one round at saturation. cpu_ms: of the server per request; client_cpu_ms: of wrk. Units: ms."""

    r: int
    round: int
    arm: str
    per_second: float
    cpu_ms: float
    client_cpu_ms: float | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None


@dataclass(frozen=True)
class Alone:
    """One arm in one round with a lone caller. Units: ms, medians over its requests; work_ms: as the service says;
    overhead_ms: of the waits less their own decoding and inference.
    """

    r: int
    round: int
    arm: str
    total_ms: float
    work_ms: float | None = None
    overhead_ms: float | None = None


@dataclass(frozen=True)
class Bench:
    """What stays the same from round to round."""

    wrk: str
    script: Path
    requests: Mapping[str, Sequence[bytes]]
    paths: Mapping[str, str]
    n_connections: int
    seconds: int


def measure_rate(options: argparse.Namespace, r: int, folder: Path, images: Path) -> tuple[list[Busy], list[Alone]]:
    """Start all three around one graph, and measure them in turns; the first round warms up and is not kept."""
    graph = find_variant(json.loads((options.published / "manifest.json").read_text()), options.policy, r)["file"]
    common = {"published": options.published.resolve(), "graph": graph, "threads": n_cores()}
    settings = {"n_threads": str(n_cores()), **dict(options.setting)}
    decoding = {"decode-threads": settings.get("n_decode_threads", DECODE_THREADS), "images": images.resolve()}
    bench = prepare(options, r, folder, images)
    with ExitStack() as stack:
        loop = stack.enter_context(LoopProcess({**common, **decoding}))
        service = serve_store(folder / "store", folder / f"service-{r}.log", settings)
        plain = serve_module("benchmarks.plain_fastapi", common, "/openapi.json", folder / f"plain-{r}.log")
        servers = dict(zip(SERVERS, (stack.enter_context(one) for one in (service, plain)), strict=True))
        busy, alone = [], []
        for index in tqdm(range(options.rounds + 1), desc=f"r = {r}", unit="round"):
            seconds = bench.seconds if index else 1
            order = list(SERVERS) if index % 2 else list(reversed(SERVERS))
            busy += [measure_server(bench, servers[name], name, r, index, seconds) for name in order]
            busy += [measure_loop(loop, batch, r, index, seconds) for batch in BATCHES]
            alone += [measure_alone(bench, servers[name], name, r, index, seconds) for name in order]
            alone.append(Alone(r, index, "bare loop", statistics.median(loop.run(ALONE, seconds).latencies_ms)))
    return [one for one in busy if one.round], [one for one in alone if one.round]


def prepare(options: argparse.Namespace, r: int, folder: Path, images: Path) -> Bench:
    files = sorted(images.iterdir())
    paths = {"service": f"/classify?policy={options.policy}&r={r}", "plain FastAPI": "/classify"}
    requests = {name: [make_request(path, file.read_bytes()) for file in files] for name, path in paths.items()}
    script = write_script(folder / "post.lua", files)
    return Bench(find_wrk(), script, requests, paths, options.connections, options.seconds)


def measure_server(bench: Bench, server: Served, name: str, r: int, index: int, seconds: int) -> Busy:
    server.settle()
    before = server.cpu_seconds
    url = f"http://127.0.0.1:{server.port}{bench.paths[name]}"
    found = saturate(bench.wrk, bench.script, url, bench.n_connections, seconds)
    cpu_ms, client_ms = (
        1e3 * used / found.n_requests for used in (server.cpu_seconds - before, found.client_cpu_seconds)
    )
    server.settle()  # wrk leaves with requests under way
    return Busy(r, index, name, found.per_second, cpu_ms, client_ms, found.p50_ms, found.p99_ms)


def measure_loop(loop: LoopProcess, batch: int, r: int, index: int, seconds: int) -> Busy:
    found = loop.run(batch, seconds)
    return Busy(r, index, f"bare loop, batch {batch}", found.per_second, 1e3 * found.cpu_seconds / found.n_images)


def measure_alone(bench: Bench, server: Served, name: str, r: int, index: int, seconds: int) -> Alone:
    waits = ask_alone(server.port, bench.requests[name], seconds)
    return summarise_alone(waits, r, index, name)


def summarise_alone(waits: Sequence[Wait], r: int, index: int, arm: str) -> Alone:
    total = statistics.median(wait.total_ms for wait in waits)
    told = [(wait.total_ms, wait.work_ms) for wait in waits if wait.work_ms is not None]
    if not told:
        return Alone(r, index, arm, total)
    work = statistics.median(work for _, work in told)
    return Alone(r, index, arm, total, work, statistics.median(whole - work for whole, work in told))


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, default=Path("model_store/reference/4"))
    parser.add_argument("--policy", default="tome")
    parser.add_argument("--rates", type=rates, default=(0, 16))
    parser.add_argument("--seconds", type=positive, default=10, help="of each arm in each round")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--connections", type=positive, default=32)
    parser.add_argument("--n-images", type=positive, default=64, help="different images, sent in turn")
    parser.add_argument("--out", type=Path, help="files <out>.md, <out>.json and <out>.png")
    add_setting_option(parser)
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Raises: MeasurementError; ValueError where the version has no such graph."""
    find_wrk()
    busy: list[Busy] = []
    alone: list[Alone] = []
    about = {
        name: getattr(options, name) for name in ("policy", "seconds", "rounds", "connections", "n_images", "setting")
    }
    about = {"model": str(options.published), **about, "threads": n_cores(), "host": describe_host()}
    with tempfile.TemporaryDirectory(prefix="dtem-serve-") as name:
        folder = Path(name)
        images = folder / "images"
        write_jpegs(images, draw_jpegs(options.n_images))
        publish_part(options.published, folder / "store", lambda variant: True)
        for r in options.rates:
            more_busy, more_alone = measure_rate(options, r, folder, images)
            busy, alone = busy + more_busy, alone + more_alone
    return {"about": about, "busy": [asdict(one) for one in busy], "alone": [asdict(one) for one in alone]}


def main(arguments: list[str] | None = None) -> int:
    return report(read_options(arguments), measure, markdown, draw_figure)


if __name__ == "__main__":
    sys.exit(main())
