import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.learn.tiny_run import RULE, write_images
from training.data.augmentation import augmentation
from training.data.training_images import AugmentedFolder, TrainingDigits
from training.learn.images import image_batches, training_images, validation_images
from training.learn.recipe import Data

STRONG = "rand-m9-mstd0.5-inc1"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "train", 10)


def folder_images(root: Path, *, seed: int = 5, share: float = 1.0) -> AugmentedFolder:
    return AugmentedFolder(root, augmentation(RULE, randaugment=STRONG, erasing=0.5), seed=seed, share=share)


def test_drawn_image_depends_on_seed_epoch_and_index_only(root: Path) -> None:
    images = folder_images(root)
    first, label = images.draw(12, 3)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    images.draw(13, 3)
    again, _ = folder_images(root).draw(12, 3)
    assert (first.shape, first.dtype, label) == ((3, 64, 64), torch.float32, 1)
    assert torch.equal(first, again)
    assert not torch.equal(first, images.draw(12, 4)[0])
    assert not torch.equal(first, images.draw(11, 3)[0])
    assert not torch.equal(first, folder_images(root, seed=6).draw(12, 3)[0])


def test_drawing_leaves_all_generators_as_they_were(root: Path) -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    folder_images(root).draw(0, 0)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


def test_share_is_taken_from_each_class_and_larger_shares_contain_smaller_ones(root: Path) -> None:
    def chosen(share: float, seed: int = 5) -> set[str]:
        images = folder_images(root, seed=seed, share=share)
        assert len(images) == len(images._samples)
        return {file for file, _ in images._samples}

    assert Counter(Path(file).parent.name for file in chosen(0.3)) == {"ant": 3, "bee": 3, "cat": 3, "dog": 3}
    assert chosen(0.3) < chosen(0.6) < chosen(1.0)
    assert chosen(0.3) != chosen(0.3, seed=6)
    assert len(chosen(0.01)) == 4  # at least one of each


@pytest.mark.parametrize("n_workers", [0, 2])
def test_several_processes_and_resumed_runs_see_the_same_images_as_one(root: Path, n_workers: int) -> None:
    def batches(first_step: int, rank: int = 0, n_processes: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(
            image_batches(
                folder_images(root),
                seed=5,
                first_step=first_step,
                n_steps=6,
                batch_size=8,
                rank=rank,
                n_processes=n_processes,
                n_workers=n_workers,
            )
        )

    whole, parts, later = batches(0), [batches(0, rank, 2) for rank in (0, 1)], batches(4)
    for step in range(6):
        assert torch.equal(torch.cat([part[step][0] for part in parts]), whole[step][0])
        assert torch.equal(torch.cat([part[step][1] for part in parts]), whole[step][1])
    assert torch.equal(later[0][0], whole[4][0])
    assert [len(images) for images, _ in later] == [8, 8]


def test_an_epoch_shows_every_image_once_and_the_next_one_in_another_order(root: Path) -> None:
    order = torch.stack(
        [labels for _, labels in image_batches(folder_images(root), seed=5, first_step=0, n_steps=10, batch_size=8)]
    )
    first, second = order[:5].flatten(), order[5:].flatten()
    assert first.bincount().tolist() == second.bincount().tolist() == [10, 10, 10, 10]
    assert not torch.equal(first, second)


def test_batch_that_processes_cannot_share_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="batch_size 8 cannot be shared evenly by 3"):
        next(image_batches(folder_images(root), seed=5, first_step=0, n_steps=1, batch_size=8, n_processes=3))


def test_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    root = write_images(tmp_path / "train", 1)
    (root / "bee" / "0.png").write_bytes(b"not a png")
    with pytest.raises(ValueError, match=r"bee/0\.png cannot be read"):
        folder_images(root).draw(1, 0)


@pytest.mark.parametrize("n_workers", [0, 1])
@pytest.mark.parametrize("content", [b"", b"not a png", b"\x89PNG\r\n\x1a\n" + bytes(40), None])
def test_image_that_cannot_be_read_is_named_in_one_line(tmp_path: Path, content: bytes | None, n_workers: int) -> None:
    file = write_images(tmp_path / "train", 1) / "bee" / "0.png"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ValueError, match=r"^training image \S*bee/0\.png cannot be read: [^\n]+$"):
        list(
            image_batches(
                folder_images(tmp_path / "train"), seed=5, first_step=0, n_steps=1, batch_size=4, n_workers=n_workers
            )
        )


def test_image_is_oriented_by_its_exif(tmp_path: Path) -> None:
    write_images(tmp_path / "train", 1, ("one", "two"))
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:32] = 255  # white above; to be turned upside down
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(pixels).save(tmp_path / "train" / "one" / "0.png", exif=exif)
    images = AugmentedFolder(tmp_path / "train", lambda image: torch.from_numpy(np.array(image)), seed=1)
    assert images.draw(0, 0)[0][:32].max() == 0


def test_missing_folder_and_empty_class_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        training_images(Data(source=str(tmp_path / "nowhere")), RULE, 1)
    write_images(tmp_path / "train", 1)
    (tmp_path / "train" / "elk").mkdir()
    with pytest.raises(FileNotFoundError, match="elk"):
        training_images(Data(source=str(tmp_path / "train")), RULE, 1)


def test_validation_folder_of_other_classes_is_refused(root: Path, tmp_path: Path) -> None:
    other = write_images(tmp_path / "val", 1, ("ant", "bee", "cat", "elk"))
    data = Data(source=str(root), validation=str(other))
    with pytest.raises(ValueError, match=r"other classes than .*: dog, elk"):
        validation_images(data, RULE, ("ant", "bee", "cat", "dog"))


def test_validation_is_spread_over_the_classes(root: Path) -> None:
    validation = validation_images(
        Data(source=str(root), validation=str(root), n_validation=8), RULE, ("ant", "bee", "cat", "dog")
    )
    assert validation is not None
    ((pixels, labels),) = validation.batches
    assert (pixels.shape, pixels.dtype) == ((8, 64, 64, 3), torch.uint8)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert validation_images(Data(source=str(root)), RULE, ("ant",)) is None
    assert validation_images(Data(n_distinct=4, n_validation=0), RULE, ("0",)) is None


def test_digits_are_normalised_training_scenes() -> None:
    pixels, label = TrainingDigits(4, RULE.mean, RULE.std).draw(3, 0)
    again, _ = TrainingDigits(4, RULE.mean, RULE.std).draw(3, 7)
    assert pixels.shape == (3, 112, 112)
    assert -1 <= float(pixels.min()) < float(pixels.max()) <= 1
    assert 0 <= label <= 9
    assert torch.equal(pixels, again)
