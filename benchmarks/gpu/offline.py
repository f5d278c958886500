"""The models alone: images/s of the forward pass by engine, precision, batch and rate, pixels already on the device.

Engines and rates take turns within a round, so every ratio is of one run. `cuda graph` is eager, captured once and
replayed: what is left when launching kernels costs nothing. Attention is plain, as exported, unless another of its
exact forms is named.
"""

from __future__ import annotations

import functools
import statistics
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.clock import clock_of, n_calls_of, repeat
from benchmarks.gpu.models import draw_pixels, make_classifier, make_vit
from benchmarks.gpu.size import Size
from benchmarks.relaxed.measure import peak_bytes
from benchmarks.timing import paired_ratio, time_interleaved
from training.models import count_macs
from training.models.classifier import frozen_classifier, input_rule

EAGER, TORCHSCRIPT, CUDA_GRAPH = "eager", "torchscript", "cuda graph"
N_WARM_UPS = 3
Run = Callable[[], object]
Row = dict[str, Any]


def rows(size: Size, model: str, work: Path) -> Iterator[Row]:
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 means float32, as in the service
    torch.backends.cudnn.allow_tf32 = False
    vit = make_vit(size.models[model])
    rule = input_rule(vit)
    macs = {r: count_macs(frozen_classifier(vit, rule, r).model, (rule.height, rule.width)) for r in size.rates}
    pixels = draw_pixels(max(size.batches), rule).to(size.device)
    for precision in size.precisions:
        forms: dict[str, dict[int, nn.Module]] = {
            str(form): {r: make_classifier(vit, rule, r, precision, form).to(size.device) for r in size.rates}
            for form in ("plain", *size.forms)
        }
        traced = {r: trace(classifier, pixels[:2]) for r, classifier in forms["plain"].items()}
        for batch in size.batches:
            about = {"kind": "forward", "model": model, "precision": precision, "batch": batch}
            runs, refused = _make_runs(forms, traced, pixels[:batch], size)
            yield from ({**about, "kind": "refused", **reason} for reason in refused)
            for row in _time(runs, batch, size):
                yield {**about, **row, "macs": macs[row["r"]]}


def trace(classifier: nn.Module, example: Tensor) -> Any:
    """Trace and freeze, as the exporter does."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.jit.freeze(torch.jit.trace(classifier, (example,), check_trace=False))  # type: ignore[no-untyped-call]


def _make_runs(
    forms: dict[str, dict[int, nn.Module]], traced: dict[int, Any], pixels: Tensor, size: Size
) -> tuple[dict[tuple[str, int], Run], list[Row]]:
    """Return what to time, by engine and rate, and which of it could not be made, with the reason."""
    runs: dict[tuple[str, int], Run] = {}
    refused: list[Row] = []
    wrap, name = (capture, CUDA_GRAPH) if size.device == "cuda" else (_eager, EAGER)
    makers: dict[str, Callable[[int], Run]] = {
        EAGER: lambda r: _eager(forms["plain"][r], pixels),
        TORCHSCRIPT: lambda r: functools.partial(_run_traced, traced[r], pixels),
        **({CUDA_GRAPH: lambda r: capture(forms["plain"][r], pixels)} if size.device == "cuda" else {}),
        **{f"{name}, {form}": functools.partial(_make, wrap, forms[form], pixels) for form in size.forms},
    }
    for engine, make in makers.items():
        for r in size.rates:
            try:
                run = make(r)
                run()
            except RuntimeError as error:
                refused.append({"engine": engine, "r": r, "reason": str(error)[:400]})
            else:
                runs[engine, r] = run
    return runs, refused


def _make(wrap: Callable[[nn.Module, Tensor], Run], by_rate: dict[int, nn.Module], pixels: Tensor, r: int) -> Run:
    return wrap(by_rate[r], pixels)


def _eager(classifier: nn.Module, pixels: Tensor) -> Run:
    return functools.partial(_run_eager, classifier, pixels)


def _run_eager(classifier: nn.Module, pixels: Tensor) -> object:
    with torch.inference_mode():
        return classifier(pixels)


def _run_traced(traced: Any, pixels: Tensor) -> object:
    with torch.inference_mode(), torch.jit.optimized_execution(False):  # type: ignore[attr-defined]  # as the service
        return traced(pixels)


def capture(classifier: nn.Module, pixels: Tensor) -> Run:
    """Capture a forward pass as a CUDA graph; return what replays it."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad():
        with torch.cuda.stream(stream):
            for _ in range(N_WARM_UPS):
                classifier(pixels)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            classifier(pixels)
    return graph.replay


def _time(runs: dict[tuple[str, int], Run], batch: int, size: Size) -> Iterator[Row]:
    clock = clock_of(size.device)
    n_calls = {key: n_calls_of(run, size.least_seconds, clock) for key, run in runs.items()}
    repeated = {key: functools.partial(repeat, run, n_calls[key]) for key, run in runs.items()}
    measured = time_interleaved(repeated, size.n_rounds, clock, f"batch {batch}")
    seconds = {key: [one / n_calls[key] for one in values] for key, values in measured.items()}
    for (engine, r), values in seconds.items():
        base = seconds.get((engine, size.rates[0]))
        yield {
            "engine": engine,
            "r": r,
            "images_per_second": batch / statistics.median(values),
            "ratio": None if base is None else paired_ratio(base, values).median,
            "peak_bytes": None if engine.startswith(CUDA_GRAPH) else peak_bytes(runs[engine, r], size.device),
        }
