"""Admission: a bound on the images in flight, whether decoding, queued or running."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from app.errors import QueueFull


class Admission:
    """Counts images from admission to response. For the event loop only: it takes no lock."""

    def __init__(self, max_images: int, retry_after_seconds: Callable[[], int]) -> None:
        self._max_images, self._retry_after_seconds = max_images, retry_after_seconds
        self.n_images = 0

    @contextmanager
    def admit(self, n_images: int) -> Iterator[None]:
        """Count images as in flight inside the context.

        Raises: QueueFull, with an estimate of when the current work will be done.
        """
        if self.n_images + n_images > self._max_images:
            detail = f"{self.n_images} images are in flight; the limit is {self._max_images}."
            raise QueueFull(detail, retry_after_seconds=self._retry_after_seconds())
        self.n_images += n_images
        try:
            yield
        finally:
            self.n_images -= n_images
