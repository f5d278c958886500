"""The service as a process, on the store of the step before: does it answer as eager does, and how many requests/s?

First the same graphs through the same backend in a bare loop of this process: no HTTP, no queue, nothing to decode.
"""

from __future__ import annotations

import functools
import http.client
import io
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.backends import BackendOptions, Runner, open_backend
from benchmarks.errors import MeasurementError
from benchmarks.gpu.clock import clock_of
from benchmarks.gpu.models import draw_pixels, encode_jpegs, make_classifier, make_vit
from benchmarks.gpu.size import Size
from benchmarks.gpu.store import VERSION, store_folder
from benchmarks.host import n_cores
from benchmarks.load.http1 import make_request
from benchmarks.load.open_loop import Call, CallResult, Client, run_measured, saturate
from benchmarks.spread import percentile
from benchmarks.timing import time_interleaved
from deploy.local.process import ServerProcess, ServiceProcess
from training.data.preprocessing import InputRule, read_pixels
from training.export.parity import MIN_MARGIN, margins
from training.models.classifier import ServedClassifier, input_rule

JPEG, PIXELS = "jpeg", "pixels"
N_IMAGES, N_COMPARED = 32, 12
# Other images than those of the export.
SEED = 1
WARM_UP_SECONDS = 1.0
DECODE_SECONDS = 1.0
Row = dict[str, Any]


def rows(size: Size, model: str, work: Path) -> Iterator[Row]:
    for row in _rows(size, model, work):
        yield {**row, "model": model}


def _rows(size: Size, model: str, work: Path) -> Iterator[Row]:
    store = store_folder(work, model)
    vit = make_vit(size.models[model])
    rule = input_rule(vit)
    pixels = draw_pixels(N_IMAGES, rule, SEED)
    jpegs = encode_jpegs(pixels, rule)
    yield from _decode(jpegs, rule, min(DECODE_SECONDS, size.load_seconds))
    yield from _bare_loop(size, store / model / VERSION, pixels)
    settings = service_settings(size)
    used_before, started_at = _device_bytes(size), time.perf_counter()
    with ServiceProcess(store, work / f"service-{model}.log", settings) as server:
        yield {
            "kind": "start",
            "settings": settings,
            "seconds": time.perf_counter() - started_at,
            "resident_bytes": server.resident_bytes,
            "device_bytes": _device_bytes(size) - used_before,
        }
        for r in size.rates:
            yield _compare(make_classifier(vit, rule, r), rule, model, server, r, pixels, jpegs)
        yield from _load(size, model, server, pixels, jpegs, used_before)


def service_settings(size: Size) -> dict[str, str]:
    return {
        "engine": size.engine,
        "device": size.device,
        "max_batch_images": str(size.max_batch_images),
        **size.settings,
    }


def _device_bytes(size: Size) -> int:
    """Return what all processes hold of the device's memory."""
    if size.device == "cpu":
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def _decode(jpegs: Sequence[bytes], rule: InputRule, least_seconds: float) -> Iterator[Row]:
    """Decode alone, in threads as the service does: the most requests/s that could be fed."""
    for n_threads in sorted({1, max(1, n_cores() * 3 // 4), n_cores()}):
        n_images, started_at, images = 0, time.perf_counter(), [*jpegs] * 4
        with ThreadPoolExecutor(n_threads) as pool:
            while time.perf_counter() - started_at < least_seconds:
                n_images += len(list(pool.map(lambda data: read_pixels(io.BytesIO(data), rule), images)))
        seconds = time.perf_counter() - started_at
        yield {"kind": "decode", "threads": n_threads, "images_per_second": n_images / seconds}


def _bare_loop(size: Size, folder: Path, pixels: Tensor) -> Iterator[Row]:
    manifest = json.loads((folder / "manifest.json").read_text())
    backend = open_backend(size.engine, BackendOptions(size.device, n_cores(), share_weights=False))
    batch = pixels.repeat(-(-size.max_batch_images // len(pixels)), 1, 1, 1)[: size.max_batch_images].numpy()
    runners: dict[int, Runner] = {}
    for r in size.rates:
        before = _device_bytes(size)
        file = next(one["file"] for one in manifest["variants"] if (one["policy"], one["r"]) == ("tome", r))
        runners[r] = backend.load(folder / file, "pixels", {"logits": "logits"})
        yield {"kind": "loaded", "r": r, "device_bytes": _device_bytes(size) - before}
    runs = {r: functools.partial(runner.run, batch) for r, runner in runners.items()}
    seconds = time_interleaved(runs, size.n_rounds, clock_of(size.device), "bare loop")
    for r, values in seconds.items():
        speed = len(batch) / statistics.median(values)
        yield {"kind": "bare loop", "r": r, "batch": len(batch), "images_per_second": speed}
    runners.clear()
    if size.device == "cuda":
        torch.cuda.empty_cache()


@torch.no_grad()
def _compare(
    classifier: Any, rule: InputRule, model: str, server: ServerProcess, r: int, pixels: Tensor, jpegs: Sequence[bytes]
) -> Row:
    """Compare answers with eager on the CPU, on images whose every decision to merge is clear."""
    chosen, is_clear = pixels[:N_COMPARED], _is_clear(classifier, pixels[:N_COMPARED])
    expected, found = classifier(chosen), torch.stack([_ask_logits(server, model, r, image) for image in chosen])
    decoded = torch.stack([torch.from_numpy(read_pixels(io.BytesIO(data), rule)) for data in jpegs[:N_COMPARED]])
    is_decoded_clear, probabilities = _is_clear(classifier, decoded), classifier(decoded).softmax(-1)
    differences = [
        max(abs(float(probabilities[place, one["index"]]) - one["probability"]) for one in _classify(server, r, data))
        for place, data in enumerate(jpegs[:N_COMPARED])
    ]
    by_image = (found - expected).abs().amax(1)
    return {
        "kind": "parity",
        "r": r,
        "n_images": N_COMPARED,
        "n_clear": int(is_clear.sum()),
        "largest_logit": float(expected.abs().max()),
        "logit_difference": _largest(by_image[is_clear]),
        "logit_difference_of_all": _largest(by_image),
        "same_label": int((found.argmax(1) == expected.argmax(1)).sum()),
        "n_clear_jpegs": int(is_decoded_clear.sum()),
        "probability_difference": _largest(torch.tensor(differences)[is_decoded_clear]),
    }


def _largest(values: Tensor) -> float | None:
    return float(values.max()) if len(values) else None


def _is_clear(classifier: ServedClassifier, pixels: Tensor) -> Tensor:
    return margins(classifier, pixels) >= MIN_MARGIN


def _classify(server: ServerProcess, r: int, data: bytes) -> list[Row]:
    answer: Row = _post(server, f"/classify?r={r}&top_k=5", data, {"Content-Type": "image/jpeg"})
    if (answer["r"], answer["degraded"]) != (r, False):
        raise MeasurementError(f"asked for r={r}, and r={answer['r']} answered, degraded: {answer['degraded']}")
    found: list[Row] = answer["predictions"]
    return found


def _ask_logits(server: ServerProcess, model: str, r: int, pixels: Tensor) -> Tensor:
    body, headers = infer_body(pixels, r)
    answer = _post(server, f"/v2/models/{model}/infer", body, headers)
    (logits,) = answer["outputs"]
    return torch.tensor(logits["data"])


def _post(server: ServerProcess, path: str, body: bytes, headers: dict[str, str]) -> Row:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request("POST", path, body, headers)
        response = connection.getresponse()
        text = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise MeasurementError(f"POST {path}: {response.status} {text[:300]!r}")
    answer: Row = json.loads(text)
    return answer


def infer_body(pixels: Tensor, r: int, output: str = "logits") -> tuple[bytes, dict[str, str]]:
    """Make a request of the Open Inference Protocol with one image as binary pixels; return its body and headers."""
    data = pixels.numpy().tobytes()
    tensor = {
        "name": "pixels",
        "datatype": "UINT8",
        "shape": [1, *pixels.shape],
        "parameters": {"binary_data_size": len(data)},
    }
    head = json.dumps({"parameters": {"r": r}, "inputs": [tensor], "outputs": [{"name": output}]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
    return head + data, headers


def _load(
    size: Size, model: str, server: ServerProcess, pixels: Tensor, jpegs: Sequence[bytes], used_before: int
) -> Iterator[Row]:
    calls: dict[tuple[str, int], list[Call]] = {}
    for r in size.load_rates:
        calls[JPEG, r] = [Call(make_request(f"/classify?r={r}", data)) for data in jpegs]
        bodies = [infer_body(image, r, "label") for image in pixels]
        calls[PIXELS, r] = [Call(make_request(f"/v2/models/{model}/infer", *parts)) for parts in bodies]
    # The first batches of each size plan what later ones reuse.
    for some in calls.values():
        _measure(server, some, max(size.n_connections), min(WARM_UP_SECONDS, size.load_seconds))
    for index in range(size.n_load_rounds):
        for kind, n_connections in ((kind, n) for kind in (JPEG, PIXELS) for n in size.n_connections):
            for r in size.load_rates if index % 2 == 0 else reversed(size.load_rates):
                measured = _measure(server, calls[kind, r], n_connections, size.load_seconds)
                device_bytes = _device_bytes(size) - used_before
                about = {"kind": "load", "round": index, "body": kind, "connections": n_connections, "r": r}
                yield {**about, **measured, "resident_bytes": server.resident_bytes, "device_bytes": device_bytes}


def _measure(server: ServerProcess, calls: Sequence[Call], n_connections: int, seconds: float) -> Row:
    async def work(client: Client) -> list[CallResult]:
        return await saturate(client, calls, n_connections, seconds)

    cpu_before, started_at = server.cpu_seconds, time.perf_counter()
    results, client_cpu = run_measured(server.port, n_connections, work)
    elapsed = time.perf_counter() - started_at
    latencies = [one.latency_ms for one in results if one.latency_ms is not None]
    right = [one for one in results if one.status == 200]
    spent = max(one.answered_at or 0.0 for one in results) - min(one.sent_at for one in results)
    return {
        "requests_per_second": len(right) / spent,
        "statuses": {str(status): count for status, count in Counter(one.status for one in results).items()},
        "batch_size": _mean_batch(right),
        "p50_ms": percentile(latencies, 50),
        "p99_ms": percentile(latencies, 99),
        "server_cpu": (server.cpu_seconds - cpu_before) / elapsed,
        "client_cpu": client_cpu,
    }


def _mean_batch(results: Sequence[CallResult]) -> float | None:
    """Return how many images the run of a request had, on average."""
    answers = [json.loads(one.body) for one in results]
    sizes = [answer.get("batch_size") or answer.get("parameters", {}).get("batch_size") for answer in answers]
    known = [batch for batch in sizes if batch is not None]
    return statistics.fmean(known) if known else None
