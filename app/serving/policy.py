"""Policy: what runs next, at which rate, and who is let in. Pure functions of what waits, what runs cost, and the time.

Entries run by due time, earliest first: no order meets more deadlines on one device, and since the due time of an entry
never changes, none starves. The rate is chosen when the device is free, by the slack that is left (SuperServe, arXiv
2312.16733): each family of rates has a floor, the least at which all that waits would begin within half of its slack.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from app.catalogue import ServedVariant
from app.serving.entry import Entry, Family, Ladder

Costs = Callable[[ServedVariant, int], float]  # seconds of a run of n images
Choice = Callable[[Entry], ServedVariant]  # the same for entries with the same ladder

PLANNED_SHARE = 0.5  # of the slack; the rest is for what has yet to come, and for estimates that are wrong
LOWERING_SHARE = 0.35  # a lower floor must look this good before it is taken: hysteresis in load …
HOLD_SECONDS = 0.1  # … for this long: hysteresis in time
REFUSED_SECONDS = 0.5  # for so long after a refusal the rate goes up, and never down
CAUTION = 1.15  # a run is planned to take so much longer than expected where that would cost somebody the deadline
WORTH_SPLITTING = 1.1  # a smaller batch must be this much cheaper per image: estimates are no better


@dataclass(frozen=True)
class Level:
    """The least rate at which entries of a family that consent run now. Units: seconds."""

    floor: int = 0
    lower_since: float | None = None


def rate(variant: ServedVariant) -> int:
    return variant.entry.r or 0


def at_floor(entry: Entry, floor: int) -> ServedVariant:
    """Return the first variant of the ladder that reaches a floor, or else the last."""
    return next((variant for variant in entry.ladder if rate(variant) >= floor), entry.ladder[-1])


def cheapest(entry: Entry) -> ServedVariant:
    return entry.ladder[-1]


def least_seconds(entry: Entry, costs: Costs) -> float:
    return min(costs(variant, 1) for variant in entry.ladder)


def is_hopeless(entry: Entry, now: float, costs: Costs) -> bool:
    """Tell whether the deadline would be missed even if this ran now, alone, at its least cost."""
    return entry.deadline is not None and now + least_seconds(entry, costs) > entry.deadline


def finish_times(
    waiting: Iterable[Entry], choice: Choice, start: float, costs: Costs, max_batch: int
) -> Iterator[tuple[Entry, ServedVariant, float]]:
    """Foresee as what each entry would run and when it would be done, in their order, each at its share of the batches
    that there are.
    """
    known: dict[Ladder, ServedVariant] = {}  # ladders are few
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
    """Tell whether every entry would begin within a share of the time that it can spare: due time less its own run.

    start: when the device is free.
    """
    begins_at = start
    for entry, variant, ends_at in finish_times(waiting, choice, start, costs, max_batch):
        latest = entry.due - costs(variant, 1)
        if latest < now or begins_at - now > slack_share * (latest - now):
            return False
        begins_at = ends_at
    return True


def choice_at(family: Family, floor: int, floors: Mapping[Family, int]) -> Choice:
    """Return what entries would run as if a family had another floor."""
    return lambda entry: at_floor(entry, floor if entry.family == family else floors.get(entry.family, 0))


def next_level(level: Level, needed: int, below: int, is_comfortable: bool, now: float) -> Level:
    """Raise the floor at once to what is needed; lower it one rate at a time, after that was comfortable for a while.

    below: the next lower rate than the present floor. is_comfortable: whether all would be well at that.
    """
    if needed > level.floor:
        return Level(needed)
    if not is_comfortable or below == level.floor:
        return Level(level.floor)
    since = now if level.lower_since is None else level.lower_since
    return Level(below) if now - since >= HOLD_SECONDS else Level(level.floor, since)


def runnable(entry: Entry, floor: int, now: float, costs: Costs) -> ServedVariant:
    """Return what an entry runs as now: by the floor, or cheaper where its own deadline leaves no time for that."""
    chosen = at_floor(entry, floor)
    if entry.deadline is None or now + costs(chosen, 1) <= entry.deadline:
        return chosen
    later = entry.ladder[entry.ladder.index(chosen) :]
    return next((variant for variant in later if now + costs(variant, 1) <= entry.deadline), cheapest(entry))


def batch_size(
    members: Sequence[Entry], others: Iterable[Entry], variant: ServedVariant, now: float, costs: Costs
) -> int:
    """Choose how many of the members run: the largest batch that gives about the most images a second, and that neither
    a member's deadline forbids, nor one of another entry that could still be met after a run of one image.
    """
    latest = [entry.deadline for entry in members if entry.deadline is not None]
    latest += [entry.deadline - least_seconds(entry, costs) for entry in others if entry.deadline is not None]
    alone = now + costs(variant, 1)
    end = min((time for time in latest if time >= alone), default=None)
    sizes = [n for n in range(1, len(members) + 1) if end is None or n == 1 or now + costs(variant, n) <= end]
    best = min(costs(variant, n) / n for n in sizes)
    return max(n for n in sizes if costs(variant, n) / n <= WORTH_SPLITTING * best)


def lateness(
    waiting: Sequence[Entry], new: Collection[Entry], start: float, costs: Costs, max_batch: int, n_lanes: int
) -> float:
    """Foresee by how much new entries would miss their deadlines, or push others past theirs; 0 if they would not.

    An entry ends when its batch does, and that shares the device with one in each other lane. One that is let in with
    no time to spare would have to run alone when its turn comes: a full queue of them, at the price of single images.

    Units: seconds.
    """
    if all(entry.deadline is None for entry in (*waiting, *new)):
        return 0.0
    ordered = sorted([*waiting, *new], key=lambda entry: entry.order)
    counts = Counter(cheapest(entry) for entry in ordered)
    sizes = {variant: min(n, max_batch) for variant, n in counts.items()}
    rest = {variant: n_lanes * costs(variant, size) * (1 - 1 / size) for variant, size in sizes.items()}
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
