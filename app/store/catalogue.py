"""Catalogue: the models that are loaded, verified and warm."""

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from app.backends import Runner
from app.errors import UnknownModel, UnknownVersion, echo
from app.store.costs import CostTable
from app.store.manifest import Manifest, Variant, VariantKey
from app.store.scan import Signature, Version

N_LATENCIES = 100
# Model, policy and rate: the labels of a variant in metrics.
Labels = tuple[str, str, str]


class LatencyLog:
    """The last N_LATENCIES run times of single images on this host."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=N_LATENCIES)

    def add(self, seconds: float) -> None:
        self._seconds.append(seconds)

    def summary_ms(self) -> tuple[float, float, int] | None:
        """Return last, median and count; None before the first run. Units: ms."""
        seconds = list(self._seconds)
        return (seconds[-1] * 1e3, statistics.median(seconds) * 1e3, len(seconds)) if seconds else None


@dataclass(frozen=True, eq=False)
class ServedVariant:
    """A loaded graph and its run times on this host.

    unmerged_gmacs: cost of an image without merging. Units: GMACs.
    """

    spec: Variant
    runner: Runner
    latency: LatencyLog = field(default_factory=LatencyLog)
    costs: CostTable = field(default_factory=CostTable)
    unmerged_gmacs: float = 0.0

    @cached_property
    def accuracy(self) -> dict[str, Any] | None:
        """The measured accuracy as JSON; None if it was not measured."""
        return None if self.spec.accuracy is None else self.spec.accuracy.model_dump(mode="json")

    @property
    def rate_label(self) -> str:
        """The rate as text; empty for an adaptive policy."""
        return "" if self.spec.r is None else str(self.spec.r)


@dataclass(frozen=True)
class ServedModel:
    manifest: Manifest
    variants: Mapping[VariantKey, ServedVariant]

    @property
    def policies(self) -> list[str]:
        return sorted({key.policy for key in self.variants})

    def rates(self, policy: str) -> list[int]:
        """List the rates of a policy; empty for an adaptive policy."""
        return sorted(key.r for key in self.variants if key.policy == policy and key.r is not None)

    def variant(self, policy: str, r: int | None) -> ServedVariant:
        """Return the variant of a policy and rate, in the one precision that this process serves."""
        return self._by_rate[policy, r]

    @cached_property
    def _by_rate(self) -> dict[tuple[str, int | None], ServedVariant]:
        return {(key.policy, key.r): variant for key, variant in self.variants.items()}


@dataclass(frozen=True)
class Refusal:
    """A version in the store that is not served.

    retry_at: by the monotonic clock, if the reason can pass. is_too_large: nothing is known against it but its size.
    It holds no exception, whose traceback would keep the graphs that were loaded before the failure.
    """

    signature: Signature
    file: str
    reason: str
    retry_at: float | None = None
    is_too_large: bool = False

    @property
    def summary(self) -> str:
        """The file and the reason. Clients do not learn where the store is: the log has the whole path."""
        return f"{Path(self.file).name}: {self.reason}"


@dataclass(frozen=True)
class Catalogue:
    """What is served, and what in the store is not.

    models: by name, then by version.
    refused: bad versions. ignored: folders that are no finished version, with the reason.
    """

    models: Mapping[str, Mapping[int, ServedModel]]
    default_model: str
    refused: Mapping[Version, Refusal] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)

    def find(self, name: str | None, version: str | None) -> ServedModel:
        """Return a model: the default one without a name, the highest version without a version.

        Raises: UnknownModel, UnknownVersion.
        """
        name = self.default_model if name is None else name
        if name not in self.models:
            accepted = sorted(self.models)
            raise UnknownModel(f"There is no model {echo(name)!r}.", field="model", value=echo(name), accepted=accepted)
        versions = {str(number): model for number, model in self.models[name].items()}
        if version is None:
            return self.models[name][max(self.models[name])]
        if version not in versions:
            detail = f"The model {name!r} has no version {echo(version)!r}."
            raise UnknownVersion(detail, field="version", value=echo(version), accepted=list(versions))
        return versions[version]

    def all_models(self) -> list[ServedModel]:
        return [self.models[name][version] for name in sorted(self.models) for version in sorted(self.models[name])]

    def count_refused(self) -> dict[str, int]:
        """Count the refused versions of each model, also of models without any."""
        names = [name for name, _ in self.refused]
        return {name: names.count(name) for name in {*self.models, *names}}
