"""Selection: the query's words become one variant of one model. Pure functions."""

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, Field, WithJsonSchema

from app.catalogue import Catalogue, ServedModel, ServedVariant
from app.errors import InvalidParameter, RateNotExported, UnknownPolicy, echo

WHOLE_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
DEFAULT_TOP_K = 5


WrittenNumber = Annotated[str | None, WithJsonSchema({"type": "integer", "minimum": 0})]


class Query(BaseModel):
    """What a request asks for, in its own words; None where it says nothing."""

    model: str | None = Field(default=None, description="which model; default: see `/models`")
    version: str | None = Field(default=None, description="which version of it; default: the highest")
    policy: str | None = Field(default=None, description="how tokens are merged; default: the model's")
    r: WrittenNumber = Field(
        default=None,
        description="exactly this reduction rate; default: the model's, or the policy's least; "
        "a policy that adapts to the image has none",
    )
    top_k: WrittenNumber = Field(
        default=None, description=f"how many classes; default: {DEFAULT_TOP_K}, or all if they are fewer"
    )


@dataclass(frozen=True)
class Selection:
    model: ServedModel
    variant: ServedVariant
    top_k: int


def select(catalogue: Catalogue, query: Query) -> Selection:
    """Find what the query asks for, exactly.

    Raises: UnknownModel, UnknownVersion, UnknownPolicy, RateNotExported, InvalidParameter.
    """
    model = catalogue.find(query.model, query.version)
    policy = choose_policy(model, query.policy)
    return Selection(
        model, model.variants[policy, choose_rate(model, policy, query.r)], choose_top_k(model, query.top_k)
    )


def choose_policy(model: ServedModel, policy: str | None) -> str:
    if policy is None:
        return model.manifest.default.policy
    if policy not in model.policies:
        detail = f"The model {model.manifest.name!r} has no policy {echo(policy)!r}."
        raise UnknownPolicy(detail, field="policy", value=echo(policy), accepted=model.policies)
    return policy


def choose_rate(model: ServedModel, policy: str, r: str | None) -> int | None:
    """Return the rate asked for; without one the model's default rate, or where the policy lacks it, its least.

    None where the policy adapts to the image; then no rate can be asked for.
    """
    rates = model.rates(policy)
    if r is None and not rates:
        return None
    if r is not None and not rates:
        detail = f"r={echo(r)} cannot be asked for: policy {policy!r} has no rates, it adapts to each image."
        raise InvalidParameter(detail, field="r", value=echo(r), policy=policy, accepted=[])
    if r is None:
        return model.manifest.default.r if model.manifest.default.r in rates else rates[0]
    if not WHOLE_NUMBER.fullmatch(r):
        raise InvalidParameter(f"r={echo(r)} is not a whole number.", field="r", value=echo(r), accepted=rates)
    if int(r) not in rates:
        detail = f"There is no graph with r={r} for policy {policy!r}, only with r in {rates}."
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
