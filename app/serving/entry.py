"""Entry: one image in the queue, with what its request asked for. Batch: entries that run together."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from app.backends import Pixels
from app.errors import ServiceError
from app.observability.record import ImageResult
from app.store.catalogue import ServedVariant

# The preferred variant first, then ever cheaper ones.
Ladder = tuple[ServedVariant, ...]
# Model, version and policy: the rates of a family rise and fall together.
Family = tuple[str, str, str]
Outcome = ImageResult | ServiceError
Outcomes = Sequence[tuple["Entry", Outcome]]
# Takes the outcomes of some entries of one request, in the event loop.
Reply = Callable[[Outcomes], None]
_serial = itertools.count()


@dataclass(eq=False, slots=True)
class Entry:
    """Units: seconds of the engine's clock.

    ladder: the variants that it may run as; only one if the request did not opt in to a higher rate.
    due: its deadline, or the target latency if it has none. Entries run in this order.
    reply: None once the request was answered or cancelled.

    Shapes: pixels (H, W, 3)
    """

    pixels: Pixels
    ladder: Ladder
    family: Family
    submitted_at: float
    due: float
    deadline: float | None = None
    request_id: str = ""
    decode_seconds: float = 0.0
    reply: Reply | None = None
    serial: int = field(default_factory=_serial.__next__)

    @property
    def order(self) -> tuple[float, int]:
        return (self.due, self.serial)

    @property
    def is_flexible(self) -> bool:
        return len(self.ladder) > 1


@dataclass(frozen=True)
class Batch:
    """Entries that run as one variant. Units: seconds."""

    variant: ServedVariant
    entries: Sequence[Entry]
    started_at: float
