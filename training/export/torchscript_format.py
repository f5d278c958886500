"""TorchScript graphs. PyTorch calls them deprecated, so all that knows of them on this side is in this module."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.models.classifier import FrozenClassifier


def export_torchscript(classifier: FrozenClassifier, example: Tensor, file: Path) -> None:
    """Trace and save the graph, weights included. Shapes: example uint8 (B, H, W, 3) with B >= 2"""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # deprecation; and that traced shapes are constants, which is what is wanted
        traced: Any = torch.jit.trace(  # type: ignore[no-untyped-call]
            classifier, (example,), check_trace=False
        )
        torch.jit.freeze(traced).save(str(file))


class TorchScriptClassifier:
    """An exported graph, run as the service would on a CPU."""

    def __init__(self, file: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._graph: Any = torch.jit.load(str(file), map_location="cpu")  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Any:
        """Return logits; of a model that adapts tokens and GMACs of each image too."""
        return self._graph(pixels)
