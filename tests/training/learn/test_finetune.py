import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.commands import dtem
from tests.training.learn.tiny_run import FINETUNE, RULE, logged, write_run
from training.cli.model_options import chosen_model
from training.cli.options import ModelOptions
from training.learn.finetune import FinetuneTraining
from training.learn.image_training import ImageTraining
from training.learn.images import Validation, training_images, validation_images
from training.learn.parameter_groups import layerwise_groups
from training.learn.processes import Processes
from training.learn.recipe import FinetuneRecipe, read_recipe
from training.models.vit import load_vit

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> FinetuneRecipe:
    recipe = read_recipe(write_run(tmp_path_factory.mktemp("finetune"), FINETUNE))
    assert isinstance(recipe, FinetuneRecipe)
    return recipe


def training(recipe: FinetuneRecipe, out: Path) -> FinetuneTraining:
    images = training_images(recipe.data, RULE, recipe.seed)
    validation = validation_images(recipe.data, RULE, images.classes)
    return FinetuneTraining(recipe, images, out, validation=validation, processes=Processes(), n_workers=0)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_run_stopped_within_an_epoch_resumes_bit_identically(
    recipe: FinetuneRecipe, tmp_path: Path, ema: float | None
) -> None:
    recipe = replace(recipe, ema=ema)
    assert training(recipe, tmp_path / "whole").run(checkpoint_every=2)
    assert not training(recipe, tmp_path / "halved").run(checkpoint_every=2, until=7)
    assert training(recipe, tmp_path / "halved").run(checkpoint_every=2)
    assert logged(tmp_path / "halved") == logged(tmp_path / "whole")
    for name in ("weights.safetensors", "recipe.json", "labels.json"):
        assert (tmp_path / "halved" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    validated = [entry["n_seen"] for entry in logged(tmp_path / "whole") if "validation_top1" in entry]
    # An epoch has 40 images, a step 12.
    assert validated == [48, 84, 120]


def test_best_weights_are_written_also_where_a_run_resumes(
    recipe: FinetuneRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: list[dict[str, torch.Tensor]] = []
    found: Iterator[float] = iter([0.5, 0.75, 0.25])

    def validate(run: FinetuneTraining, _: Validation) -> float:
        weights.append({name: tensor.clone() for name, tensor in run.written.state_dict().items()})
        return next(found)

    monkeypatch.setattr(ImageTraining, "validate", validate)
    training(recipe, tmp_path).run(checkpoint_every=1, until=8)
    training(recipe, tmp_path).run(checkpoint_every=1)
    written = load_file(tmp_path / "weights.safetensors")
    assert [all(torch.equal(tensor, written[name]) for name, tensor in one.items()) for one in weights] == [
        False,
        True,
        False,
    ]


def test_head_is_new_and_the_rest_is_that_of_the_file(recipe: FinetuneRecipe, tmp_path: Path) -> None:
    run = training(recipe, tmp_path)
    given = load_file(str(recipe.weights))
    assert run.recipe.arguments["num_classes"] == 4
    for name, tensor in run.vit.state_dict().items():
        if name.startswith("head"):
            assert not tensor.any()
        else:
            assert torch.equal(tensor, given[name]), name


def test_written_weights_are_the_average(recipe: FinetuneRecipe, tmp_path: Path) -> None:
    run = training(replace(recipe, ema=0.9, n_images=24, epochs=0), tmp_path)
    first = run.vit.head.weight.detach().clone()
    run.run(until=1)
    one = run.vit.head.weight.detach().clone()
    run = training(replace(recipe, ema=0.9, n_images=24, epochs=0), tmp_path)
    run.run()
    # The first step sets the average; the second moves it by 1 - (1 + 1) / (10 + 1).
    expected = one + (run.vit.head.weight - one) * 9 / 11
    assert not torch.equal(first, one)
    assert torch.allclose(load_file(tmp_path / "weights.safetensors")["head.weight"], expected, atol=1e-6)


def test_loss_falls_on_a_folder_from_scratch(recipe: FinetuneRecipe, tmp_path: Path) -> None:
    data = replace(recipe.data, mixup=0.0, label_smoothing=0.0, validation=None)
    training(replace(recipe, weights=None, epochs=12, drop_path=0.0, data=data), tmp_path).run(checkpoint_every=1000)
    losses = [entry["vit_loss"] for entry in logged(tmp_path) if "vit_loss" in entry]
    assert losses[0] == pytest.approx(1.386, abs=0.01)
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_number_of_classes_that_the_images_do_not_have_is_refused(recipe: FinetuneRecipe, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_classes 7: the images have 4 classes; leave it out"):
        training(replace(recipe, arguments={**recipe.arguments, "num_classes": 7}), tmp_path)


def test_weights_that_are_no_vit_are_refused(recipe: FinetuneRecipe, tmp_path: Path) -> None:
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"other\.safetensors"):
        training(replace(recipe, weights=str(tmp_path / "other.safetensors")), tmp_path)


def test_learning_rate_is_lower_in_earlier_blocks() -> None:
    vit = load_vit("vit_tiny_patch16_224", depth=2, num_classes=3)
    names = {id(parameter): name for name, parameter in vit.named_parameters()}
    found = {
        names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
        for group in layerwise_groups(vit, 0.1, 0.5)
        for parameter in group["params"]
    }
    assert found.keys() == set(names.values())
    assert found["head.weight"] == (1, 0.1)
    assert found["norm.weight"] == (1, 0)
    assert found["blocks.1.attn.qkv.weight"] == (0.5, 0.1)
    assert found["blocks.0.attn.qkv.bias"] == (0.25, 0)
    assert found["patch_embed.proj.weight"] == (0.125, 0.1)
    assert found["cls_token"] == found["pos_embed"] == (0.125, 0)


def test_run_from_a_timm_folder_is_read_by_the_other_commands(tmp_path: Path) -> None:
    """With the preprocessing that the folder states, and the labels of the images."""
    file = write_run(tmp_path, FINETUNE, weights=f'weights = "{tmp_path}/given"', epochs="epochs = 1")
    (tmp_path / "given").mkdir()
    (tmp_path / "vit.safetensors").rename(tmp_path / "given" / "model.safetensors")
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 4,
        "model_args": {"img_size": 64, "embed_dim": 32, "depth": 3, "num_heads": 2},
        "pretrained_cfg": {"mean": [0.1] * 3, "std": [0.2] * 3, "crop_pct": 1.0},
    }
    (tmp_path / "given" / "config.json").write_text(json.dumps(config))
    (tmp_path / "train" / "dog").rename(tmp_path / "elk")
    (tmp_path / "val" / "dog").rename(tmp_path / "elk2")
    assert dtem("learn", ["--recipe", str(file), "--out", str(tmp_path / "run"), "--workers", "0"]) == 0
    chosen = chosen_model(ModelOptions(run=tmp_path / "run"))
    assert (chosen.n_outputs, chosen.labels, chosen.data) == (3, ("ant", "bee", "cat"), str(tmp_path / "val"))
    assert (chosen.rule.mean, chosen.rule.std) == ((0.1,) * 3, (0.2,) * 3)
    written = load_file(tmp_path / "run" / "weights.safetensors")
    assert all(torch.equal(tensor, written[name]) for name, tensor in chosen.vit.state_dict().items())
