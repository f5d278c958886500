"""What the machine is: card, driver, versions, and the fastest matrix product it does, as a limit for the rest."""

from __future__ import annotations

import importlib.metadata
import statistics
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.clock import clock_of, repeat
from benchmarks.gpu.commit import read_commit
from benchmarks.gpu.size import Device, Size
from benchmarks.host import describe_host

PACKAGES = ("torch", "torchvision", "timm", "numpy", "onnx", "onnxruntime", "pillow", "fastapi", "uvicorn", "pydantic")
N_RUNS, N_ROUNDS = 10, 5
COPY_BYTES = 2**32
Row = dict[str, Any]


def rows(size: Size, model: str, work: Path) -> Iterator[Row]:
    yield {"kind": "machine", "commit": read_commit(), **describe_host(), **_card(size), "packages": _versions()}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield _matrix_product(size, dtype)
    if size.device == "cuda":
        yield _copy()


def _card(size: Size) -> Row:
    if size.device == "cpu":
        return {"card": None}
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    free, total = torch.cuda.mem_get_info()
    about = {"nvidia_smi": found, "cuda": torch.version.cuda, "free_bytes": free, "total_bytes": total}
    return {"card": torch.cuda.get_device_name(), **about}


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _matrix_product(size: Size, dtype: torch.dtype) -> Row:
    side = size.matrix_side
    a, b = (torch.randn(side, side, device=size.device).to(dtype) for _ in range(2))
    seconds = _median_seconds(lambda: a @ b, size.device)
    return {
        "kind": "matrix product",
        "side": side,
        "precision": str(dtype).removeprefix("torch."),
        "tflops": 2 * side**3 / seconds / 1e12,
    }


def _copy() -> Row:
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    seconds = _median_seconds(lambda: target.copy_(source), "cuda")
    return {"kind": "copy on the device", "bytes_per_second": 2 * COPY_BYTES / seconds}


def _median_seconds(run: Callable[[], object], device: Device) -> float:
    """Return seconds of one run, the median over rounds of several."""
    clock, measured = clock_of(device), []
    for _ in range(N_ROUNDS + 1):
        started_at = clock()
        repeat(run, N_RUNS)
        measured.append((clock() - started_at) / N_RUNS)
    return statistics.median(measured[1:])
