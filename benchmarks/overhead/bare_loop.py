"""A graph in a bare loop: no HTTP, no queue. A pool decodes images while the previous batch runs.

`python -m benchmarks.overhead.bare_loop --published … --graph tome-r16.onnx --threads 2 --decode-threads 2
--images <folder>` answers each line on stdin, `{"batch": 8, "seconds": 10}`, with a line on stdout.
Batch 0 means one image after another without overlap, the baseline of a single client.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np

from app.backends import BackendOptions, Pixels, Runner, open_backend
from app.store.manifest import MANIFEST_FILE, Input, Manifest
from app.store.preprocessing import decode_image
from benchmarks.errors import MeasurementError
from deploy.local.process import ROOT, environment

MAX_PIXELS = 50_000_000
N_BATCHES_AHEAD = 2
UNBATCHED = 0


@dataclass(frozen=True)
class LoopResult:
    """The result of a run. latencies_ms: per image, empty for batches."""

    n_images: int
    seconds: float
    cpu_seconds: float
    latencies_ms: list[float]

    @property
    def per_second(self) -> float:
        return self.n_images / self.seconds


class Loop:
    def __init__(self, runner: Runner, rule: Input, images: Sequence[bytes], n_decode_threads: int) -> None:
        self._runner, self._rule = runner, rule
        self._images = itertools.cycle(images)
        self._pool = ThreadPoolExecutor(n_decode_threads)

    def run(self, batch: int, seconds: float) -> LoopResult:
        """Run for some seconds. The last batch is completed and counted."""
        started_at, cpu_started_at = time.perf_counter(), time.process_time()
        steps = self._unbatched() if batch == UNBATCHED else self._batches(batch)
        n_images, latencies = 0, []
        before = started_at
        for step in steps:
            n_images += step
            now = time.perf_counter()
            latencies.append((now - before) * 1e3)
            if now - started_at >= seconds:
                break
            before = now
        used = time.process_time() - cpu_started_at
        return LoopResult(n_images, now - started_at, used, latencies if batch == UNBATCHED else [])

    def _unbatched(self) -> Iterator[int]:
        while True:
            self._runner.run(self._decode(next(self._images))[None])
            yield 1

    def _batches(self, size: int) -> Iterator[int]:
        ahead = deque(self._submit(size) for _ in range(N_BATCHES_AHEAD))
        while True:
            pixels = np.stack([future.result() for future in ahead.popleft()])
            ahead.append(self._submit(size))
            self._runner.run(pixels)
            yield size

    def _submit(self, size: int) -> list[Future[Pixels]]:
        return [self._pool.submit(self._decode, data) for data in itertools.islice(self._images, size)]

    def _decode(self, data: bytes) -> Pixels:
        return decode_image(data, self._rule, MAX_PIXELS)


class LoopProcess:
    """The loop in a separate process, idle between runs."""

    def __init__(self, arguments: Mapping[str, object]) -> None:
        named = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
        self._command = [sys.executable, "-m", "benchmarks.overhead.bare_loop", *named]

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command,
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        # The process ends at the end of its stdin.
        self._process.communicate()

    def run(self, batch: int, seconds: float) -> LoopResult:
        """Raises: MeasurementError if the process has ended."""
        try:
            print(json.dumps({"batch": batch, "seconds": seconds}), file=self._process.stdin, flush=True)
        except BrokenPipeError as error:
            raise MeasurementError("the bare loop ended; its messages are above") from error
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise MeasurementError("the bare loop ended; its messages are above")
        return LoopResult(**json.loads(line))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, required=True)
    parser.add_argument("--graph", required=True, help="a file of the version")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--decode-threads", type=int, required=True)
    parser.add_argument("--images", type=Path, required=True, help="folder of image files")
    options = parser.parse_args(arguments)
    manifest = Manifest.model_validate_json((options.published / MANIFEST_FILE).read_bytes())
    backend = open_backend("onnxruntime", BackendOptions("cpu", options.threads, share_weights=False))
    runner = backend.load(options.published / options.graph, manifest.input.name, {"logits": manifest.output.name})
    images = [file.read_bytes() for file in sorted(options.images.iterdir())]
    loop = Loop(runner, manifest.input, images, options.decode_threads)
    for line in sys.stdin:
        print(json.dumps(asdict(loop.run(**json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
