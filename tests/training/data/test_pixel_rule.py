from typing import Any

import pytest

from training.data.pixel_rule import describe, override, read_rule, stated_rule
from training.data.preprocessing import InputRule
from training.export.manifest import input_entry

TIMM = stated_rule({"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 0.9}, height=224, width=224)
PUBLISHED = InputRule(height=112, width=112, resize_shorter_side=112)


def test_each_value_is_overridden_alone() -> None:
    changed = override(TIMM, mean=(0.485, 0.456, 0.406), interpolation="bilinear")
    assert changed == InputRule(
        224, 224, resize_height=248, resize_width=248, interpolation="bilinear", std=(0.5, 0.5, 0.5)
    )
    assert override(TIMM, crop_pct=1).resize_height == 224
    assert override(TIMM) == TIMM


def test_crop_options_replace_the_shorter_side() -> None:
    squashed = override(PUBLISHED, crop_mode="squash")
    assert (squashed.resize_shorter_side, squashed.resize_height, squashed.resize_width) == (None, 112, 112)
    assert override(PUBLISHED, crop_pct=0.5).resize_width == 224


def test_description_is_one_line_that_names_the_options() -> None:
    assert describe(override(TIMM, mean=(0.485, 0.456, 0.406))) == (
        "224x224 pixels, crop mode center, resized to 248x248, bicubic, mean 0.485,0.456,0.406, std 0.5,0.5,0.5"
    )
    assert "a shorter side of 112" in describe(PUBLISHED)


@pytest.mark.parametrize("rule", [TIMM, PUBLISHED, override(TIMM, crop_mode="border")])
def test_a_manifest_keeps_the_rule(rule: InputRule) -> None:
    assert read_rule(input_entry(rule)) == rule


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (123.675, 116.28, 103.53)}, r"mean \[123.675, 116.28, 103.53\]: expected three numbers from 0 to 1"),
        ({"mean": (0.5,)}, r"mean \[0.5\]: expected three"),
        ({"std": (0.2, 0.2, float("nan"))}, "std .*nan"),
        ({"std": (0.2, 0.2, 0.0)}, "std .*above 0"),
        ({"crop_pct": 0}, "crop_pct 0: expected a number above 0 and at most 1"),
        ({"crop_pct": 87.5}, "crop_pct 87.5"),
        ({"crop_pct": True}, "crop_pct True"),
        ({"crop_mode": "centre"}, "crop 'centre': expected center, squash, border"),
        ({"interpolation": "random"}, "interpolation 'random': expected nearest, "),
        ({"interpolation": "BICUBIC"}, "interpolation 'BICUBIC'"),
    ],
)
def test_a_wrong_option_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        override(TIMM, **options)


@pytest.mark.parametrize(
    ("config", "message"),
    [({"interpolation": "random"}, "'random'"), ({"crop_mode": "corner"}, "'corner'"), ({"mean": (0.5,)}, "mean")],
)
def test_a_configuration_that_the_service_lacks_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stated_rule(config, height=224, width=224)
