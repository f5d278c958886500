"""All kinds of callers at once, for minutes, below saturation, while new versions are published: nothing may fail.

`python -m benchmarks.mixed --minutes 5 --load 0.8 --out docs/results/mixed`
Every request has a set of statuses that it may be answered with, and an answer with 200 is held to what was asked for.
Twice a new version appears in the store, and the old one goes once the new one is served. At the end what the server
counted must equal what its callers saw, and it must hold no more memory than at the start. Ends with 1 on a violation.
"""

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

from benchmarks.books import Book, read_book
from benchmarks.labelled_jpegs import LabelledJpeg, draw_jpegs
from benchmarks.mixed_report import Bounds, Course, draw_figure, find_violations, markdown, summarise
from benchmarks.mixed_requests import Mixture, Request
from benchmarks.open_loop import (
    Call,
    Client,
    Exchange,
    arrival_times,
    clock,
    effort,
    keep_busy,
    offer,
    run_measured,
)
from benchmarks.report import describe_host, positive, report
from benchmarks.served import MeasurementError, Served, add_setting_option, serve_store
from benchmarks.sub_store import MANIFEST, publish_part

N_CALLERS = 16  # that keep it busy, to measure capacity
N_CONNECTIONS = 64
DRAIN_SECONDS = 20.0
LOOK_SECONDS = 0.25
MAX_BODY_BYTES = 1_000_000  # small, so that a body that is too large is quickly sent
PUBLISH_AT = (0.3, 0.55)  # of the time; the last quarter sees the memory after both
LIST_MODELS = Call(b"GET /models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")


@dataclass
class Store:
    """The store of the server, as an operator changes it. folder: of the version that is to be served."""

    root: Path
    published: Path
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder = publish_part(self.published, self.root, lambda variant: True)

    def publish_next(self) -> Path:
        """Returns the folder that it takes the place of."""
        last = self.folder
        self.folder = publish_part(self.published, self.root, lambda variant: True, str(int(last.name) + 1))
        return last

    def take_away(self, folder: Path) -> None:
        gone = folder.rename(folder.with_name(f".{folder.name}.gone"))
        shutil.rmtree(gone)


async def watch(server: Served, course: Course) -> None:
    """Look at the server's memory until cancelled."""
    while True:
        course.memory.append((clock() - course.started_at, server.resident_bytes))
        await asyncio.sleep(LOOK_SECONDS)


async def publish_versions(server: Served, client: Client, store: Store, course: Course, seconds: float) -> None:
    """Publish new versions while callers call, and take each old one away once the new one is served."""
    for share in PUBLISH_AT:
        await asyncio.sleep(max(0, course.started_at + share * seconds - clock()))
        old = store.publish_next()
        published_at = clock()
        server.hang_up()
        while store.folder.name not in await list_versions(client):
            await asyncio.sleep(LOOK_SECONDS)
        course.reloads.append((store.folder.name, published_at - course.started_at, clock() - published_at))
        store.take_away(old)
        server.hang_up()
        while old.name in await list_versions(client):
            await asyncio.sleep(LOOK_SECONDS)


async def list_versions(client: Client) -> list[str]:
    exchange = client.send(LIST_MODELS)
    await exchange.ended
    return [model["version"] for model in json.loads(exchange.body)["models"]] if exchange.status == 200 else []


async def call_mixed(
    client: Client, server: Served, store: Store, traffic: tuple[Sequence[Call], Sequence[float]], course: Course
) -> list[Exchange]:
    """traffic: what is sent, and when."""
    calls, times = traffic
    course.started_at = clock()
    seconds = times[-1]
    tasks = [
        asyncio.create_task(watch(server, course)),
        asyncio.create_task(publish_versions(server, client, store, course, seconds)),
    ]
    exchanges = await offer(client, calls, times, DRAIN_SECONDS)
    await asyncio.wait(tasks[1:], timeout=DRAIN_SECONDS)
    for task in tasks:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    course.last_versions = await list_versions(client)
    return exchanges


def measure_capacity(server: Served, requests: Sequence[Request], seconds: float) -> float:
    """Units: requests/s of this mixture, from callers who wait for their answers."""
    calls = [request.call for request in requests if request.call.hang_up_after is None]
    with server.expected_to_listen():
        exchanges, _ = run_measured(server.port, N_CALLERS, lambda client: keep_busy(client, calls, N_CALLERS, seconds))
    ends = [exchange.answered_at for exchange in exchanges if exchange.answered_at is not None]
    if len(ends) < len(exchanges) or not ends:
        raise MeasurementError(f"of {len(exchanges)} requests {len(exchanges) - len(ends)} got no answer at all")
    return len(ends) / (max(ends) - min(exchange.sent_at for exchange in exchanges))


def scrape(server: Served) -> Book:
    server.settle()  # it counts a request after its answer has left
    return read_book(server.get("/metrics")[1].decode())


def measure(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Returns what was seen, and what should not have been.

    Raises: MeasurementError, ValueError.
    """
    manifest = json.loads((options.published / MANIFEST).read_text())
    store = Store(folder / "store", options.published)
    jpegs: list[LabelledJpeg] = draw_jpegs(options.n_images)
    seconds = 60 * options.minutes
    course = Course()
    settings = {"max_body_bytes": str(MAX_BODY_BYTES), "log_level": "warning", **dict(options.setting)}
    with serve_store(store.root, folder / "service.log", settings) as server:
        warm_up = Mixture(manifest, jpegs, MAX_BODY_BYTES, options.seed + 1).draw(1000)
        capacity = measure_capacity(server, warm_up, options.warm_up_seconds)
        times = arrival_times(options.load * capacity, seconds, options.seed).tolist()
        if not times:
            raise MeasurementError(
                f"no request is due within {seconds:g} s at {options.load * capacity:.2g} requests/s"
            )
        requests = Mixture(manifest, jpegs, MAX_BODY_BYTES, options.seed).draw(len(times))
        before = scrape(server)
        traffic = [request.call for request in requests], times
        with server.expected_to_listen():
            exchanges, cpu_share = run_measured(
                server.port, N_CONNECTIONS, lambda client: call_mixed(client, server, store, traffic, course)
            )
        counted = scrape(server)
        counted.subtract(before)
        bounds = Bounds(options.max_refused, options.max_growth_mb * 1e6)
        violations = find_violations(requests, exchanges, course, counted, bounds)
        if violations:
            print(f"the service's last words:\n{server.last_words}", file=sys.stderr)
    chosen = ("minutes", "load", "n_images", "seed", "setting", "max_refused", "max_growth_mb")
    about = {name: getattr(options, name) for name in chosen}
    about |= {"model": str(options.published), "capacity": capacity, "host": describe_host()}
    content = summarise(requests, exchanges, course, effort(exchanges, cpu_share))
    return {"about": about, "violations": violations, **content}, violations


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, default=Path("model_store/reference/4"))
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--load", type=float, default=0.8, help="of what it can answer of this mixture")
    parser.add_argument("--warm-up-seconds", type=float, default=10, help="at saturation, which measures capacity")
    parser.add_argument("--n-images", type=positive, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-refused", type=float, default=0.01, help="share of requests without a deadline")
    parser.add_argument("--max-growth-mb", type=float, default=64, help="of memory, from the first minute to the last")
    parser.add_argument("--out", type=Path, help="files <out>.md, <out>.json and <out>.png")
    add_setting_option(parser)
    options = parser.parse_args(arguments)
    for name in ("minutes", "load", "warm_up_seconds"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name):g}: a number above 0 is wanted")
    return options


def main(arguments: list[str] | None = None) -> int:
    violations: list[str] = []

    def measure_in_a_folder(options: argparse.Namespace) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="dtem-mixed-") as name:
            content, found = measure(options, Path(name))
        violations.extend(found)
        return content

    status = report(read_options(arguments), measure_in_a_folder, markdown, draw_figure)
    return 1 if violations else status


if __name__ == "__main__":
    sys.exit(main())
