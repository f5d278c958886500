"""What options of pixels, labels and data choose, and what they refuse before an image is read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.training.commands import dtem
from tests.training.tiny_vit import ARGUMENTS
from training.cli.model_options import chosen_model, chosen_source
from training.cli.options import ModelOptions
from training.data.sources import REFERENCE_INPUT
from training.models.vit import load_vit

NAME = "vit_tiny_patch16_224"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two folders, one file of which is no image: nothing here may read it."""
    for name in ("no", "yes"):
        (tmp_path / "pets" / "val" / name).mkdir(parents=True)
        Image.new("RGB", (160, 120)).save(tmp_path / "pets" / "val" / name / "0.png")
        (tmp_path / "pets" / "val" / name / "1.png").write_bytes(b"no image")
    return tmp_path / "pets" / "val"


def model_with(n_outputs: int, folder: Path, **options: Any) -> ModelOptions:
    arguments = {**ARGUMENTS, "depth": 1, "num_classes": n_outputs}
    torch.manual_seed(0)
    save_file(load_vit(NAME, **arguments).state_dict(), folder / "weights.safetensors")
    weights = str(folder / "weights.safetensors")
    return ModelOptions(architecture=NAME, weights=weights, arguments=arguments, **options)


def words(options: ModelOptions) -> list[str]:
    given = ["--architecture", NAME, "--weights", str(options.weights), "--arguments", json.dumps(options.arguments)]
    return [*given, "--data", str(options.data)]


def test_options_replace_the_pixels_of_the_weights_and_are_said(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = model_with(2, tmp_path, data=str(data), mean=(0.1, 0.2, 0.3), crop_pct=1.0, crop_mode="border")
    chosen = chosen_model(options)
    source = chosen_source(options, chosen)
    assert (chosen.rule.mean, chosen.rule.std, chosen.rule.crop) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5), "border")
    assert source[0][0].shape == (112, 112, 3)
    said = capsys.readouterr().out
    assert "pixels: 112x112 pixels, crop mode border, resized to 112x112, bicubic, mean 0.1,0.2,0.3" in said


def test_labels_keep_the_outputs_of_classes_that_the_data_lack(data: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("maybe\nyes\nno\n")
    options = model_with(3, tmp_path, data=str(data), labels=tmp_path / "labels.txt")
    source = chosen_source(options, chosen_model(options))
    assert list(source.labels) == ["maybe", "yes", "no"]
    assert source[0][1] == 2


def test_one_output_answers_the_second_folder_unless_a_label_names_the_first(data: Path, tmp_path: Path) -> None:
    options = model_with(1, tmp_path, data=str(data), activation="sigmoid")
    assert list(chosen_source(options, chosen_model(options)).labels) == ["yes"]
    (tmp_path / "labels.json").write_text('["no"]')
    options = model_with(1, tmp_path, data=str(data), activation="sigmoid", labels=tmp_path / "labels.json")
    source = chosen_source(options, chosen_model(options))
    assert (list(source.labels), source[0][1]) == (["no"], 1)


@pytest.mark.parametrize("command", ["export", "evaluate", "calibrate"])
@pytest.mark.parametrize(
    ("n_outputs", "extra", "message"),
    [
        (3, [], "val has 2 classes, the model 3 outputs: no, yes"),
        (1, [], "the model has 1 output, and a softmax over it is always 1: expected activation sigmoid"),
        (2, ["--mean", "123.675,116.28,103.53"], "mean [123.675, 116.28, 103.53]: expected three numbers from 0 to 1"),
        (2, ["--crop-pct", "87.5"], "crop_pct 87.5: expected a number above 0 and at most 1"),
        (2, ["--labels", "LABELS"], "has folders that no label names: no, yes; labels: cat, dog"),
    ],
)
def test_what_does_not_fit_is_refused_before_an_image_is_read(
    command: str,
    n_outputs: int,
    extra: list[str],
    message: str,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    extra = [str(tmp_path / "labels.txt") if word == "LABELS" else word for word in extra]
    extra += ["--name", "pets", "--store", str(tmp_path / "store")] if command == "export" else []
    extra += ["--out", str(tmp_path / "out")] if command != "export" else []
    extra += ["--n-images", "1", "--n-unseen", "1"] if command == "calibrate" else []
    assert dtem(command, [*words(model_with(n_outputs, tmp_path, data=str(data))), *extra]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "store").exists()


def test_data_that_nothing_names_is_required(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--architecture", NAME, "--weights", "nowhere.safetensors", "--out", str(tmp_path / "out")]
    assert dtem("evaluate", given) == 2
    assert capsys.readouterr().err.endswith(
        "--architecture needs --data: a folder with one subfolder per class, or 'digits'\n"
    )


def test_weights_alone_see_the_digits_as_the_reference_model_does(tmp_path: Path) -> None:
    assert chosen_model(model_with(10, tmp_path, data="digits")).rule == REFERENCE_INPUT
    overridden = chosen_model(model_with(10, tmp_path, data="digits", std=(0.5, 0.5, 0.5))).rule
    assert (overridden.mean, overridden.std) == (REFERENCE_INPUT.mean, (0.5, 0.5, 0.5))
