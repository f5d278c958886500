"""Decoded images are those of their source, each read once."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from training.data import decoded
from training.data.decoded import DecodedImages
from training.data.sources import DigitScenes


class Counted(DigitScenes):
    n_read = 0

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        type(self).n_read += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("max_bytes", [decoded.MAX_MEMORY_BYTES, 0])
def test_decoded_images_are_those_of_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_bytes: int
) -> None:
    monkeypatch.setattr(decoded, "MAX_MEMORY_BYTES", max_bytes)
    source = DigitScenes("validation", 5)
    images = DecodedImages(source, tmp_path)
    assert not list(tmp_path.iterdir()), "the file of pixels has a name"
    assert (images.name, images.split, len(images)) == (source.name, source.split, 5)
    for index in range(5):
        assert torch.equal(images[index][0], source[index][0])
        assert int(images[index][1]) == source[index][1]
    batches = list(images.batches(2))
    assert [len(pixels) for pixels, _ in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([labels for _, labels in batches]), images.answers)


def test_images_are_read_once() -> None:
    images = DecodedImages(Counted("validation", 5))
    n_read = Counted.n_read
    for _ in range(3):
        list(images.batches(2))
    # Two more, of the first image, say the size.
    assert Counted.n_read == n_read == 5 + 2
