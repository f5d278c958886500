"""Catalogue: the models that are loaded, verified and warm."""

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from app.backends import Runner
from app.errors import UnknownModel, UnknownVersion, echo
from app.manifest import Manifest, Variant
from app.serving.costs import CostTable

N_LATENCIES = 100


class LatencyLog:
    """The latest times of one image alone, as seen on this host."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=N_LATENCIES)

    def add(self, seconds: float) -> None:
        self._seconds.append(seconds)

    def summary_ms(self) -> tuple[float, float, int] | None:
        """Units: ms. Returns the last, the median, and of how many; None before the first."""
        seconds = list(self._seconds)
        return (seconds[-1] * 1e3, statistics.median(seconds) * 1e3, len(seconds)) if seconds else None


@dataclass(frozen=True, eq=False)
class ServedVariant:
    """A loaded graph, and what its runs have taken on this host."""

    entry: Variant
    runner: Runner
    latency: LatencyLog = field(default_factory=LatencyLog)
    costs: CostTable = field(default_factory=CostTable)

    @property
    def label(self) -> str:
        """The rate as text; empty where the policy adapts to the image."""
        return "" if self.entry.r is None else str(self.entry.r)


@dataclass(frozen=True)
class ServedModel:
    manifest: Manifest
    variants: Mapping[tuple[str, int | None], ServedVariant]  # by (policy, r), r None where it adapts to the image

    @cached_property  # asked for each image
    def unmerged_gmacs(self) -> float:
        """Units: GMACs of an image with all its tokens."""
        return max(variant.entry.gmacs for variant in self.variants.values())

    @property
    def policies(self) -> list[str]:
        return sorted({policy for policy, _ in self.variants})

    def rates(self, policy: str) -> list[int]:
        """List the rates of a policy; none where it adapts to the image."""
        return sorted(r for name, r in self.variants if name == policy and r is not None)


@dataclass(frozen=True)
class Catalogue:
    models: Mapping[str, Mapping[int, ServedModel]]  # by name, then version
    default_model: str

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
