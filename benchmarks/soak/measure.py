"""Mixed open-loop traffic, while an operator publishes and removes versions."""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.errors import MeasurementError
from benchmarks.host import describe_host
from benchmarks.load.labelled_jpegs import draw_jpegs
from benchmarks.load.open_loop import (
    Call,
    CallResult,
    Client,
    arrival_times,
    client_load,
    clock,
    offer,
    run_measured,
    saturate,
)
from benchmarks.servers.partial_store import MANIFEST, publish_part
from benchmarks.soak.ledger import Ledger, read_ledger
from benchmarks.soak.report import summarise
from benchmarks.soak.requests import Mixture, Request
from benchmarks.soak.violations import Limits, Observations, find_violations
from deploy.local.process import ServerProcess, ServiceProcess

# In flight at saturation, to measure capacity.
CONCURRENCY = 16
N_CONNECTIONS = 64
DRAIN_SECONDS = 20.0
POLL_SECONDS = 0.25
# Small, so that requests with larger bodies are sent quickly.
MAX_BODY_BYTES = 1_000_000
# Shares of the run. The last quarter shows the memory after both reloads.
PUBLISH_AT = (0.3, 0.55)
LIST_MODELS = Call(b"GET /models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")


@dataclass
class Store:
    """The model store of the server, with the changes of an operator. folder: of the newest version."""

    root: Path
    published: Path
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder = publish_part(self.published, self.root, lambda variant: True)

    def publish_next(self) -> Path:
        """Publish a new version. Returns the folder of the one before."""
        last = self.folder
        self.folder = publish_part(self.published, self.root, lambda variant: True, str(int(last.name) + 1))
        return last

    def remove(self, folder: Path) -> None:
        removed = folder.rename(folder.with_name(f".{folder.name}.removed"))
        shutil.rmtree(removed)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Raises: MeasurementError, LaunchError, ValueError."""
    with tempfile.TemporaryDirectory(prefix="dtem-soak-") as name:
        return _measure(options, Path(name))


def _measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    manifest = json.loads((options.published / MANIFEST).read_text())
    store = Store(folder / "store", options.published)
    jpegs = draw_jpegs(options.n_images)
    seconds = 60 * options.minutes
    seen = Observations()
    settings = {"max_body_bytes": str(MAX_BODY_BYTES), "log_level": "warning", **dict(options.setting)}
    with ServiceProcess(store.root, folder / "service.log", settings) as server:
        warm_up = Mixture(manifest, jpegs, MAX_BODY_BYTES, options.seed + 1).draw(1000)
        capacity = measure_capacity(server, warm_up, options.warm_up_seconds)
        rate = options.load * capacity
        times = arrival_times(rate, seconds, options.seed).tolist()
        if not times:
            raise MeasurementError(f"no request arrives within {seconds:g} s at {rate:.2g} requests/s")
        requests = Mixture(manifest, jpegs, MAX_BODY_BYTES, options.seed).draw(len(times))
        before = scrape(server)
        traffic = [request.call for request in requests], times
        with server.expected_to_listen():
            results, cpu_share = run_measured(
                server.port, N_CONNECTIONS, lambda client: send_traffic(client, server, store, traffic, seen)
            )
        counted = scrape(server)
        counted.subtract(before)
        limits = Limits(options.max_refused, options.max_growth_mb * 1e6)
        violations = find_violations(requests, results, seen, counted, limits)
        if violations:
            print(f"last log lines of the service:\n{server.log_tail}", file=sys.stderr)
    chosen = ("minutes", "load", "n_images", "seed", "setting", "max_refused", "max_growth_mb")
    about = {name: getattr(options, name) for name in chosen}
    about |= {"model": str(options.published), "capacity": capacity, "host": describe_host()}
    summary = summarise(requests, results, seen, client_load(results, cpu_share))
    return {"about": about, "violations": violations, **summary}


def measure_capacity(server: ServerProcess, requests: Sequence[Request], seconds: float) -> float:
    """Return requests/s of this mixture at saturation, without clients that disconnect."""
    calls = [request.call for request in requests if request.call.hang_up_after is None]
    with server.expected_to_listen():
        results, _ = run_measured(
            server.port, CONCURRENCY, lambda client: saturate(client, calls, CONCURRENCY, seconds)
        )
    ends = [result.answered_at for result in results if result.answered_at is not None]
    if len(ends) < len(results) or not ends:
        raise MeasurementError(f"{len(results) - len(ends)} of {len(results)} requests got no response")
    return len(ends) / (max(ends) - min(result.sent_at for result in results))


def scrape(server: ServerProcess) -> Ledger:
    # The server counts a request after it has sent the response.
    server.wait_until_idle()
    return read_ledger(server.get("/metrics")[1].decode())


async def send_traffic(
    client: Client,
    server: ServerProcess,
    store: Store,
    traffic: tuple[Sequence[Call], Sequence[float]],
    seen: Observations,
) -> list[CallResult]:
    """Send the requests while versions are published. traffic: requests and their arrival times."""
    calls, times = traffic
    seen.started_at = clock()
    seconds = times[-1]
    tasks = [
        asyncio.create_task(sample_memory(server, seen)),
        asyncio.create_task(publish_versions(server, client, store, seen, seconds)),
    ]
    results = await offer(client, calls, times, DRAIN_SECONDS)
    await asyncio.wait(tasks[1:], timeout=DRAIN_SECONDS)
    for task in tasks:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    seen.last_versions = await list_versions(client)
    return results


async def sample_memory(server: ServerProcess, seen: Observations) -> None:
    """Record the server's memory until cancelled."""
    while True:
        seen.memory.append((clock() - seen.started_at, server.resident_bytes))
        await asyncio.sleep(POLL_SECONDS)


async def publish_versions(
    server: ServerProcess, client: Client, store: Store, seen: Observations, seconds: float
) -> None:
    """Publish new versions, and remove each old version once the new one is served."""
    for share in PUBLISH_AT:
        await asyncio.sleep(max(0, seen.started_at + share * seconds - clock()))
        old = store.publish_next()
        published_at = clock()
        server.reload()
        while store.folder.name not in await list_versions(client):
            await asyncio.sleep(POLL_SECONDS)
        seen.reloads.append((store.folder.name, published_at - seen.started_at, clock() - published_at))
        store.remove(old)
        server.reload()
        while old.name in await list_versions(client):
            await asyncio.sleep(POLL_SECONDS)


async def list_versions(client: Client) -> list[str]:
    result = client.send(LIST_MODELS)
    await result.ended
    return [model["version"] for model in json.loads(result.body)["models"]] if result.status == 200 else []
