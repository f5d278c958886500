import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.learn.tiny_run import logged
from training.data.digits import Task
from training.learn import backbone
from training.learn.backbone import BackboneTraining, learning_rate, sincos_positions
from training.learn.recipe import Optimiser, Recipe, Stage
from training.learn.scenes import BACKGROUND, batches
from training.models.vit import load_vit

EASY = Task(light_on_dark=True, photo_percent=0, texture_percent=0, max_clutter=0, min_digit_pixels=40)
OPTIMISER = Optimiser(
    batch_size=8,
    warmup_images=16,
    weight_decay=0.05,
    clip_norm=1.0,
    label_smoothing=0.0,
)
RECIPE = Recipe(
    file="tiny.toml",
    seed=3,
    architecture="vit_tiny_patch16_224",
    arguments={"img_size": 112, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10},
    optimiser=OPTIMISER,
    stages=(
        Stage("few patches", 24, (1e-3, 8e-4), kept_patches=20, token_label_weight=0.5, task=EASY),
        Stage("every patch", 24, (8e-4, 1e-5), kept_patches=196, token_label_weight=0.0, task=EASY),
    ),
)


def weights(run: BackboneTraining) -> dict[str, torch.Tensor]:
    return dict(run.modules.state_dict())


def train(folder: Path, recipe: Recipe = RECIPE) -> BackboneTraining:
    run = BackboneTraining(recipe, folder, n_workers=0)
    run.run(checkpoint_every=8)
    return run


@pytest.fixture(autouse=True)
def quick_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    validate = BackboneTraining.validate
    monkeypatch.setattr(BackboneTraining, "validate", lambda run, n_images=10: validate(run, 10))


@pytest.mark.parametrize("n_steps", [2, 4])
def test_interrupted_run_resumes_bit_identically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_steps: int) -> None:
    whole = train(tmp_path / "whole")
    step, taken = BackboneTraining.step, 0

    def failing_step(run: BackboneTraining, *arguments: Any) -> dict[str, float]:
        nonlocal taken
        if taken == n_steps:
            raise KeyboardInterrupt
        taken += 1
        return step(run, *arguments)

    monkeypatch.setattr(BackboneTraining, "step", failing_step)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "halved")
    monkeypatch.setattr(BackboneTraining, "step", step)
    resumed = train(tmp_path / "halved")
    assert resumed.n_seen == whole.n_seen == 48
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name]), name
    assert logged(tmp_path / "halved") == logged(tmp_path / "whole")


def test_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    run = train(tmp_path)
    before = {name: tensor.clone() for name, tensor in weights(run).items()}
    log = logged(tmp_path)
    again = train(tmp_path)
    assert logged(tmp_path) == log
    assert [entry["n_seen"] for entry in log if "validation_top1" in entry] == [8, 16, 24, 32, 40, 48]
    assert all(torch.equal(tensor, weights(again)[name]) for name, tensor in before.items())


def test_run_of_another_recipe_is_refused(tmp_path: Path) -> None:
    train(tmp_path)
    other = replace(RECIPE, seed=4)
    with pytest.raises(ValueError, match="another recipe"):
        train(tmp_path, other)


def test_checkpoint_is_enough_to_rebuild_the_model(tmp_path: Path) -> None:
    run = train(tmp_path)
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    vit = load_vit(recipe["architecture"], weights=tmp_path / "weights.safetensors", **recipe["arguments"])
    for name, tensor in run.vit.state_dict().items():
        assert torch.equal(tensor, vit.state_dict()[name])


def test_log_has_losses_and_validation(tmp_path: Path) -> None:
    train(tmp_path)
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [entry["n_seen"] for entry in entries if "loss" in entry] == [8, 16, 24, 32, 40, 48]
    assert all(0 <= entry["validation_top1"] <= 1 for entry in entries if "validation_top1" in entry)


def test_training_overfits_one_batch(tmp_path: Path) -> None:
    stage = replace(RECIPE.stages[0], learning_rate=(3e-3, 3e-3))
    recipe = replace(RECIPE, optimiser=replace(OPTIMISER, warmup_images=8), stages=(stage,))
    run = BackboneTraining(recipe, tmp_path, n_workers=0)
    batch = next(batches(EASY, first=0, n_images=8, batch_size=8, patch_pixels=8, kept_patches=20, n_workers=0))
    losses = []
    for _ in range(40):
        run.n_seen = 8
        losses.append(run.step(batch, stage)["loss"])
    assert losses[-1] < 0.3 * losses[0]


def test_loss_that_is_not_finite_ends_the_run_before_its_step(tmp_path: Path) -> None:
    run = train(tmp_path)
    with torch.no_grad():
        run.vit.head.bias[0] = float("nan")
    before = {name: tensor.clone() for name, tensor in weights(run).items()}
    batch = next(batches(EASY, first=0, n_images=8, batch_size=8, patch_pixels=8, kept_patches=20, n_workers=0))
    with pytest.raises(ValueError, match="step 7: the loss is nan"):
        run.step(batch, RECIPE.stages[0])
    assert all(torch.equal(tensor.nan_to_num(), weights(run)[name].nan_to_num()) for name, tensor in before.items())


def test_kept_patches_hold_the_digit_and_token_labels_name_it() -> None:
    (batch,) = batches(EASY, first=5, n_images=4, batch_size=4, patch_pixels=8, kept_patches=40, n_workers=0)
    for image in range(4):
        digit = batch.token_labels[image] != BACKGROUND
        assert (batch.token_labels[image][digit] == batch.labels[image]).all()
        assert 4 <= int(digit.sum()) <= 40
        assert len(set(batch.kept[image].tolist())) == 40
        cells = batch.images[image].reshape(14, 8, 14, 8, 3).amax((1, 3, 4)).flatten()
        assert cells[batch.kept[image][digit]].min() > 150  # light ink in each


def test_learning_rate_warms_up_and_follows_its_stages() -> None:
    rates = [learning_rate(n_seen, RECIPE) for n_seen in range(0, 49, 4)]
    assert rates[0] == pytest.approx(5e-4)  # half warm
    assert rates[1] == pytest.approx(7.4e-4, rel=0.02)
    assert rates[6] == pytest.approx(8e-4)  # the second stage begins
    assert all(later < earlier for earlier, later in pairwise(rates[2:]))
    assert rates[-1] == pytest.approx(1e-5)
    assert learning_rate(10**6, RECIPE) == pytest.approx(1e-5)


def test_sincos_positions_are_nearer_for_neighbours() -> None:
    positions = sincos_positions(14, 128)
    middle = positions[7 * 14 + 7]
    similarity = (positions @ middle).reshape(14, 14)
    assert similarity.argmax() == 7 * 14 + 7
    assert similarity[7, 8] > similarity[7, 10] > similarity[7, 13]
    assert similarity[8, 7] == pytest.approx(float(similarity[7, 8]), rel=1e-4)


def test_normalised_pixels_have_the_channels_first() -> None:
    image = torch.tensor([[[[0, 128, 255]]]], dtype=torch.uint8)
    expected = [(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert backbone.normalised(image).flatten().tolist() == pytest.approx(expected)
