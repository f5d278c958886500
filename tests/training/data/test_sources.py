from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training.data.digits import draw
from training.data.preprocessing import InputRule
from training.data.sources import REFERENCE_INPUT, open_source, pixel_batches


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of three images each, red and blue, in the layout of ImageNet's validation set."""
    for name, colour in (("n01-red", (200, 10, 10)), ("n02-blue", (10, 10, 200))):
        (tmp_path / "val" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (300 + 10 * number, 200), colour).save(tmp_path / "val" / name / f"{number}.png")
    return tmp_path / "val"


def test_digits_are_the_reference_task() -> None:
    source = open_source("digits", REFERENCE_INPUT, 20)
    pixels, label = source[13]
    scene = draw("test", 13)
    assert len(source) == 20
    assert np.array_equal(pixels.numpy(), scene.image)
    assert label == scene.label
    assert source.labels == tuple("0123456789")


def test_folder_gives_cropped_pixels_and_class_indices(folder: Path) -> None:
    source = open_source(str(folder), InputRule(height=224, width=224, resize_shorter_side=256), None)
    assert list(source.labels) == ["n01-red", "n02-blue"]
    assert len(source) == 6
    assert [source[i][1] for i in range(6)] == [0, 0, 0, 1, 1, 1]
    pixels, _ = source[4]
    assert pixels.shape == (224, 224, 3)
    assert pixels.dtype == torch.uint8
    assert pixels[100, 100].tolist() == [10, 10, 200]


def test_fewer_images_of_a_folder_still_cover_its_classes(folder: Path) -> None:
    source = open_source(str(folder), InputRule(height=64, width=64, resize_shorter_side=64), 2)
    assert [source[i][1] for i in range(len(source))] == [0, 1]


def test_batches_keep_order_and_the_last_part(folder: Path) -> None:
    source = open_source(str(folder), InputRule(height=64, width=64, resize_shorter_side=64), None)
    batches = list(pixel_batches(source, 4, n_workers=0))
    assert [len(labels) for _, labels in batches] == [4, 2]
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 0, 0, 1, 1, 1]


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_source(str(tmp_path / "nowhere"), REFERENCE_INPUT, None)


@pytest.mark.parametrize(
    "settings", [{"height": 128, "width": 64, "resize_shorter_side": 100}, {"interpolation": "cubic-ish"}]
)
def test_impossible_input_rule_is_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"resize_shorter_side 100|interpolation 'cubic-ish'"):
        InputRule(**{"height": 64, "width": 64, "resize_shorter_side": 64, **settings})  # type: ignore[arg-type]
