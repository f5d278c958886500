import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from training.data.augmentation import Mixing, augmentation, seeded
from training.data.preprocessing import InputRule

RULE = InputRule(height=48, width=64, resize_shorter_side=64, mean=(0.2, 0.4, 0.6), std=(0.1, 0.2, 0.5))


def plain(colour: tuple[int, int, int] = (51, 153, 255)) -> Image.Image:
    return Image.new("RGB", (90, 80), colour)


def test_pixels_are_cropped_to_the_rule_and_normalised_by_it() -> None:
    with seeded(1):
        pixels = augmentation(RULE)(plain())
    assert pixels.shape == (3, 48, 64)
    expected = torch.tensor([(0.2 - 0.2) / 0.1, (0.6 - 0.4) / 0.2, (1 - 0.6) / 0.5]).view(3, 1, 1)
    assert torch.allclose(pixels, expected.expand(3, 48, 64), atol=1e-5)


def test_erasing_puts_noise_where_it_erases_and_randaugment_varies_colours() -> None:
    with seeded(1):
        erased = augmentation(RULE, erasing=1.0)(plain((51, 102, 153)))  # what normalises to 0
    share = float((erased.abs() > 1e-5).any(0).float().mean())
    assert 0.01 < share < 0.35
    assert float(erased[erased.abs() > 1e-5].std()) == pytest.approx(1, abs=0.2)
    varied = augmentation(RULE, randaugment="rand-m9-mstd0.5-inc1")
    with seeded(3):
        results = [varied(plain()) for _ in range(12)]
    assert len({tuple(pixels.mean((1, 2)).tolist()) for pixels in results}) > 4


@pytest.mark.parametrize("name", ["rand-m9-q3", "original", "rand"])
def test_unknown_randaugment_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"randaugment '{name}'"):
        augmentation(RULE, randaugment=name)


def test_seeded_nests_and_gives_the_same_draws() -> None:
    with seeded(1, 2):
        first = np.random.rand(), torch.rand(1)
        with seeded(7):
            np.random.rand()
        after = np.random.rand()
    with seeded(1, 2):
        assert (np.random.rand(), torch.rand(1)) == first
        assert np.random.rand() == after


def test_mixing_blends_each_image_with_its_opposite_by_the_shares_it_states() -> None:
    images, labels = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4, 5])
    before = images.clone()
    mixed, shares = Mixing(6, mixup=0.8, cutmix=0.0)(images, labels, 1, 2, 3)
    share = shares[0, 0]
    assert 0 < float(share) < 1
    assert torch.allclose(mixed, share * images + (1 - share) * images.flip(0), atol=1e-6)
    assert torch.allclose(shares, share * torch.eye(6) + (1 - share) * torch.eye(6).flip(0))
    assert torch.equal(images, before)


def test_cutmix_states_the_area_that_is_left() -> None:
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 32, 32).contiguous()
    mixed, shares = Mixing(4, mixup=0.0, cutmix=1.0)(images, torch.arange(4), 5)
    assert float((mixed[0] == 0).float().mean()) == pytest.approx(float(shares[0, 0]))
    assert float((mixed[0] == 3).float().mean()) == pytest.approx(float(shares[0, 3]))


def test_mixing_is_a_function_of_its_seed() -> None:
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    mixing = Mixing(4, mixup=0.8, cutmix=1.0)
    first = mixing(images, labels, 1, 2, 0)
    np.random.seed(9)
    again, other = mixing(images, labels, 1, 2, 0), mixing(images, labels, 1, 2, 1)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_label_smoothing_of_the_loss_is_that_of_smoothed_shares() -> None:
    _, shares = Mixing(4, mixup=0.8, cutmix=1.0)(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]), 1)
    logits = torch.randn(4, 4)
    loss = functional.cross_entropy(logits, shares, label_smoothing=0.1)
    assert torch.allclose(loss, -((0.9 * shares + 0.1 / 4) * logits.log_softmax(1)).sum(1).mean())


def test_odd_batches_are_not_mixed() -> None:
    with pytest.raises(ValueError, match="even number of images per process, not 3"):
        Mixing(4, mixup=0.8, cutmix=1.0)(torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 2]), 1)
