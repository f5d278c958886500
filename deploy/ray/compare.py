"""What Ray costs: two servers that run already, asked in turns: requests/s of 32 connections, and a lone caller's wait.

`python -m deploy.ray.compare --ports 8000,9000 --names process,ray`
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lone_caller import ask_alone, make_request
from benchmarks.report import spread
from benchmarks.wrk import find_wrk, saturate, write_script

EXAMPLES = Path(__file__).parents[2] / "examples"
N_CONNECTIONS = 32
RATES = (0, 16)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ports", required=True, help="on 127.0.0.1; the first is what the others are compared with")
    parser.add_argument("--names", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=8, help="of each measurement")
    options = parser.parse_args(arguments)
    ports = dict(zip(options.names.split(","), map(int, options.ports.split(",")), strict=True))
    for r in RATES:
        print("\n".join(compare(ports, f"/classify?r={r}", options.rounds, options.seconds)), flush=True)


def compare(ports: dict[str, int], path: str, n_rounds: int, seconds: int) -> list[str]:
    """Measure in turns. Returns rows of a table.

    Raises: MeasurementError if a request failed.
    """
    images = sorted(EXAMPLES.glob("*.jpg"))
    requests = [make_request(path, image.read_bytes()) for image in images]
    busy: dict[str, list[float]] = {name: [] for name in ports}
    alone: dict[str, list[float]] = {name: [] for name in ports}
    with tempfile.TemporaryDirectory() as folder:
        script = write_script(Path(folder) / "post.lua", images)
        for _ in range(n_rounds):
            for name, port in ports.items():
                saturation = saturate(find_wrk(), script, f"http://127.0.0.1:{port}{path}", N_CONNECTIONS, seconds)
                busy[name].append(saturation.per_second)
                waits = ask_alone(port, requests, seconds / 2)
                alone[name].append(statistics.median(wait.total_ms for wait in waits))
    first = next(iter(ports))
    return [describe(name, path, busy[name], busy[first], alone[name]) for name in ports]


def describe(name: str, path: str, busy: Sequence[float], reference: Sequence[float], alone: Sequence[float]) -> str:
    ratio = spread([ours / theirs for ours, theirs in zip(busy, reference, strict=True)])
    return f"| {path} | {name} | {spread(busy).text()} | {ratio.text(2)} | {spread(alone).text()} |"


if __name__ == "__main__":
    main()
