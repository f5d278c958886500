"""Planning: what runs next, at which rate, and which requests are admitted. Pure functions of queue, costs and time.

Entries run in the order of their due times (earliest deadline first). Due times never change, so no entry starves.
Rates are chosen at dequeue, by the remaining slack (SuperServe, arXiv 2312.16733): each family has a rate floor, the
lowest rate at which every queued entry would start within half of its slack.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from app.serving.entry import Entry, Family, Ladder
from app.store.catalogue import ServedVariant

# Run time of a batch of n images. Units: seconds.
Costs = Callable[[ServedVariant, int], float]
# Returns the same variant for entries with the same ladder.
Choice = Callable[[Entry], ServedVariant]

# Share of the slack that a plan may use. The rest is for later requests and estimation errors.
PLANNED_SHARE = 0.5
# Hysteresis: a floor is lowered only if entries would stay within this share of their slack for this long.
LOWERING_SHARE = 0.35
HOLD_SECONDS = 0.1
# After a refusal the floor may rise but not fall for this long.
REFUSED_SECONDS = 0.5
# Safety factor on estimates where a deadline is at stake.
SAFETY_FACTOR = 1.15
# A smaller batch must be this much cheaper per image: estimates are no more accurate.
MIN_SPLIT_GAIN = 1.1


@dataclass(frozen=True)
class RateFloor:
    """The minimum rate of a family's entries that opted in. Units: seconds.

    lower_since: since when a lower rate would suffice; None if it would not.
    """

    r: int = 0
    lower_since: float | None = None


def rate(variant: ServedVariant) -> int:
    return variant.spec.r or 0


def at_floor(entry: Entry, floor: int) -> ServedVariant:
    """Return the first variant of the ladder at or above the floor, or else the last."""
    return next((variant for variant in entry.ladder if rate(variant) >= floor), entry.ladder[-1])


def cheapest(entry: Entry) -> ServedVariant:
    return entry.ladder[-1]


def min_seconds(entry: Entry, costs: Costs) -> float:
    return min(costs(variant, 1) for variant in entry.ladder)


def is_expired(entry: Entry, now: float, costs: Costs) -> bool:
    """Return whether even the cheapest variant, run alone and now, would miss the deadline."""
    return entry.deadline is not None and now + min_seconds(entry, costs) > entry.deadline


def finish_times(
    waiting: Iterable[Entry], choice: Choice, start: float, costs: Costs, max_batch: int
) -> Iterator[tuple[Entry, ServedVariant, float]]:
    """Predict the variant and the end of each entry, in queue order.

    An entry costs its share of the largest batch that the queue allows.
    """
    # Entries share a few ladders; resolve each once.
    known: dict[Ladder, ServedVariant] = {}
    chosen = [(entry, known.get(entry.ladder) or known.setdefault(entry.ladder, choice(entry))) for entry in waiting]
    sizes = Counter(variant for _, variant in chosen)
    share = {variant: costs(variant, min(n, max_batch)) / min(n, max_batch) for variant, n in sizes.items()}
    for entry, variant in chosen:
        start += share[variant]
        yield entry, variant, start


def keeps_slack(
    waiting: Sequence[Entry],
    choice: Choice,
    now: float,
    start: float,
    costs: Costs,
    max_batch: int,
    slack_share: float,
) -> bool:
    """Return whether every entry would start within a share of its slack: the time to its due time, less its run time.

    start: when the device becomes free.
    """
    begins_at = start
    for entry, variant, ends_at in finish_times(waiting, choice, start, costs, max_batch):
        latest = entry.due - costs(variant, 1)
        if latest < now or begins_at - now > slack_share * (latest - now):
            return False
        begins_at = ends_at
    return True


def choice_at(family: Family, floor: int, floors: Mapping[Family, int]) -> Choice:
    """Return the variant of each entry if a family had another floor."""
    return lambda entry: at_floor(entry, floor if entry.family == family else floors.get(entry.family, 0))


def next_floor(current: RateFloor, needed: int, below: int, is_comfortable: bool, now: float) -> RateFloor:
    """Raise the floor at once; lower it by one rate after HOLD_SECONDS of low load.

    below: the next rate below the current floor. is_comfortable: whether the queue would keep its slack at it.
    """
    if needed > current.r:
        return RateFloor(needed)
    if not is_comfortable or below == current.r:
        return RateFloor(current.r)
    since = now if current.lower_since is None else current.lower_since
    return RateFloor(below) if now - since >= HOLD_SECONDS else RateFloor(current.r, since)


def runnable(entry: Entry, floor: int, now: float, costs: Costs) -> ServedVariant:
    """Return the variant that an entry runs as now: at the floor, or cheaper if its deadline requires it."""
    chosen = at_floor(entry, floor)
    if entry.deadline is None or now + costs(chosen, 1) <= entry.deadline:
        return chosen
    later = entry.ladder[entry.ladder.index(chosen) :]
    return next((variant for variant in later if now + costs(variant, 1) <= entry.deadline), cheapest(entry))


def next_batch(
    waiting: Sequence[Entry], floors: Mapping[Family, int], now: float, costs: Costs, max_batch: int
) -> tuple[ServedVariant, list[Entry]]:
    """Choose the batch of the most urgent entry: entries of the same variant, in order of urgency."""
    chosen = {entry: runnable(entry, floors.get(entry.family, 0), now, costs) for entry in waiting}
    variant = chosen[waiting[0]]
    members = [entry for entry in waiting if chosen[entry] is variant][:max_batch]
    n = batch_size(members, set(waiting).difference(members), variant, now, costs)
    return variant, members[:n]


def batch_size(
    members: Sequence[Entry], others: Iterable[Entry], variant: ServedVariant, now: float, costs: Costs
) -> int:
    """Choose the number of members that run together.

    The largest batch of near-maximum throughput that makes no member late, and no other entry that could still be in
    time after a single-image run.
    """
    latest = [entry.deadline for entry in members if entry.deadline is not None]
    latest += [entry.deadline - min_seconds(entry, costs) for entry in others if entry.deadline is not None]
    alone = now + costs(variant, 1)
    end = min((time for time in latest if time >= alone), default=None)
    sizes = [n for n in range(1, len(members) + 1) if end is None or n == 1 or now + costs(variant, n) <= end]
    best = min(costs(variant, n) / n for n in sizes)
    return max(n for n in sizes if costs(variant, n) / n <= MIN_SPLIT_GAIN * best)


def wait_for_more(
    waiting: Sequence[Entry],
    members: Sequence[Entry],
    variant: ServedVariant,
    now: float,
    costs: Costs,
    max_batch: int,
    max_delay_seconds: float,
) -> float | None:
    """Return until when an incomplete batch waits for more entries; None to run it now.

    It does not wait if a queued entry could miss its deadline.
    """
    wake_at = min(entry.submitted_at for entry in members) + max_delay_seconds
    deadlines = [entry.deadline for entry in waiting if entry.deadline is not None]
    is_urgent = bool(deadlines) and wake_at + costs(variant, max_batch) > min(deadlines)
    return None if len(members) == max_batch or wake_at <= now or is_urgent else wake_at


def lateness(
    waiting: Sequence[Entry],
    new: Collection[Entry],
    start: float,
    costs: Costs,
    max_batch: int,
    max_concurrent_batches: int,
) -> float:
    """Predict by how much new entries would miss their deadlines, or make others miss theirs; 0 if neither.

    An entry ends with its batch, which shares the device with concurrent batches. Assume full batches: an entry without
    the slack for one would have to run alone, and a queue of such entries would cost as much as single images.

    Units: seconds.
    """
    if all(entry.deadline is None for entry in (*waiting, *new)):
        return 0.0
    ordered = sorted([*waiting, *new], key=lambda entry: entry.order)
    counts = Counter(cheapest(entry) for entry in ordered)
    sizes = {variant: min(n, max_batch) for variant, n in counts.items()}
    rest = {variant: max_concurrent_batches * costs(variant, size) * (1 - 1 / size) for variant, size in sizes.items()}
    newcomers, previous, added, worst = set(new), start, 0.0, 0.0
    for entry, variant, time in finish_times(ordered, cheapest, start, costs, max_batch):
        is_new = entry in newcomers
        if is_new:
            added += time - previous
        previous = time
        if entry.deadline is None:
            continue
        if is_new:
            worst = max(worst, time + rest[variant] - entry.deadline)
        elif time - added <= entry.deadline:
            worst = max(worst, time - entry.deadline)
    return worst
