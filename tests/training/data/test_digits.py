import hashlib
import itertools
from dataclasses import replace

import numpy as np
import pytest

from training.data import digits
from training.data.digits import REFERENCE_TASK, SPLITS, Task, draw


def fingerprint(split: digits.Split, n_images: int) -> str:
    scenes = [draw(split, index) for index in range(n_images)]
    content = b"".join(s.image.tobytes() + s.mask.tobytes() + bytes([s.label]) for s in scenes)
    return hashlib.sha256(content).hexdigest()[:16]


PINNED: dict[digits.Split, str] = {
    "train": "71ad3ce51f8aacf7",
    "validation": "ea5af255af969ab0",
    "test": "ef822eb89142376c",
}


@pytest.mark.parametrize("split", SPLITS)
def test_images_never_change(split: digits.Split) -> None:
    assert fingerprint(split, 64) == PINNED[split]


def test_an_image_does_not_depend_on_those_drawn_before() -> None:
    first = draw("test", 7)
    draw("train", 3)
    again = draw("test", 7)
    assert np.array_equal(first.image, again.image)
    assert first.label == again.label


def test_no_scan_is_in_two_splits() -> None:
    sources = digits._sources()
    drawn = {split: {scan.tobytes() for scan, _ in sources.scans[split]} for split in SPLITS}
    assert [len(sources.scans[split]) for split in SPLITS] == [1297, 200, 300]
    assert not drawn["train"] & drawn["test"]
    assert not drawn["train"] & drawn["validation"]
    assert not drawn["validation"] & drawn["test"]


def test_photograph_regions_are_disjoint_and_cover_the_photographs() -> None:
    columns = sorted(digits._PHOTO_COLUMNS.values())
    assert columns[0][0] == 0
    assert columns[-1][1] == 640
    assert all(left[1] == right[0] for left, right in itertools.pairwise(columns))
    widths = {split: photos[0].width for split, photos in digits._sources().photos.items()}
    assert min(widths.values()) >= digits._MAX_CROP_PIXELS


@pytest.mark.parametrize("split", SPLITS)
def test_digit_lies_inside_the_image_and_box_is_tight(split: digits.Split) -> None:
    for index in range(200):
        scene = draw(split, index)
        left, top, right, bottom = scene.box
        inside = scene.mask[top:bottom, left:right]
        assert inside.sum() == scene.mask.sum() > 30
        assert inside[0].any()
        assert inside[-1].any()
        assert inside[:, 0].any()
        assert inside[:, -1].any()
        edge = np.concatenate([scene.mask[0], scene.mask[-1], scene.mask[:, 0], scene.mask[:, -1]])
        assert edge.mean() < 0.02, f"{split} {index}: the digit runs off the image"


def test_object_is_small_and_ground_is_most_of_the_image() -> None:
    shares = [draw("test", index).mask.mean() for index in range(300)]
    assert 0.01 < np.mean(shares) < 0.06
    assert max(shares) < 0.15


def test_ink_contrasts_with_what_it_covers() -> None:
    for index in range(100):
        scene = draw("test", index, replace(REFERENCE_TASK, max_clutter=0))
        luma = scene.image.astype(float) @ [0.299, 0.587, 0.114]
        ink = luma[scene.mask].mean()
        left, top, right, bottom = scene.box
        around = luma[top:bottom, left:right][~scene.mask[top:bottom, left:right]].mean()
        assert abs(ink - around) > 12, index


def test_every_digit_is_about_as_frequent() -> None:
    counts = np.bincount([draw("train", index).label for index in range(1000)], minlength=10)
    assert counts.min() > 60


def test_task_grows_by_its_settings() -> None:
    easy = Task(light_on_dark=True, photo_percent=0, texture_percent=0, max_clutter=0)
    for index in range(20):
        scene = draw("train", index, easy)
        assert len(np.unique(scene.image[~scene.mask & (scene.image.max(2) < 65)].reshape(-1, 3), axis=0)) >= 1
        assert scene.image[scene.mask].mean() > scene.image[~scene.mask].mean() + 60


@pytest.mark.parametrize(
    ("split", "index", "message"),
    [("dev", 0, "split 'dev': expected one of train"), ("test", -1, "index -1: expected 0")],
)
def test_what_cannot_be_drawn_is_refused(split: digits.Split, index: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(split, index)


@pytest.mark.parametrize(
    "settings",
    [{"min_digit_pixels": 60}, {"max_digit_pixels": 200}, {"photo_percent": 80}, {"min_digit_pixels": 4}],
)
def test_contradictory_task_is_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"px|percent"):
        Task(**settings)  # type: ignore[arg-type]
