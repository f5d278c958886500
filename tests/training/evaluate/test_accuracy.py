import pytest
import torch
from torch import Tensor

from training.evaluate.accuracy import measure
from training.tasks.measure import wilson_interval


@pytest.mark.parametrize(
    ("n_right", "n_images", "low", "high"),
    [  # from the closed form evaluated by hand in rational arithmetic, z = 1.959964
        (0, 10, 0.0, 0.277533),
        (5, 10, 0.236593, 0.763407),
        (10, 10, 0.722467, 1.0),
        (9500, 10_000, 0.945551, 0.954103),
    ],
)
def test_wilson_interval_is_the_published_one(n_right: int, n_images: int, low: float, high: float) -> None:
    assert wilson_interval(n_right, n_images) == pytest.approx((low, high), abs=2e-6)


@pytest.mark.parametrize(("n_right", "n_images"), [(0, 0), (-1, 5), (6, 5)])
def test_impossible_counts_are_refused(n_right: int, n_images: int) -> None:
    with pytest.raises(ValueError, match="n_right"):
        wilson_interval(n_right, n_images)


def test_measure_compares_images_with_labels_and_times_inference_only() -> None:
    def first_pixel(pixels: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(pixels[:, 0, 0, 0].long(), 5).float()

    pixels = torch.zeros(7, 2, 2, 3, dtype=torch.uint8)
    pixels[:, 0, 0, 0] = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    labels = torch.tensor([0, 1, 2, 0, 0, 0, 2])
    result = measure(first_pixel, [(pixels[:4], labels[:4]), (pixels[4:6], labels[4:6]), (pixels[6:], labels[6:])], 2)
    assert result.scores.tolist() == [True, True, True, False, False, True, False]
    assert result.value == pytest.approx(4 / 7)
    assert result.ci95[0] < 4 / 7 < result.ci95[1]
    assert result.images_per_second == pytest.approx(7 / result.inference_seconds)
