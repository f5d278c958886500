"""Entry: one image that waits for the device, with what its caller wants of it. Batch: entries that run together."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.backends import Pixels
from app.catalogue import ServedVariant

Ladder = tuple[ServedVariant, ...]
Family = tuple[str, str, str]  # model, version, policy: whose rates go up and down together
_serial = itertools.count()


@dataclass(eq=False, slots=True)
class Entry:
    """Units: seconds of the engine's clock.

    ladder: the variants it may run as, the preferred first, then ever cheaper ones; a single one where the caller
    insists. due: its deadline, or without one the time by which it would be patient; the order in which entries run.

    Shapes: pixels (H, W, 3)
    """

    pixels: Pixels
    ladder: Ladder
    family: Family
    submitted_at: float
    due: float
    deadline: float | None = None
    request_id: str = ""
    owner: Any = None  # whom the answer is for
    serial: int = field(default_factory=_serial.__next__)

    @property
    def order(self) -> tuple[float, int]:
        return (self.due, self.serial)

    @property
    def is_flexible(self) -> bool:
        return len(self.ladder) > 1


@dataclass(frozen=True)
class Batch:
    """Entries of one variant, to be run at once. Units: seconds."""

    variant: ServedVariant
    entries: Sequence[Entry]
    started_at: float


@dataclass(frozen=True)
class Done:
    """What became of one image. Units: seconds, GMACs.

    Shapes: logits (classes,), tokens (blocks + 1,)
    """

    variant: ServedVariant
    is_degraded: bool
    logits: NDArray[np.float32]
    tokens: list[int] | None
    gmacs: float | None
    batch_size: int
    started_at: float
    queue_seconds: float
    inference_seconds: float
