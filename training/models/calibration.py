"""Thresholds that were calibrated for a ViT, as a small file to share: what policy atm and adaptive DTEM merge by."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from torch import nn

from training.merging.adaptive import Thresholds
from training.models.adaptive import AdaptiveVisionTransformer
from training.models.embedding import DecoupledEmbedding
from training.models.vit import MetricChoice
from training.models.weights import weights_digest

_FORMAT = "dtem-thresholds"

AdaptiveMetric: TypeAlias = Literal["keys", "features", "embedding"]
"""keys: the mean over heads, as ToMe. features: what the attention reads. embedding: DTEM's."""


class CalibrationMismatch(ValueError):  # noqa: N818
    """A calibration cannot be read, or is of another model; the message says which."""


@dataclass(frozen=True)
class Measured:
    """What the thresholds did on a set of images, paired with the unmerged model's answers on the same ones.

    Units: GMACs of one image, mean; difference in points of top-1, merged less unmerged, with its 95 % interval.
    is_labelled: right by labels, or where there are none right where the unmerged model's answer is kept.
    """

    dataset: str
    split: str
    n_images: int
    is_labelled: bool
    unmerged_gmacs: float
    gmacs: float
    difference_points: float
    ci95_points: tuple[float, float]


@dataclass(frozen=True)
class Calibration:
    """Thresholds, which model they are for, and what they were found by.

    weights, embedding: SHA-256 of the tensors; max_accuracy_drop in points.
    """

    metric: AdaptiveMetric
    thresholds: Thresholds
    weights: str
    embedding: str | None
    max_accuracy_drop: float
    seed: int
    n_trials: int
    calibrated: Measured
    unseen: Measured

    @property
    def policy(self) -> str:
        return "adaptive-dtem" if self.metric == "embedding" else "atm"

    def model(self, vit: nn.Module, embedding: DecoupledEmbedding | None = None) -> AdaptiveVisionTransformer:
        """Return the ViT merging by the thresholds, for inference.

        Raises: CalibrationMismatch where ViT or embedding are not those that it was calibrated for.
        """
        for name, expected, module in (("weights", self.weights, vit), ("embedding", self.embedding, embedding)):
            if expected is None:
                continue
            if module is None:
                raise CalibrationMismatch(
                    f"the calibration of {self.policy} needs the {name} {expected[:12]}…: none given"
                )
            if (found := weights_digest(module)) != expected:
                raise CalibrationMismatch(
                    f"the thresholds are calibrated for {name} {expected[:12]}…, and these are {found[:12]}…: "
                    "calibrate anew (python -m training.cli.calibrate)"
                )
        return adaptive_model(vit, self.thresholds, self.metric, embedding)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"format": _FORMAT, "policy": self.policy, **asdict(self)}, indent=2) + "\n")


def adaptive_model(
    vit: nn.Module, thresholds: Thresholds, metric: AdaptiveMetric, embedding: DecoupledEmbedding | None = None
) -> AdaptiveVisionTransformer:
    """Return the ViT merging by thresholds, an embedding joined to the qkv layers. Raises: ValueError without one."""
    if metric not in get_args(AdaptiveMetric):
        raise ValueError(f"metric {metric!r}: expected one of {', '.join(get_args(AdaptiveMetric))}")
    if metric == "embedding" and embedding is None:
        raise ValueError("metric embedding needs one: --embedding, or a --run or --published with one")
    choice: MetricChoice = embedding if metric == "embedding" and embedding is not None else metric  # type: ignore[assignment]
    return AdaptiveVisionTransformer(vit, thresholds, metric=choice, join=True).eval()


def load_calibration(path: Path) -> Calibration:
    """Read what `Calibration.save` wrote.

    Raises: FileNotFoundError; CalibrationMismatch where it is another kind of file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no calibration {path}")
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        if content.pop("format", None) != _FORMAT:
            raise ValueError(f"its format is not {_FORMAT!r}")
        stated_policy = content.pop("policy")
        sets = {
            name: Measured(**{**content[name], "ci95_points": tuple(content[name]["ci95_points"])})
            for name in ("calibrated", "unseen")
        }
        found = Calibration(**{**content, **sets, "thresholds": Thresholds(**content["thresholds"])})
        if found.metric not in get_args(AdaptiveMetric) or stated_policy != found.policy:
            raise ValueError(f"policy {stated_policy!r} with metric {found.metric!r} is none")
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise CalibrationMismatch(f"{path} is no calibration: {err}") from err
    return found
