"""TorchScript graphs. The format is deprecated, so only this module uses it in training."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.export.scores import ShownScores
from training.models.frozen import FrozenModule


def export_torchscript(module: FrozenModule, example: Tensor, file: Path, weights: Path | None = None) -> list[str]:
    """Trace and save the graph, which contains its weights: it requires no other file.

    Shapes: example uint8 (B, H, W, 3) with B >= 2
    """
    _frozen_trace(module, example).save(str(file))
    return []


def traced_scores(module: FrozenModule, example: Tensor) -> Any:
    """Return a graph made in the same way that also returns its scores.

    A graph file does not name its inner values, so its scores cannot be taken out of it.
    """
    return torch.no_grad()(_frozen_trace(ShownScores(module).eval(), example))


def _frozen_trace(module: nn.Module, example: Tensor) -> Any:
    with warnings.catch_warnings(), torch.no_grad():
        # Ignore the deprecation, and that traced shapes become constants, as intended.
        warnings.simplefilter("ignore")
        traced: Any = torch.jit.trace(  # type: ignore[no-untyped-call]
            module, (example,), check_trace=False
        )
        return torch.jit.freeze(traced)


class TorchScriptClassifier:
    """An exported graph, run as the service does."""

    def __init__(self, file: Path, device: str = "cpu") -> None:
        self._device = device
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._graph: Any = torch.jit.load(str(file), map_location=device)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Any:
        """Return the outputs of the graph: one tensor, or a tuple."""
        found = self._graph(pixels.to(self._device))
        return found.cpu() if isinstance(found, Tensor) else tuple(part.cpu() for part in found)
