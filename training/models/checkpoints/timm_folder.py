"""Folders that timm writes: config.json with architecture, arguments, labels and preprocessing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.models.checkpoints.files import UnreadableCheckpoint
from training.models.checkpoints.stated import Stated, plain_labels
from training.models.vit import full_config

_PIXELS = ("input_size", "test_input_size", "interpolation", "crop_pct", "test_crop_pct", "crop_mode", "mean", "std")
_TOP = ("architecture", "num_classes", "num_features", "global_pool", "model_args", "pretrained_cfg")


def is_timm(config: Mapping[str, Any]) -> bool:
    return isinstance(config.get("architecture"), str)


def read_config(config: Mapping[str, Any], file: Path) -> Stated:
    """Return what timm's config.json states; older ones have the keys of `pretrained_cfg` at the top.

    Raises: UnreadableCheckpoint for a key that this timm does not know.
    """
    stated = dict(config.get("pretrained_cfg") or {key: config[key] for key in config if key not in _TOP})
    labels = config.get("label_names") or config.get("labels") or stated.get("label_names") or stated.get("labels")
    try:
        filled = full_config({key: value for key, value in stated.items() if key != "labels"})
    except TypeError as err:
        raise UnreadableCheckpoint(f"{file}: its config.json is not timm's: {err}") from err
    pixels = {key: filled[key] for key in _PIXELS if filled.get(key) is not None}
    return Stated(
        architecture=config["architecture"],
        arguments=dict(config.get("model_args") or {}),
        labels=plain_labels(labels, file),
        pixels={key: tuple(value) if isinstance(value, list) else value for key, value in pixels.items()},
        notes=(f"timm's {config['architecture']}",),
    )
