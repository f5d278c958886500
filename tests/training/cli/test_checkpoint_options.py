"""The model that --weights and --architecture name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.tiny_vit import ARGUMENTS, tiny_vit
from training.cli.model_options import ChosenModel
from training.cli.model_options import chosen_model as chosen_with_data
from training.cli.options import ModelOptions
from training.models.vit import load_vit

NAME = "vit_tiny_patch16_224"


def chosen_model(**options: Any) -> ChosenModel:
    return chosen_with_data(ModelOptions(data="digits", **options))


def logits(vit: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = vit(torch.ones(1, 3, 112, 112))
    return found


@pytest.fixture
def timm_folder(tmp_path: Path) -> Path:
    torch.save(tiny_vit().state_dict(), tmp_path / "pytorch_model.bin")
    config = {
        "architecture": NAME,
        "num_classes": 10,
        "model_args": ARGUMENTS,
        "label_names": [f"class {index}" for index in range(10)],
        "pretrained_cfg": {"mean": [0.1] * 3, "std": [0.2] * 3, "crop_pct": 1.0},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("option", ["architecture", "weights"])
def test_folder_of_timm_is_a_model_with_its_labels_and_preprocessing(timm_folder: Path, option: str) -> None:
    prefix = "local-dir:" if option == "architecture" else ""
    chosen = chosen_model(**{option: f"{prefix}{timm_folder}"})
    assert (chosen.timm_name, chosen.timm_arguments) == (NAME, ARGUMENTS)
    assert chosen.labels == tuple(f"class {index}" for index in range(10))
    assert (chosen.rule.mean, chosen.rule.std) == ((0.1,) * 3, (0.2,) * 3)
    assert torch.equal(logits(chosen.vit), logits(tiny_vit()))


def test_checkpoint_alone_is_a_model_and_what_was_found_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model": {f"module.{name}": t for name, t in tiny_vit().state_dict().items()}}, tmp_path / "a.pth")
    chosen = chosen_model(weights=str(tmp_path / "a.pth"), arguments={"num_heads": 2})
    assert torch.equal(logits(chosen.vit), logits(tiny_vit()))
    rebuilt = load_vit(chosen.timm_name, **chosen.timm_arguments).eval()
    rebuilt.load_state_dict(chosen.vit.state_dict())
    assert torch.equal(logits(rebuilt), logits(tiny_vit()))
    said = capsys.readouterr().out
    for part in ("weights of 'model.module'", "a ViT with 2 heads", "no preprocessing stated"):
        assert part in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of --run, --published, --weights, not none"),
        ({"architecture": NAME}, "--architecture needs --weights"),
        ({"weights": "pretrained"}, "'pretrained' needs it"),
        ({"architecture": "local-dir:a", "weights": "b.pth"}, "has its own weights: leave --weights b.pth out"),
        ({"run": Path("runs/a"), "weights": "b.pth"}, "not --run and --weights"),
    ],
)
def test_options_that_name_no_model_or_several_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chosen_model(**options)


def test_missing_folder_is_refused() -> None:
    with pytest.raises(FileNotFoundError, match="no folder nowhere: local-dir:PATH names a folder"):
        chosen_model(architecture="local-dir:nowhere")
