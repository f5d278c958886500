import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from training.data.digits import draw
from training.data.folders import UnreadableImage, read_labels
from training.data.preprocessing import InputRule
from training.data.sources import (
    REFERENCE_INPUT,
    FolderImages,
    check_classes,
    open_source,
    pixel_batches,
    published_data,
    run_data,
)

RULE = InputRule(height=16, width=16, resize_shorter_side=16)
IMAGENET_LABELS = ("n00 other", "n02-blue sky, deep sky", "n01-red rose")


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


@pytest.mark.parametrize("name", [".ipynb_checkpoints", ".git", "__MACOSX", "@eaDir"])
def test_hidden_and_system_folders_are_no_classes(folder: Path, name: str) -> None:
    for parent in (folder, folder / "n01-red"):
        (parent / name).mkdir()
        Image.new("RGB", (20, 20)).save(parent / name / "0-checkpoint.png")
    Image.new("RGB", (20, 20)).save(folder / "n01-red" / "._0.png")
    (folder / ".DS_Store").write_bytes(b"x")
    source = FolderImages(folder, RULE)
    assert source.labels == ["n01-red", "n02-blue"]
    assert len(source) == 6


def test_a_folder_without_images_is_no_class_and_is_named_where_classes_are_missing(folder: Path) -> None:
    (folder / "n00-empty").mkdir()
    (folder / "n00-empty" / "notes.txt").write_text("none yet")
    source = FolderImages(folder, RULE)
    check_classes(2, source)
    assert [source[i][1] for i in range(6)] == [0, 0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match=r"val has 2 classes, the model 3 outputs: n01-red, n02-blue; .*: n00-empty;"):
        check_classes(3, source)


def test_one_folder_is_one_class(folder: Path) -> None:
    shutil.rmtree(folder / "n02-blue")
    source = FolderImages(folder, RULE)
    assert (source.labels, [source[i][1] for i in range(3)]) == (["n01-red"], [0, 0, 0])


def test_folder_without_class_folders_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "0.png")
    with pytest.raises(FileNotFoundError, match=r"no subfolder with images; expected .*/<class>/<image>"):
        FolderImages(tmp_path, RULE)


@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize("data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_a_corrupt_image_is_named_in_one_line(folder: Path, n_workers: int, data: bytes) -> None:
    (folder / "n02-blue" / "1.png").write_bytes(data)
    with pytest.raises(UnreadableImage) as caught:
        list(pixel_batches(FolderImages(folder, RULE), 2, n_workers))
    message = str(caught.value)
    assert message.startswith(f"{folder / 'n02-blue' / '1.png'} cannot be read: ")
    assert "\n" not in message
    assert "Traceback" not in message


def test_labels_give_a_part_of_the_classes_their_indices(folder: Path) -> None:
    by_name = FolderImages(folder, RULE, labels=("green", "n02-blue", "n01-red"))
    by_synset = FolderImages(folder, RULE, labels=IMAGENET_LABELS)
    for source in (by_name, by_synset):
        assert [source[i][1] for i in range(6)] == [2, 2, 2, 1, 1, 1]
        check_classes(3, source)
    assert by_synset.labels == list(IMAGENET_LABELS)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("n02-blue", "red"), r"folders that no label names: n01-red; labels: n02-blue, red"),
        (("n01-red", "n01-red", "n02-blue"), "n01-red .*2 labels have that name"),
        (("green",), "expected two: that name, and the negative class"),
    ],
)
def test_folders_without_one_label_are_named(folder: Path, labels: Sequence[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FolderImages(folder, RULE, labels=labels)


def test_one_label_makes_the_other_folder_negative(folder: Path) -> None:
    source = FolderImages(folder, RULE, labels=("n01-red",))
    assert [source[i][1] for i in range(6)] == [1, 1, 1, 0, 0, 0]
    check_classes(1, source)


def test_labels_of_digits_are_their_own() -> None:
    with pytest.raises(ValueError, match="digits has labels of its own, 0, 1, 2"):
        open_source("digits", REFERENCE_INPUT, 1, labels=("a", "b"))


@pytest.mark.parametrize(
    "text",
    [
        "tench\ngoldfish\n\n",
        "\ufefftench\r\ngoldfish",
        '["tench", "goldfish"]',
        '{"1": "goldfish", "0": "tench"}',
        '{"model_type": "vit", "id2label": {"0": "tench", "1": "goldfish"}}',
        '{"architecture": "vit_tiny_patch16_224", "label_names": ["tench", "goldfish"]}',
    ],
)
def test_label_files_of_each_kind_are_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "labels").write_text(text, encoding="utf-8", newline="")
    assert read_labels(tmp_path / "labels") == ("tench", "goldfish")


def test_class_index_of_imagenet_gives_synsets(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text('{"0": ["n01440764", "tench"]}')
    assert read_labels(tmp_path / "labels.json") == ("n01440764 tench",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no labels"),
        ("a\n\nb", "label 1 is ''"),
        ("[1, 2]", "label 0 is 1"),
        ('{"cat": 0}', "key 'cat'; expected the indices 0 … 0"),
        ('{"0": "a", "2": "b"}', "key '2'; expected the indices 0 … 1"),
        ("[", "is no JSON"),
    ],
)
def test_a_wrong_label_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "labels").write_text(text)
    with pytest.raises(ValueError, match=rf"labels.*{message}"):
        read_labels(tmp_path / "labels")


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({}, "digits"),
        ({"data": {"source": "digits", "validation": None}}, "digits"),
        ({"data": {"source": "pets/train", "validation": "pets/val"}}, "pets/val"),
    ],
)
def test_a_run_is_measured_on_its_own_validation_images(recipe: dict[str, Any], expected: str) -> None:
    assert run_data(recipe) == expected


def test_data_that_nothing_names_is_required() -> None:
    with pytest.raises(ValueError, match=r"learned from pets/train .* expected --data FOLDER"):
        run_data({"data": {"source": "pets/train", "validation": None}})
    with pytest.raises(ValueError, match=r"measured on pets, .* expected --data FOLDER"):
        published_data({"training": {"dataset": "pets"}})
    reference = json.loads(Path("model_store/reference/5/manifest.json").read_text())
    assert published_data(reference) == "digits"
