"""Interleaved rounds against servers that are already running."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.host import describe_host
from benchmarks.load.http1 import make_request
from benchmarks.load.single_client import send_repeatedly
from benchmarks.load.wrk import find_wrk, saturate, write_script
from deploy.local.process import ROOT

EXAMPLES = ROOT / "examples"
N_CONNECTIONS = 32
RATES = (0, 16)


@dataclass(frozen=True)
class Measured:
    """One server at one rate in one round. Units: ms, median of a single client."""

    r: int
    server: str
    round: int
    per_second: float
    single_client_ms: float


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Raises: MeasurementError if a request failed; ValueError for names that do not match the ports."""
    names = options.names.split(",")
    if len(names) != len(options.ports):
        raise ValueError(f"--names {options.names}: expected {len(options.ports)} names, one per port")
    ports = dict(zip(names, options.ports, strict=True))
    rows = [row for r in RATES for row in measure_rate(ports, r, options.rounds, options.seconds)]
    about = {"connections": N_CONNECTIONS, "rounds": options.rounds, "seconds": options.seconds}
    return {"about": about | {"host": describe_host()}, "rows": [asdict(row) for row in rows]}


def measure_rate(ports: dict[str, int], r: int, n_rounds: int, seconds: int) -> list[Measured]:
    path = f"/classify?r={r}"
    images = sorted(EXAMPLES.glob("*.jpg"))
    requests = [make_request(path, image.read_bytes()) for image in images]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        script = write_script(Path(folder) / "post.lua", images)
        for index in range(n_rounds):
            for name, port in ports.items():
                saturation = saturate(find_wrk(), script, f"http://127.0.0.1:{port}{path}", N_CONNECTIONS, seconds)
                latencies = send_repeatedly(port, requests, seconds / 2)
                median = statistics.median(one.total_ms for one in latencies)
                rows.append(Measured(r, name, index, saturation.per_second, median))
    return rows
