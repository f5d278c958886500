"""Interleaved rounds of three arms around one graph: the service, plain FastAPI and a bare loop."""

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

from benchmarks.host import describe_host, n_cores
from benchmarks.load.http1 import make_request
from benchmarks.load.labelled_jpegs import draw_jpegs, write_jpegs
from benchmarks.load.single_client import Latency, send_repeatedly
from benchmarks.load.wrk import find_wrk, saturate, write_script
from benchmarks.overhead.bare_loop import UNBATCHED, LoopProcess
from benchmarks.servers.partial_store import find_variant, publish_part
from deploy.local.process import ServerProcess, ServiceProcess, environment

BATCHES = (1, 8, 16, 32)
SERVERS = ("service", "plain FastAPI")
# The service's default.
DECODE_THREADS = 2


@dataclass(frozen=True)
class Throughput:
    """One arm in one round at saturation. Units: ms. cpu_ms: per request, of the server; client_cpu_ms: of wrk."""

    r: int
    round: int
    arm: str
    per_second: float
    cpu_ms: float
    client_cpu_ms: float | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None


@dataclass(frozen=True)
class SingleClient:
    """One arm in one round with a single client. Units: ms, medians over requests.

    work_ms: decoding and inference as reported by the server. overhead_ms: total less work.
    """

    r: int
    round: int
    arm: str
    total_ms: float
    work_ms: float | None = None
    overhead_ms: float | None = None


@dataclass(frozen=True)
class Setup:
    """What all rounds share. requests and paths: by server."""

    wrk: str
    script: Path
    requests: Mapping[str, Sequence[bytes]]
    paths: Mapping[str, str]
    n_connections: int
    seconds: int


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Raises: MeasurementError, LaunchError; ValueError where the version has no such graph."""
    find_wrk()
    throughput: list[Throughput] = []
    single_client: list[SingleClient] = []
    about = {
        name: getattr(options, name) for name in ("policy", "seconds", "rounds", "connections", "n_images", "setting")
    }
    about = {"model": str(options.published), **about, "threads": n_cores(), "host": describe_host()}
    with tempfile.TemporaryDirectory(prefix="dtem-overhead-") as name:
        folder = Path(name)
        images = folder / "images"
        write_jpegs(images, draw_jpegs(options.n_images))
        publish_part(options.published, folder / "store", lambda variant: True)
        for r in options.rates:
            at_saturation, single = measure_rate(options, r, folder, images)
            throughput, single_client = throughput + at_saturation, single_client + single
    return {
        "about": about,
        "throughput": [asdict(one) for one in throughput],
        "single_client": [asdict(one) for one in single_client],
    }


def measure_rate(
    options: argparse.Namespace, r: int, folder: Path, images: Path
) -> tuple[list[Throughput], list[SingleClient]]:
    """Start all arms around one graph, and measure them in interleaved rounds after a warm-up round."""
    graph = find_variant(json.loads((options.published / "manifest.json").read_text()), options.policy, r)["file"]
    common = {"published": options.published.resolve(), "graph": graph, "threads": n_cores()}
    settings = {"n_threads": str(n_cores()), **dict(options.setting)}
    decoding = {"decode-threads": settings.get("n_decode_threads", DECODE_THREADS), "images": images.resolve()}
    setup = prepare(options, r, folder, images)
    with ExitStack() as stack:
        loop = stack.enter_context(LoopProcess({**common, **decoding}))
        service = ServiceProcess(folder / "store", folder / f"service-{r}.log", settings)
        plain = plain_fastapi(common, folder / f"plain-{r}.log")
        servers = dict(zip(SERVERS, (stack.enter_context(one) for one in (service, plain)), strict=True))
        throughput: list[Throughput] = []
        single_client: list[SingleClient] = []
        for index in tqdm(range(options.rounds + 1), desc=f"r = {r}", unit="round"):
            seconds = setup.seconds if index else 1
            order = list(SERVERS) if index % 2 else list(reversed(SERVERS))
            throughput += [measure_server(setup, servers[name], name, r, index, seconds) for name in order]
            throughput += [measure_loop(loop, batch, r, index, seconds) for batch in BATCHES]
            single_client += [measure_single_client(setup, servers[name], name, r, index, seconds) for name in order]
            unbatched = statistics.median(loop.run(UNBATCHED, seconds).latencies_ms)
            single_client.append(SingleClient(r, index, "bare loop", unbatched))
    return [one for one in throughput if one.round], [one for one in single_client if one.round]


def plain_fastapi(arguments: Mapping[str, object], log: Path) -> ServerProcess:
    named = [part for name, value in {"port": 0, **arguments}.items() for part in (f"--{name}", str(value))]
    return ServerProcess([sys.executable, "-m", "benchmarks.overhead.plain_fastapi", *named], log, environment())


def prepare(options: argparse.Namespace, r: int, folder: Path, images: Path) -> Setup:
    files = sorted(images.iterdir())
    paths = {"service": f"/classify?policy={options.policy}&r={r}", "plain FastAPI": "/classify"}
    requests = {name: [make_request(path, file.read_bytes()) for file in files] for name, path in paths.items()}
    script = write_script(folder / "post.lua", files)
    return Setup(find_wrk(), script, requests, paths, options.connections, options.seconds)


def measure_server(setup: Setup, server: ServerProcess, name: str, r: int, index: int, seconds: int) -> Throughput:
    server.wait_until_idle()
    before = server.cpu_seconds
    url = f"http://127.0.0.1:{server.port}{setup.paths[name]}"
    found = saturate(setup.wrk, setup.script, url, setup.n_connections, seconds)
    cpu_ms, client_ms = (
        1e3 * used / found.n_requests for used in (server.cpu_seconds - before, found.client_cpu_seconds)
    )
    # wrk disconnects with requests in flight.
    server.wait_until_idle()
    return Throughput(r, index, name, found.per_second, cpu_ms, client_ms, found.p50_ms, found.p99_ms)


def measure_loop(loop: LoopProcess, batch: int, r: int, index: int, seconds: int) -> Throughput:
    found = loop.run(batch, seconds)
    return Throughput(r, index, f"bare loop, batch {batch}", found.per_second, 1e3 * found.cpu_seconds / found.n_images)


def measure_single_client(
    setup: Setup, server: ServerProcess, name: str, r: int, index: int, seconds: int
) -> SingleClient:
    latencies = send_repeatedly(server.port, setup.requests[name], seconds)
    return summarise_single_client(latencies, r, index, name)


def summarise_single_client(latencies: Sequence[Latency], r: int, index: int, arm: str) -> SingleClient:
    total = statistics.median(one.total_ms for one in latencies)
    reported = [(one.total_ms, one.work_ms) for one in latencies if one.work_ms is not None]
    if not reported:
        return SingleClient(r, index, arm, total)
    work = statistics.median(work for _, work in reported)
    return SingleClient(r, index, arm, total, work, statistics.median(whole - work for whole, work in reported))
