"""Entry: one image in the queue. Batch: entries that run together."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from app.backends import Pixels
from app.errors import ServiceError
from app.observability.record import ImageResult
from app.store.catalogue import ServedVariant

# The preferred variant first, then by falling cost.
Ladder = tuple[ServedVariant, ...]
# Model, version and policy: the variants of a family share a rate floor.
Family = tuple[str, str, str]
Outcome = ImageResult | ServiceError
Outcomes = Sequence[tuple["Entry", Outcome]]
# Called in the event loop with the outcomes of some entries of one request.
Reply = Callable[[Outcomes], None]
_serial = itertools.count()


@dataclass(eq=False, slots=True)
class Entry:
    """Units: seconds of the engine's clock.

    ladder: the variants that it may run as; a single one unless the request opted in to higher rates.
    due: the deadline, or else the end of the target latency. Entries run in this order.
    reply: None once the request is answered or cancelled.

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
    decode_wait_seconds: float = 0.0
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
