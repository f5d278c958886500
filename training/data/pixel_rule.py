"""Pixel rules: where an `InputRule` comes from, how it is changed, and how it is said in one line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from training.data.preprocessing import InputRule

DEFAULTS: Mapping[str, Any] = {
    "crop_pct": 0.875,
    "crop_mode": "center",
    "interpolation": "bicubic",
    "mean": InputRule.mean,
    "std": InputRule.std,
}
"""timm's, for what a model's configuration does not state."""


def stated_rule(config: Mapping[str, Any], *, height: int, width: int) -> InputRule:
    """Return the rule that timm's `create_transform` follows for a model's `pretrained_cfg`.

    height, width: of the model, which may differ from the configuration's input_size. Its
        test_input_size and test_crop_pct are not used, as timm uses them on request only.
    Raises: ValueError naming what the configuration states and the service has not.
    """
    stated = {name: config.get(name) or default for name, default in DEFAULTS.items()}
    crop_pct = _fraction(stated["crop_pct"])
    return InputRule(
        height=height,
        width=width,
        resize_height=math.floor(height / crop_pct),
        resize_width=math.floor(width / crop_pct),
        crop=stated["crop_mode"],
        interpolation=stated["interpolation"],
        mean=tuple(stated["mean"]),
        std=tuple(stated["std"]),
    )


def stated_config(rule: InputRule) -> dict[str, Any]:
    """Return the keys of timm's `pretrained_cfg` from which `stated_rule` makes the rule.

    Raises: ValueError where no crop_pct leads to both resized sides.
    """
    height, width = (rule.resize_shorter_side or side for side in (rule.resize_height, rule.resize_width))
    crop_pct = min(rule.height / (height or rule.height), rule.width / (width or rule.width))
    # The quotient may round to just below a whole number.
    for candidate in (crop_pct, math.nextafter(crop_pct, 0)):
        config = {
            "crop_pct": candidate,
            "crop_mode": rule.crop,
            "interpolation": rule.interpolation,
            "mean": list(rule.mean),
            "std": list(rule.std),
        }
        made = stated_rule(config, height=rule.height, width=rule.width)
        if (made.resize_height, made.resize_width) == (height, width):
            return config
    raise ValueError(f"resized to {height}x{width} for {rule.height}x{rule.width}: no crop_pct leads to that")


def read_rule(entry: Mapping[str, Any]) -> InputRule:
    """Return the rule of a manifest's `input`. Raises: ValueError"""
    stated: dict[str, Any] = {name: value for name, value in entry.items() if name not in ("name", "layout", "dtype")}
    tuples: dict[str, Any] = {name: tuple(value) for name, value in stated.items() if isinstance(value, list)}
    return InputRule(**{**stated, **tuples})


def override(
    rule: InputRule,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop_pct: float | None = None,
    crop_mode: str | None = None,
    interpolation: str | None = None,
) -> InputRule:
    """Return the rule with other values, as timm names them; None keeps the rule's own.

    crop_pct: share of each resized side that is cropped, above 0 and at most 1.
    Raises: ValueError naming the value and what would be accepted.
    """
    changes: dict[str, Any] = {}
    if mean is not None:
        changes["mean"] = _shares("mean", mean)
    if std is not None:
        changes["std"] = _shares("std", std)
    if crop_mode is not None:
        changes["crop"] = crop_mode
    if interpolation is not None:
        changes["interpolation"] = interpolation
    if crop_pct is not None:
        crop_pct = _fraction(crop_pct)
        changes["resize_height"] = math.floor(rule.height / crop_pct)
        changes["resize_width"] = math.floor(rule.width / crop_pct)
    elif crop_mode is not None and rule.resize_shorter_side is not None:
        changes["resize_height"] = changes["resize_width"] = rule.resize_shorter_side
    if "resize_height" in changes:
        changes["resize_shorter_side"] = None
    return replace(rule, **changes)


def describe(rule: InputRule) -> str:
    """Say the rule in one line, by the names of the options that change it."""
    resized = f"{rule.resize_height}x{rule.resize_width}"
    if rule.resize_shorter_side is not None:
        resized = f"a shorter side of {rule.resize_shorter_side}"
    mean, std = (",".join(f"{value:.6g}" for value in values) for values in (rule.mean, rule.std))
    return (
        f"{rule.height}x{rule.width} pixels, crop mode {rule.crop}, resized to {resized}, {rule.interpolation}, "
        f"mean {mean}, std {std}"
    )


def _fraction(crop_pct: Any) -> float:
    if not _is_number(crop_pct) or not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct {crop_pct!r}: expected a number above 0 and at most 1")
    return float(crop_pct)


def _shares(name: str, values: Sequence[float]) -> tuple[float, ...]:
    """Check numbers that are often given for pixels of 0 … 255, such as 123.675."""
    if len(values) != 3 or not all(_is_number(value) and 0 <= value <= 1 for value in values):
        raise ValueError(f"{name} {list(values)}: expected three numbers from 0 to 1, as of pixels divided by 255")
    return tuple(float(value) for value in values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
