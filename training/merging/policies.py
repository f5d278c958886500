"""Merging policies: the table that evaluation, export, calibration and plots read.

To add a policy, add an entry to `POLICIES`. Its metric is a name in `METRICS` or any `Metric`
function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from training.merging.metrics import Metric

ScheduleKind: TypeAlias = Literal["unmerged", "constant", "thresholds"]
"""unmerged: never merges. constant: equal r in each block. thresholds: r depends on the image."""

EMBEDDING = "embedding"
"""The metric that is learned: a decoupled embedding, given with the model."""


@dataclass(frozen=True)
class Policy:
    """One series of an evaluation.

    metric: a name in `METRICS`, "embedding", or a `Metric`. colour: in plots. label: in tables and
        plots, the name by default. is_baseline: a lower bound; it is evaluated on request, never
        exported, and may leave the plotted range.
    """

    name: str
    schedule: ScheduleKind
    metric: str | Metric
    colour: str
    label: str = ""
    is_baseline: bool = False

    def __post_init__(self) -> None:
        if not self.label:
            object.__setattr__(self, "label", self.name)

    @property
    def needs_embedding(self) -> bool:
        return self.metric == EMBEDDING

    @property
    def is_adaptive(self) -> bool:
        """Whether the number of tokens depends on the image."""
        return self.schedule == "thresholds"

    def resolve_metric(self, embedding: Metric | None) -> str | Metric:
        """Return the metric, the embedding where the policy merges by it.

        Raises: ValueError where it is missing.
        """
        if not self.needs_embedding:
            return self.metric
        if embedding is None:
            raise ValueError(
                f"policy {self.name} needs an embedding: pass --embedding, or a --run or --published that has one"
            )
        return embedding


POLICIES = (
    Policy("none", "unmerged", metric="keys", colour="black"),
    Policy("tome", "constant", metric="keys", colour="tab:blue"),
    Policy("dtem", "constant", metric=EMBEDDING, colour="tab:red"),
    Policy("random", "constant", metric="random", colour="tab:gray", is_baseline=True),
    Policy("atm", "thresholds", metric="features", colour="tab:green", label="atm (features)"),
    Policy("atm", "thresholds", metric="keys", colour="tab:cyan", label="atm (keys)"),
    Policy("adaptive-dtem", "thresholds", metric=EMBEDDING, colour="tab:orange"),
)
"""All policies, in the order of tables and plots."""

UNMERGED = POLICIES[0]
DEFAULT_POLICIES = ("dtem", "tome")
"""The default policy of an export: the first of these that the model supports."""

FIXED_POLICIES = {policy.name: policy for policy in POLICIES if not policy.is_adaptive}
ADAPTIVE_METRICS = tuple(str(policy.metric) for policy in POLICIES if policy.is_adaptive)


def find_policy(name: str, metric: str | None = None) -> Policy:
    """Return the policy of that name, and of that metric if it is adaptive.

    Raises: ValueError where there is none.
    """
    for policy in POLICIES:
        if policy.name == name and (not policy.is_adaptive or policy.metric == metric):
            return policy
    known = ", ".join(dict.fromkeys(policy.name for policy in POLICIES))
    raise ValueError(f"policy {name!r} with metric {metric!r}: expected one of {known}")


def adaptive_policy(metric: str) -> Policy:
    """Return the policy that merges by thresholds on this metric.

    Raises: ValueError where there is none.
    """
    for policy in POLICIES:
        if policy.is_adaptive and policy.metric == metric:
            return policy
    raise ValueError(f"metric {metric!r}: expected one of {', '.join(ADAPTIVE_METRICS)}")


def supported_policies(*, has_embedding: bool) -> list[Policy]:
    """Return the fixed policies of default evaluations and exports, unmerged first."""
    return [
        policy
        for policy in FIXED_POLICIES.values()
        if not policy.is_baseline and (has_embedding or not policy.needs_embedding)
    ]


def default_policy(*, has_embedding: bool) -> str:
    """Return the default policy of an export."""
    supported = {policy.name for policy in supported_policies(has_embedding=has_embedding)}
    return next(name for name in DEFAULT_POLICIES if name in supported)


def check_policies(names: Sequence[str], embedding: Metric | None) -> None:
    """Raises: ValueError for an empty list, an unknown or repeated policy, or a missing embedding."""
    if not names or set(names) - FIXED_POLICIES.keys() or len(set(names)) < len(names):
        raise ValueError(f"policies {list(names)}: expected some of {', '.join(FIXED_POLICIES)}, each once")
    for name in names:
        FIXED_POLICIES[name].resolve_metric(embedding)
