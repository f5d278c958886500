"""Losses by name, for recipes. To add one, add a function and an entry to `LOSSES`."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from torch.nn import functional


class Loss(Protocol):
    """Return the mean loss of a batch.

    Shapes: logits (B, classes); targets (B,), or shares (B, classes) -> ()
    """

    def __call__(self, logits: Tensor, targets: Tensor, *, label_smoothing: float) -> Tensor: ...


def cross_entropy(logits: Tensor, targets: Tensor, *, label_smoothing: float) -> Tensor:
    return functional.cross_entropy(logits, targets, label_smoothing=label_smoothing)


DEFAULT_LOSS = "cross-entropy"
LOSSES: dict[str, Loss] = {DEFAULT_LOSS: cross_entropy}


def check_loss(name: str) -> None:
    """Raises: ValueError for an unknown loss."""
    if name not in LOSSES:
        raise ValueError(f"loss {name!r}: expected one of {', '.join(LOSSES)}")
