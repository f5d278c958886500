"""Admission: how many images are inside, and when to come back if there is no room."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

from app.errors import QueueFull

FIRST_GUESS_SECONDS = 0.05  # per image, until one was measured
SMOOTHING = 0.2


class Admission:
    """Counts images from admission to answer. For the event loop alone: it takes no lock."""

    def __init__(self, max_images: int) -> None:
        self._max_images = max_images
        self.n_images = 0
        self._seconds_per_image = FIRST_GUESS_SECONDS

    @contextmanager
    def admit(self, n_images: int) -> Iterator[None]:
        """Hold room for some images, or refuse at once.

        Raises: QueueFull with the seconds after which what is inside should be done.
        """
        if self.n_images + n_images > self._max_images:
            detail = f"{self.n_images} images are inside, of at most {self._max_images}."
            raise QueueFull(detail, retry_after_seconds=self.seconds_until_empty())
        self.n_images += n_images
        try:
            yield
        finally:
            self.n_images -= n_images

    def seconds_until_empty(self) -> int:
        return max(1, math.ceil(self.n_images * self._seconds_per_image))

    def learn(self, seconds: float, n_images: int) -> None:
        """Take in what some images have just cost."""
        self._seconds_per_image += SMOOTHING * (seconds / n_images - self._seconds_per_image)
