"""Selection: from query parameters to the variants that may serve a request. Pure functions."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, Field, WithJsonSchema

from app.errors import (
    BudgetNotMet,
    ConflictingParameters,
    InvalidParameter,
    RateNotExported,
    UnknownPolicy,
    echo,
)
from app.store.catalogue import Catalogue, ServedModel, ServedVariant

WHOLE_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
# Every float that JSON documents contain is accepted: 20 decimals are the most that Python writes.
NUMBER = re.compile(r"[0-9]{1,12}(\.[0-9]{0,20})?([eE][+-]?[0-9]{1,2})?|\.[0-9]{1,20}")
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
SELECTORS = ("r", "max_gmacs", "min_accuracy", "deadline_ms")
DEFAULT_TOP_K = 5
MAX_DEADLINE_MS = 3_600_000


Text = Annotated[str | None, WithJsonSchema({"type": "string"})]
WholeNumber = Annotated[str | None, WithJsonSchema({"type": "integer", "minimum": 0})]
Gmacs = Annotated[str | None, WithJsonSchema({"type": "number", "exclusiveMinimum": 0})]
Fraction = Annotated[str | None, WithJsonSchema({"type": "number", "minimum": 0, "maximum": 1})]
Milliseconds = Annotated[
    str | None, WithJsonSchema({"type": "number", "exclusiveMinimum": 0, "maximum": MAX_DEADLINE_MS})
]
Boolean = Annotated[str | None, WithJsonSchema({"type": "boolean"})]


class Query(BaseModel):
    """The query parameters as sent; None if absent."""

    model: Text = Field(default=None, description="model; default: see `/models`")
    version: Text = Field(default=None, description="model version; default: the highest")
    policy: Text = Field(default=None, description="merging policy; default: the model's")
    r: WholeNumber = Field(
        default=None,
        description="reduction rate; adaptive policies have none. "
        f"At most one of {', '.join(f'`{name}`' for name in SELECTORS)}; without them, the model's default rate, "
        "or else the policy's lowest",
    )
    max_gmacs: Gmacs = Field(
        default=None,
        description="select the most accurate variant within this cost, in GMACs; the cost of an adaptive policy is "
        "its 95th percentile",
    )
    min_accuracy: Fraction = Field(
        default=None, description="select the cheapest variant with at least this measured accuracy, from 0 to 1"
    )
    deadline_ms: Milliseconds = Field(
        default=None,
        description="select the most accurate variant expected to answer in time at the current load; counted from "
        "the request's headers",
    )
    allow_degrade: Boolean = Field(
        default=None,
        description="opt in to a higher rate under load, instead of waiting or being refused; implied by `deadline_ms`",
    )
    max_r: WholeNumber = Field(
        default=None, description="opt in to rates up to this one under load; also bounds `deadline_ms`"
    )
    top_k: WholeNumber = Field(
        default=None, description=f"number of classes; default: {DEFAULT_TOP_K}, or all if fewer"
    )


@dataclass(frozen=True)
class Selection:
    """ladder: the variants that may run, the preferred one first, then by falling cost. Units: seconds."""

    model: ServedModel
    policy: str
    ladder: tuple[ServedVariant, ...]
    top_k: int
    deadline_seconds: float | None = None

    @property
    def variant(self) -> ServedVariant:
        """The preferred variant."""
        return self.ladder[0]


def select(catalogue: Catalogue, query: Query) -> Selection:
    """Select a model and the variants that may run.

    Raises: UnknownModel, UnknownVersion, UnknownPolicy, RateNotExported, BudgetNotMet, ConflictingParameters,
    InvalidParameter.
    """
    model = catalogue.find(query.model, query.version)
    policy = choose_policy(model, query.policy)
    require_one_selector(query)
    deadline_ms = read_deadline(query.deadline_ms)
    top_k = choose_top_k(model, query.top_k)
    if deadline_ms is None:
        return Selection(model, policy, choose_ladder(model, policy, query), top_k)
    return Selection(model, policy, choose_deadline_ladder(by_cost(model, policy), query), top_k, deadline_ms / 1e3)


def require_one_selector(query: Query) -> None:
    given = [name for name in SELECTORS if getattr(query, name) is not None]
    if len(given) > 1:
        detail = f"{' and '.join(given)} are mutually exclusive; accepted: at most one of {', '.join(SELECTORS)}."
        raise ConflictingParameters(detail, fields=given, accepted=list(SELECTORS))


def by_cost(model: ServedModel, policy: str) -> list[ServedVariant]:
    """List the variants of a policy, the most expensive first."""
    variants = [variant for key, variant in model.variants.items() if key.policy == policy]
    return sorted(variants, key=lambda variant: -variant.spec.gmacs)


def choose_policy(model: ServedModel, policy: str | None) -> str:
    if policy is None:
        return model.manifest.default.policy
    if policy not in model.policies:
        detail = f"The model {model.manifest.name!r} has no policy {echo(policy)!r}."
        raise UnknownPolicy(detail, field="policy", value=echo(policy), accepted=model.policies)
    return policy


def choose_ladder(model: ServedModel, policy: str, query: Query) -> tuple[ServedVariant, ...]:
    """Return the selected variant and, if the request opted in, those of higher rates."""
    chosen = choose_variant(model, policy, query)
    max_r = choose_max_r(policy, chosen, query)
    higher = [r for r in model.rates(policy) if chosen.spec.r is not None and chosen.spec.r < r <= max_r]
    return (chosen, *(model.variant(policy, r) for r in higher))


def choose_variant(model: ServedModel, policy: str, query: Query) -> ServedVariant:
    if query.max_gmacs is not None:
        return most_accurate_within(by_cost(model, policy), read_gmacs(query.max_gmacs))
    if query.min_accuracy is not None:
        return cheapest_as_accurate_as(by_cost(model, policy), read_fraction(query.min_accuracy))
    return model.variant(policy, choose_rate(model, policy, query.r))


def choose_max_r(policy: str, chosen: ServedVariant, query: Query) -> float:
    """Return the highest rate that the request opted in to; -1 if it did not opt in."""
    allowed = read_boolean("allow_degrade", query.allow_degrade)
    if query.max_r is None:
        return math.inf if allowed else -1
    max_r = read_max_r(query.max_r)
    if allowed is False:
        detail = "max_r opts in to higher rates, but allow_degrade=false opts out."
        raise ConflictingParameters(detail, fields=["max_r", "allow_degrade"])
    if chosen.spec.r is None:
        detail = f"max_r={max_r} is not accepted: policy {policy!r} is adaptive and has no rates."
        raise InvalidParameter(detail, field="max_r", value=max_r, policy=policy, accepted=[])
    if max_r < chosen.spec.r:
        detail = f"max_r={max_r} is below the selected rate, r={chosen.spec.r}."
        raise InvalidParameter(detail, field="max_r", value=max_r, minimum=chosen.spec.r)
    return max_r


def choose_deadline_ladder(candidates: Sequence[ServedVariant], query: Query) -> tuple[ServedVariant, ...]:
    """Return the Pareto front: variants that are more accurate than every cheaper one."""
    # Validated but ignored: a deadline implies it.
    read_boolean("allow_degrade", query.allow_degrade)
    if query.max_r is not None:
        candidates = within_max_r(candidates, read_max_r(query.max_r))
    front: list[ServedVariant] = []
    for variant in reversed(candidates):
        if not front or accuracy_rank(variant) > accuracy_rank(front[-1]):
            front.append(variant)
    return tuple(reversed(front))


def within_max_r(candidates: Sequence[ServedVariant], max_r: int) -> Sequence[ServedVariant]:
    rates = sorted(variant.spec.r for variant in candidates if variant.spec.r is not None)
    within = [variant for variant in candidates if variant.spec.r is not None and variant.spec.r <= max_r]
    if not within:
        detail = f"Policy {candidates[0].spec.policy!r} has no rate up to max_r={max_r}."
        raise InvalidParameter(detail, field="max_r", value=max_r, accepted=rates)
    return within


def accuracy_rank(variant: ServedVariant) -> tuple[float, float]:
    """Rank by measured accuracy. Unmeasured variants rank below all measured ones, by GMACs."""
    accuracy = variant.spec.accuracy
    return (-1.0, variant.spec.gmacs) if accuracy is None else (accuracy.value, 0.0)


def most_accurate_within(candidates: Sequence[ServedVariant], max_gmacs: float) -> ServedVariant:
    """Return the most accurate variant within the cost; among equals, the cheapest."""
    within = [variant for variant in candidates if reliable_gmacs(variant) <= max_gmacs]
    if not within:
        cheapest = min(candidates, key=reliable_gmacs)
        detail = f"No variant of policy {cheapest.spec.policy!r} costs at most {max_gmacs} GMACs."
        raise BudgetNotMet(detail, **_refused("max_gmacs", max_gmacs, cheapest), minimum=reliable_gmacs(cheapest))
    return max(reversed(within), key=accuracy_rank)


def cheapest_as_accurate_as(candidates: Sequence[ServedVariant], min_accuracy: float) -> ServedVariant:
    measured = [variant for variant in candidates if variant.spec.accuracy is not None]
    good = [variant for variant in measured if accuracy_rank(variant)[0] >= min_accuracy]
    if not good:
        best = max(candidates, key=accuracy_rank)
        accuracy = best.spec.accuracy
        measure, maximum = ("accuracy", None) if accuracy is None else (accuracy.measure, accuracy.value)
        detail = f"No variant of policy {best.spec.policy!r} has a measured {measure} of at least {min_accuracy}."
        raise BudgetNotMet(detail, **_refused("min_accuracy", min_accuracy, best), maximum=maximum)
    return good[-1]


def reliable_gmacs(variant: ServedVariant) -> float:
    """Return the cost of an image; for adaptive policies, the 95th percentile."""
    spread = variant.spec.gmacs_spread
    return variant.spec.gmacs if spread is None else spread.p95


def _refused(field: str, value: float, nearest: ServedVariant) -> dict[str, Any]:
    spec = nearest.spec
    return {"field": field, "value": value, "policy": spec.policy, "nearest": {"id": spec.id, "r": spec.r}}


def choose_rate(model: ServedModel, policy: str, r: str | None) -> int | None:
    """Return the requested rate; by default the model's default rate, or the policy's lowest if it lacks that.

    None for adaptive policies.
    """
    rates = model.rates(policy)
    if r is None and not rates:
        return None
    if r is not None and not rates:
        detail = f"r={echo(r)} is not accepted: policy {policy!r} is adaptive and has no rates."
        raise InvalidParameter(detail, field="r", value=echo(r), policy=policy, accepted=[])
    if r is None:
        return model.manifest.default.r if model.manifest.default.r in rates else rates[0]
    if not WHOLE_NUMBER.fullmatch(r):
        raise InvalidParameter(f"r={echo(r)} is not a whole number.", field="r", value=echo(r), accepted=rates)
    if int(r) not in rates:
        detail = f"Policy {policy!r} has no graph for r={r}; accepted: {', '.join(map(str, rates))}."
        raise RateNotExported(detail, field="r", value=int(r), policy=policy, accepted=rates)
    return int(r)


def choose_top_k(model: ServedModel, top_k: str | None) -> int:
    n_classes = len(model.manifest.labels)
    if top_k is None:
        return min(DEFAULT_TOP_K, n_classes)
    if not WHOLE_NUMBER.fullmatch(top_k) or not 1 <= int(top_k) <= n_classes:
        detail = f"top_k={echo(top_k)} is not a whole number from 1 to {n_classes}."
        raise InvalidParameter(detail, field="top_k", value=echo(top_k), minimum=1, maximum=n_classes)
    return int(top_k)


def read_max_r(text: str) -> int:
    if not WHOLE_NUMBER.fullmatch(text):
        raise InvalidParameter(f"max_r={echo(text)} is not a whole number.", field="max_r", value=echo(text))
    return int(text)


def read_gmacs(text: str) -> float:
    return _read_number("max_gmacs", text, lambda value: value > 0, "a number above 0, in GMACs")


def read_fraction(text: str) -> float:
    return _read_number("min_accuracy", text, lambda value: value <= 1, "a number from 0 to 1")


def read_deadline(text: str | None) -> float | None:
    """Units: ms."""
    if text is None:
        return None
    wanted = f"a number of milliseconds above 0 and up to {MAX_DEADLINE_MS}"
    return _read_number("deadline_ms", text, lambda value: 0 < value <= MAX_DEADLINE_MS, wanted)


def _read_number(field: str, text: str, accepts: Callable[[float], bool], wanted: str) -> float:
    value = float(text) if NUMBER.fullmatch(text) else math.nan
    if not accepts(value):
        raise InvalidParameter(f"{field}={echo(text)} is not {wanted}.", field=field, value=echo(text), accepted=wanted)
    return value


def read_boolean(field: str, text: str | None) -> bool | None:
    if text is not None and text.lower() not in BOOLEANS:
        detail = f"{field}={echo(text)} is neither true nor false."
        raise InvalidParameter(detail, field=field, value=echo(text), accepted=["true", "false"])
    return None if text is None else BOOLEANS[text.lower()]
