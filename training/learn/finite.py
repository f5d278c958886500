"""A loss or a gradient that is not a finite number ends a run before it reaches the weights."""

from __future__ import annotations

import math


def check_finite(step: int, *, loss: float, gradient_norm: float) -> None:
    """Raises: ValueError naming the step, counted from 1, and which of the two is not finite."""
    for name, value in (("loss", loss), ("gradient norm", gradient_norm)):
        if not math.isfinite(value):
            raise ValueError(
                f"step {step}: the {name} is {value}; the run ends before this step and keeps its last checkpoint. "
                "A lower learning_rate, a smaller clip_norm or precision = 'float32' may help, in another folder"
            )
