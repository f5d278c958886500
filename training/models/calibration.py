"""Calibrations: thresholds for one ViT, as a small file. The adaptive policies merge by them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from training.merging.adaptive import Thresholds
from training.merging.policies import ADAPTIVE_METRICS, adaptive_policy
from training.models.adaptive import AdaptiveVisionTransformer
from training.models.embedding import DecoupledEmbedding
from training.models.vit import MetricChoice
from training.models.weights import weights_digest

_FORMAT = "dtem-thresholds"


class CalibrationMismatch(ValueError):  # noqa: N818
    """A calibration file is invalid, or belongs to another model; the message says which."""


@dataclass(frozen=True)
class Measured:
    """Cost and accuracy of the thresholds on a set of images, paired with the unmerged model.

    Units: GMACs per image, mean; difference of top-1 in points, merged minus unmerged, with its 95
        % interval.
    is_labelled: answers are compared with labels; otherwise with the answers of the unmerged model.
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
    """Thresholds, the model that they belong to, and the search that found them.

    weights, embedding: SHA-256 of the tensors. max_accuracy_drop: in points. metric: one of
        `ADAPTIVE_METRICS`.
    """

    metric: str
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
        return adaptive_policy(self.metric).name

    def model(self, vit: nn.Module, embedding: DecoupledEmbedding | None = None) -> AdaptiveVisionTransformer:
        """Return the ViT with these thresholds, for inference.

        Raises: CalibrationMismatch where the ViT or the embedding is another than the calibrated
            one.
        """
        for name, expected, module in (("weights", self.weights, vit), ("embedding", self.embedding, embedding)):
            if expected is None:
                continue
            if module is None:
                raise CalibrationMismatch(
                    f"the calibration of {self.policy} needs the {name} {expected[:12]}…, and none was given"
                )
            if (found := weights_digest(module)) != expected:
                raise CalibrationMismatch(
                    f"the thresholds were calibrated for {name} {expected[:12]}…, not for {found[:12]}…: "
                    "calibrate anew with dtem calibrate"
                )
        return adaptive_model(vit, self.thresholds, self.metric, embedding)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"format": _FORMAT, "policy": self.policy, **asdict(self)}, indent=2) + "\n")


def adaptive_model(
    vit: nn.Module, thresholds: Thresholds, metric: str, embedding: DecoupledEmbedding | None = None
) -> AdaptiveVisionTransformer:
    """Return the ViT with thresholds on a metric, an embedding joined to the qkv layers.

    Raises: ValueError for an unknown metric, or a missing embedding.
    """
    choice: MetricChoice = adaptive_policy(metric).resolve_metric(embedding)
    return AdaptiveVisionTransformer(vit, thresholds, metric=choice, join=True).eval()


def load_calibration(path: Path) -> Calibration:
    """Read a file that `Calibration.save` wrote.

    Raises: FileNotFoundError; CalibrationMismatch where the file is not a calibration.
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
        if found.metric not in ADAPTIVE_METRICS or stated_policy != found.policy:
            raise ValueError(f"policy {stated_policy!r} with metric {found.metric!r} is unknown")
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise CalibrationMismatch(f"{path} is not a calibration: {err}") from err
    return found
