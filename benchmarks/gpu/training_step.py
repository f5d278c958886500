"""One training step of DTEM, the ViT frozen and merging relaxed, against a plain step through the same frozen ViT."""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from benchmarks.gpu.clock import clock_of
from benchmarks.gpu.size import Size
from benchmarks.relaxed.measure import BOTH, FORWARD, Steps, peak_bytes
from benchmarks.timing import paired_ratio, time_interleaved
from training.models.embedding import default_dim

FROZEN = "plain forward and backward, weights frozen"
PRECISION = "bfloat16"
Row = dict[str, Any]


class FrozenSteps(Steps):
    def frozen(self) -> None:
        """Forward and backward through the ViT to its images: the least that any step through a frozen ViT takes."""
        self.vit.requires_grad_(False)
        images = self.images.detach().requires_grad_()
        with self._autocast():
            loss = functional.cross_entropy(self.vit(images).float(), self.labels)
        torch.autograd.grad(loss, images)


def rows(size: Size, model: str, work: Path) -> Iterator[Row]:
    architecture = size.models[model]
    options = argparse.Namespace(
        architecture=architecture.timm_name,
        arguments=architecture.arguments,
        dim=default_dim(0),
        batch_size=size.training_batch,
        device=size.device,
        precision=PRECISION,
    )
    steps = FrozenSteps(options)
    runs: dict[str, Callable[[], None]] = {FORWARD: steps.forward, BOTH: steps.both, FROZEN: steps.frozen}
    for r in size.training_rates:
        runs[f"relaxed r={r}, tail kept"] = functools.partial(steps.relaxed, r, keep_tail=True)
        runs[f"relaxed r={r}, no tail"] = functools.partial(steps.relaxed, r, keep_tail=False)
    seconds = time_interleaved(runs, size.n_rounds, clock_of(size.device), "steps")
    for name, values in seconds.items():
        yield {
            "kind": "training step",
            "model": model,
            "precision": PRECISION,
            "batch": size.training_batch,
            "step": name,
            "seconds": statistics.median(values),
            "to_frozen": paired_ratio(values, seconds[FROZEN]).median,
            "to_both": paired_ratio(values, seconds[BOTH]).median,
            "peak_bytes": peak_bytes(runs[name], size.device),
        }
