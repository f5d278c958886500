"""Learning rate schedules: linear warm-up, and half a cosine from a start to an end."""

from __future__ import annotations

import math


def half_cosine(share: float, start: float, end: float) -> float:
    """Return the rate after a share of the schedule; past its end, the end."""
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, share))) / 2


def warmup(n_seen: int, n_images: int) -> float:
    """Return the factor of a linear warm-up over n_images; 0 means no warm-up."""
    return min(1.0, n_seen / n_images) if n_images else 1.0
