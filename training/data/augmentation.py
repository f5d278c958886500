"""Augmentation of training images, by timm: crop, flip, RandAugment, erasing, mixup and cutmix.

Each draw is a pure function of its seed, so that resumed runs and several processes see the same
images as one uninterrupted process. Besides `training.models.vit`, the only module that imports
timm.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from timm.data.mixup import Mixup
from timm.data.transforms_factory import create_transform
from torch import Tensor

from training.data.preprocessing import InputRule
from training.data.random_words import RandomWords

Augmentation: TypeAlias = Callable[[Image.Image], Tensor]
"""Shapes: an RGB image -> float32 (3, H, W), normalised"""

_MIXING_SEED = 79
_MAX_WORD = 2**32 - 1


@contextmanager
def seeded(*seed: int) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and PyTorch, and restore them afterwards."""
    words = RandomWords(*seed)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(words.integer(0, _MAX_WORD))
    np.random.seed(words.integer(0, _MAX_WORD))
    # torch.manual_seed would seed GPUs too.
    torch.default_generator.manual_seed(words.integer(0, _MAX_WORD))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def augmentation(
    rule: InputRule,
    *,
    randaugment: str | None = None,
    erasing: float = 0.0,
    min_crop: float = 0.08,
    flip: float = 0.5,
) -> Augmentation:
    """Return a transform: crop, flip and normalisation, optionally RandAugment and erasing.

    randaugment: timm's name, e.g. rand-m9-mstd0.5-inc1. erasing, flip: probabilities. min_crop: the
        smallest crop, as a share of the area. There is no colour jitter.
    Raises: ValueError for a name that timm does not know.
    """
    if randaugment is not None and not randaugment.startswith("rand-"):
        raise ValueError(f"randaugment {randaugment!r}: expected timm's name for it, e.g. 'rand-m9-mstd0.5-inc1'")
    try:
        transform: Augmentation = create_transform(
            (3, rule.height, rule.width),
            is_training=True,
            color_jitter=None,  # type: ignore[arg-type]  # 0 would still draw random numbers
            auto_augment=randaugment,
            interpolation=rule.interpolation,
            mean=rule.mean,
            std=rule.std,
            re_prob=erasing,
            scale=(min_crop, 1.0),
            hflip=flip,
            re_mode="pixel",
        )
    except (AssertionError, KeyError, ValueError) as err:
        raise ValueError(f"randaugment {randaugment!r}: unknown to timm {err}".rstrip()) from err
    return transform


class Mixing:
    """Blend each batch with its reverse, as whole images (mixup) or in a box (cutmix).

    Where both alphas are above 0, one of the two is chosen at random.
    Source: arXiv 1710.09412, arXiv 1905.04899.
    """

    def __init__(self, n_classes: int, *, mixup: float, cutmix: float) -> None:
        settings: dict[str, Any] = {"mixup_alpha": mixup, "cutmix_alpha": cutmix, "num_classes": n_classes}
        self._mix = Mixup(label_smoothing=0.0, **settings)  # type: ignore[no-untyped-call]

    def __call__(self, images: Tensor, labels: Tensor, *seed: int) -> tuple[Tensor, Tensor]:
        """Return blended images and the share of each class.

        Shapes: (B, 3, H, W), (B,) -> (B, 3, H, W), (B, classes)

        Raises: ValueError for an odd B, since an image would be blended with itself.
        """
        if len(images) % 2:
            raise ValueError(f"mixup and cutmix need an even number of images per process, not {len(images)}")
        with seeded(_MIXING_SEED, *seed):
            mixed, shares = self._mix(images.clone(), labels)
        return mixed, shares
