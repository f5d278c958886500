"""Training and serving decode a file to bit-identical pixels, and to those of timm where the rule is timm's."""

import io
import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import timm
from numpy.typing import NDArray
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from timm.models import get_pretrained_cfg, list_pretrained

from app.store.manifest import Input
from app.store.preprocessing import decode_image
from tests.app.odd_images import encode, exif_bytes, make_photo, ordinary_images
from tests.app.tiny_store import make_input
from training.data.pixel_rule import stated_rule
from training.data.preprocessing import CROPS, InputRule, read_pixels
from training.export.manifest import input_entry

EXAMPLES = Path(__file__).parents[2] / "examples"
EXAMPLE_IMAGES = {
    path.name: path.read_bytes() for path in sorted(EXAMPLES.glob("*")) if path.suffix in (".jpg", ".png")
}
IMAGES = ordinary_images() | EXAMPLE_IMAGES
SIDES = (16, 112)
MAX_PIXELS = 50_000_000
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def served_pixels(data: bytes, rule: InputRule) -> NDArray[np.uint8]:
    """Decode as the service does, by the manifest that an export of the rule has."""
    return decode_image(data, Input.model_validate_json(json.dumps(input_entry(rule))), MAX_PIXELS)


def assert_same_pixels(data: bytes, rule: InputRule) -> None:
    np.testing.assert_array_equal(served_pixels(data, rule), read_pixels(io.BytesIO(data), rule))


def shorter_side(side: int) -> InputRule:
    return InputRule(height=side, width=side, resize_shorter_side=side)


def timm_rule(size: tuple[int, int], **stated: Any) -> tuple[InputRule, dict[str, Any]]:
    """Return a rule and the configuration that it is of."""
    config = {"input_size": (3, *size), **stated}
    return stated_rule(config, height=size[0], width=size[1]), config


def timm_pixels(image: Image.Image, config: dict[str, Any]) -> NDArray[np.uint8]:
    """Return what timm normalises."""
    resolved = resolve_data_config(pretrained_cfg=config)  # type: ignore[no-untyped-call]
    transform: Any = create_transform(**resolved, normalize=False)
    return np.asarray(transform(image)).transpose(1, 2, 0)


RULES = {
    f"{crop}-{size[0]}x{size[1]}-{pct}": timm_rule(size, crop_mode=crop, crop_pct=pct)[0]
    for crop in CROPS
    for size in ((16, 16), (112, 64), (48, 96))
    for pct in (0.875,)
}


def photos(*sizes: tuple[int, int]) -> list[tuple[Image.Image, bytes]]:
    """Return photos, each with its file."""
    made = [make_photo(*size) for size in sizes]
    return [(photo, encode(photo, "BMP")) for photo in made]


SMALL_PHOTOS = photos((97, 64), (64, 97), (201, 133), (50, 233), (240, 40), (33, 33))
ODD_PHOTOS = photos((300, 225), (233, 350), (151, 149))


def test_a_published_manifest_keeps_its_pixels() -> None:
    entry = make_input(16)
    assert json.loads(json.dumps(input_entry(shorter_side(16)))) == entry
    photo = make_photo(61, 43)
    resized = photo.resize((23, 16), Image.Resampling.BICUBIC)
    expected = np.asarray(resized)[:, 3:19]
    rule = Input.model_validate_json(json.dumps(entry))
    np.testing.assert_array_equal(decode_image(encode(photo, "PNG"), rule, MAX_PIXELS), expected)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", IMAGES)
def test_both_halves_decode_the_same_pixels(name: str, side: int) -> None:
    assert_same_pixels(IMAGES[name], shorter_side(side))


@pytest.mark.parametrize("size", [(16, 16), (17, 16), (31, 500), (1000, 33), (223, 225), (640, 481)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_both_halves_decode_the_same_pixels_at_every_size(size: tuple[int, int], kind: str) -> None:
    for rule in (*map(shorter_side, SIDES), *RULES.values()):
        assert_same_pixels(encode(make_photo(*size), kind), rule)


@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
def test_both_halves_turn_drafts_alike(rule: InputRule) -> None:
    for orientation in (1, 6):
        assert_same_pixels(encode(make_photo(1001, 500), "JPEG", exif=exif_bytes(orientation)), rule)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"])
@pytest.mark.parametrize("crop_mode", CROPS)
def test_pixels_are_those_of_timm(crop_mode: str, interpolation: str) -> None:
    for size in ((64, 64), (112, 64), (48, 96)):
        for crop_pct in (0.5, 0.875, 0.9, 0.95, 1.0):
            rule, config = timm_rule(size, crop_mode=crop_mode, crop_pct=crop_pct, interpolation=interpolation)
            for photo, data in SMALL_PHOTOS:
                served, expected = served_pixels(data, rule), timm_pixels(photo, config)
                np.testing.assert_array_equal(served, expected, f"{size} {crop_pct} {photo.size}")


@pytest.mark.parametrize("crop_mode", CROPS)
def test_a_draft_does_not_show(crop_mode: str) -> None:
    """A draft below the resized size would be blurred, and one of another aspect ratio shifted."""
    for size in ((64, 64), (112, 64), (48, 96)):
        rule, config = timm_rule(size, crop_mode=crop_mode, crop_pct=0.9)
        for shape in ((1200, 501), (403, 1600)):
            for orientation in (1, 6):
                data = encode(make_photo(*shape), "JPEG", exif=exif_bytes(orientation), quality=95)
                image = Image.open(io.BytesIO(data)).convert("RGB")
                upright = image.transpose(Image.Transpose.ROTATE_270) if orientation == 6 else image
                difference = np.abs(served_pixels(data, rule).astype(int) - timm_pixels(upright, config))
                assert difference.mean() < 1.5, (size, shape, orientation)


def test_pixels_are_those_of_timm_for_every_plain_vit() -> None:
    """All classifying models of timm's two modules of plain ViTs, by configuration. `-rP` shows the table."""
    agreeing, refused = Counter[str](), dict[str, str]()
    for name, config in plain_vits():
        try:
            agreeing[agrees(json.dumps(config, sort_keys=True))] += 1
        except ValueError as err:
            refused[name] = str(err)
    for line, n_models in agreeing.most_common():
        print(f"{n_models:4} {line}")
    print(f"{agreeing.total()} agree, {len(refused)} refused", *refused.items(), sep="\n")
    assert agreeing.total() >= 200
    assert refused == {}


def plain_vits() -> list[tuple[str, dict[str, Any]]]:
    names = {name for module in ("vision_transformer", "deit") for name in timm.list_models(module=module)}
    found = [name for name in list_pretrained() if name.partition(".")[0] in names]
    configs: list[tuple[str, Any]] = [(name, cast(Any, get_pretrained_cfg(name)).to_dict()) for name in found]
    wanted = ("input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")
    return [(name, {key: config.get(key) for key in wanted}) for name, config in configs if config.get("num_classes")]


@cache
def agrees(config_text: str) -> str:
    """Compare three images. Raises: ValueError where there is no such rule, AssertionError for other pixels."""
    config = json.loads(config_text)
    _, height, width = config["input_size"]
    rule = stated_rule(config, height=height, width=width)
    for photo, data in ODD_PHOTOS:
        np.testing.assert_array_equal(served_pixels(data, rule), timm_pixels(photo, config))
    return f"{height}x{width} {rule.crop} of {rule.resize_height}x{rule.resize_width}, {rule.interpolation}"
