"""Calibration: what is inside a bound, how trials race, and the command on a tiny model."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file

from tests.training.commands import dtem
from tests.training.tiny_vit import ARGUMENTS, tiny_vit
from training.cli import calibrate
from training.cli.model_options import newest_version
from training.cli.options import ModelOptions
from training.data.digits import draw
from training.data.sources import REFERENCE_INPUT
from training.evaluate import calibrate as calibration
from training.evaluate.calibrate import (
    PairedEvaluator,
    Trial,
    attempt,
    images_to_show,
    is_within_bound,
    read_trials,
    resolution_points,
    search,
)
from training.evaluate.paired import PairedCounts
from training.merging.adaptive import Thresholds
from training.models.calibration import CalibrationMismatch, adaptive_model, load_calibration
from training.models.classifier import AdaptiveClassifier
from training.models.embedding import DecoupledEmbedding, EmbeddingConfig


def counts(n_images: int, n_lost: int, n_won: int) -> PairedCounts:
    return PairedCounts(n_images - n_lost - n_won, n_lost, n_won, 0)


@pytest.mark.parametrize(
    ("n_lost", "n_won", "drop", "expected"),
    [
        (0, 0, 0.0, True),
        (0, 5, 0.0, True),
        (1, 0, 0.0, False),
        (1, 1, 0.0, False),  # as many won as lost, but it may be luck
        (1, 9, 0.0, True),
        (1, 0, 0.5, True),
        (9, 0, 0.5, False),  # 0.45 points lost, and the interval ends past 0.5
    ],
)
def test_bound_applies_to_the_interval_of_the_loss(n_lost: int, n_won: int, drop: float, expected: bool) -> None:
    assert is_within_bound(counts(2000, n_lost, n_won), drop) is expected


def test_resolution_is_the_end_of_the_interval_where_nothing_changed() -> None:
    assert resolution_points(2000) == pytest.approx(100 * 1.959964 * math.sqrt(1 / 2002) / math.sqrt(2002), rel=1e-4)
    assert resolution_points(4000) < resolution_points(2000) / 1.9


class FakeEvaluator:
    """A model with costs alpha + floor, and 40 wrong answers below a limit."""

    depth, unmerged_gmacs = 12, 2.0

    def __init__(self, n_images: int = 2000, limit: float = 1.2) -> None:
        self.n_images, self.limit = n_images, limit
        self.is_right = np.ones(n_images, bool)
        self.n_evaluated: list[int] = []
        self.noise = np.random.default_rng(0).normal(0, 0.01, n_images)

    def __len__(self) -> int:
        return self.n_images

    def evaluate(self, found: Thresholds, first: int, last: int) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        self.n_evaluated.append(last - first)
        cost = found.alpha + found.floor
        is_right = np.ones(self.n_images, bool)
        is_right[: 40 if cost < self.limit else 0] = False
        return is_right[first:last], cost + self.noise[first:last]


def flat(level: float) -> Thresholds:
    return Thresholds(level, 0.0, level, 12)


def try_out(evaluator: FakeEvaluator, level: float, drop: float, best_costs: Any = None) -> Trial:
    trial, costs = attempt(evaluator, flat(level), drop, best_costs)  # type: ignore[arg-type]
    assert len(costs) == trial.n_images == sum(evaluator.n_evaluated)
    return trial


def test_trial_within_the_bound_uses_all_images_in_growing_parts() -> None:
    evaluator = FakeEvaluator()
    trial = try_out(evaluator, 0.9, 0.0)
    assert evaluator.n_evaluated == [128, 128, 256, 512, 976]
    assert (trial.is_within_bound, trial.n_images) == (True, 2000)
    assert trial.gmacs == pytest.approx(1.8, abs=1e-3)


def test_trial_outside_the_bound_stops_after_the_first_part() -> None:
    evaluator = FakeEvaluator()
    trial = try_out(evaluator, 0.5, 0.0)
    assert (evaluator.n_evaluated, trial.is_within_bound, trial.counts.n_only_base) == ([128], False, 40)


def test_trial_that_loses_less_than_the_bound_continues() -> None:
    assert try_out(FakeEvaluator(), 0.5, 3.0).n_images == 2000


def test_trial_more_expensive_than_the_best_stops_and_is_extrapolated() -> None:
    evaluator = FakeEvaluator()
    _, best_costs = attempt(evaluator, flat(0.8), 0.0)  # type: ignore[arg-type]
    evaluator.n_evaluated.clear()
    trial = try_out(evaluator, 0.9, 0.0, best_costs)
    assert evaluator.n_evaluated == [128]
    assert trial.is_within_bound
    assert trial.gmacs == pytest.approx(1.8, rel=1e-3)


def test_search_comes_close_to_the_best_and_repeats_itself() -> None:
    trials: list[Trial] = []
    best = search(FakeEvaluator(), 0.0, n_trials=200, seed=1, on_trial=trials.append)  # type: ignore[arg-type]
    assert len(trials) == 200
    assert best.is_within_bound
    assert 1.2 <= best.thresholds.alpha + best.thresholds.floor < 1.3
    assert best.n_images == 2000
    again = search(FakeEvaluator(), 0.0, n_trials=200, seed=1)  # type: ignore[arg-type]
    assert again == best
    other = search(FakeEvaluator(), 0.0, n_trials=200, seed=2)  # type: ignore[arg-type]
    assert other.thresholds != best.thresholds


def test_split_depth_may_be_fixed() -> None:
    trials: list[Trial] = []
    search(FakeEvaluator(), 0.0, n_trials=40, seed=1, split_depth=3, on_trial=trials.append)  # type: ignore[arg-type]
    assert {trial.thresholds.split_depth for trial in trials} == {3}
    assert len(trials) == 40


def test_search_resumed_from_known_trials_has_the_same_result() -> None:
    trials: list[Trial] = []
    best = search(FakeEvaluator(), 0.0, n_trials=100, seed=1, on_trial=trials.append)  # type: ignore[arg-type]
    more: list[Trial] = []
    evaluator: Any = FakeEvaluator()
    assert search(evaluator, 0.0, n_trials=100, seed=1, known=trials[:70], on_trial=more.append) == best
    assert more == trials[70:]


def test_search_without_a_trial_within_the_bound_is_refused() -> None:
    evaluator: Any = FakeEvaluator(limit=3.0)
    with pytest.raises(ValueError, match=r"max_accuracy_drop 0\.0: none of 20 trials stays within it"):
        search(evaluator, 0.0, n_trials=20, seed=1)


def scenes(n_images: int) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = [draw("validation", index) for index in range(n_images)]
    pixels = torch.stack([torch.from_numpy(scene.image) for scene in drawn])
    return pixels, torch.tensor([scene.label for scene in drawn])


@pytest.mark.parametrize("is_labelled", [True, False])
def test_evaluator_pairs_each_image_with_the_unmerged_model(is_labelled: bool) -> None:
    pixels, labels = scenes(40)
    vit, limits = tiny_vit(), Thresholds(0.9, 0.05, 0.5, 2)
    evaluator = PairedEvaluator(
        vit, REFERENCE_INPUT, "features", None, pixels, labels if is_labelled else None, n_parallel=2
    )

    def run(found: Thresholds) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            logits, _, gmacs = AdaptiveClassifier(adaptive_model(vit, found, "features"), REFERENCE_INPUT).eval()(
                pixels
            )
        return logits, gmacs

    unmerged, _ = run(flat(2.0))
    merged, gmacs = run(limits)
    right = labels if is_labelled else unmerged.argmax(1)
    two = unmerged.sort(1).values[:, -2:]
    order = (two[:, 1] - two[:, 0]).argsort(stable=True)  # the least sure come first
    is_right, costs = evaluator.evaluate(limits, 5, 33)
    assert is_right.tolist() == (merged.argmax(1) == right)[order][5:33].tolist()
    assert evaluator.is_right.tolist() == (unmerged.argmax(1) == right)[order].tolist()
    np.testing.assert_allclose(costs, gmacs[order][5:33], rtol=1e-6)
    found = evaluator.measured(limits, "some", "split")
    assert found.difference_points == pytest.approx(
        100 * float(((merged.argmax(1) == right).double() - (unmerged.argmax(1) == right).double()).mean())
    )
    assert found.gmacs == pytest.approx(float(gmacs.mean()), rel=1e-6)
    assert found.is_labelled is is_labelled


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrate once, and return the folder of the files that the command wrote."""
    folder = tmp_path_factory.mktemp("calibrated")
    assert dtem("calibrate", command_in(folder)) == 0
    return folder / "found"


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    return command_in(tmp_path)


def command_in(tmp_path: Path) -> list[str]:
    save_file(tiny_vit().state_dict(), tmp_path / "weights.safetensors")
    model = ["--architecture", "vit_tiny_patch16_224", "--weights", str(tmp_path / "weights.safetensors")]
    data = ["--data", "digits", "--n-images", "60", "--n-unseen", "20", "--n-trials", "20", "--max-accuracy-drop", "20"]
    return [*model, "--arguments", json.dumps(ARGUMENTS), *data, "--out", str(tmp_path / "found" / "atm")]


def test_command_writes_a_calibration_a_picture_and_its_trials_and_repeats_itself(
    calibrated: Path, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert dtem("calibrate", command) == 0
    table = capsys.readouterr().out
    found = load_calibration(tmp_path / "found" / "atm.json")
    assert (found.policy, found.metric, found.n_trials, found.max_accuracy_drop) == ("atm", "features", 20, 20)
    assert (found.calibrated.split, found.calibrated.n_images) == ("validation", 60)
    assert (found.unseen.split, found.unseen.n_images) == ("test", 20)
    assert found.calibrated.gmacs < found.calibrated.unmerged_gmacs
    assert f"{found.calibrated.gmacs:.3f}" in table
    assert len(read_trials(tmp_path / "found" / "atm.trials.jsonl")) == 20
    with Image.open(tmp_path / "found" / "atm.png") as picture:
        assert picture.width > 500
    assert (calibrated / "atm.json").read_bytes() == (tmp_path / "found" / "atm.json").read_bytes()


def test_interrupted_command_resumes_to_the_same_file(
    calibrated: Path, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Trial] = []

    def interrupted(*arguments: Any) -> Any:
        if len(made) == 7:
            raise KeyboardInterrupt
        trial, costs = attempt(*arguments)
        made.append(trial)
        return trial, costs

    monkeypatch.setattr(calibration, "attempt", interrupted)
    assert dtem("calibrate", command) == 130
    log = tmp_path / "found" / "atm.trials.jsonl"
    log.write_text(log.read_text() + '{"thresholds": {"alp')  # a line cut short
    monkeypatch.setattr(calibration, "attempt", attempt)
    assert dtem("calibrate", command) == 0
    assert (tmp_path / "found" / "atm.json").read_bytes() == (calibrated / "atm.json").read_bytes()
    assert len(read_trials(log)) == 20


def test_without_a_model_it_is_the_newest_reference_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[ModelOptions] = []

    def stop(model: ModelOptions) -> None:
        seen.append(model)
        raise ValueError("enough")

    monkeypatch.setattr(calibrate, "chosen_model", stop)
    assert dtem("calibrate", ["--max-accuracy-drop", "0.0"]) == 2
    newest = newest_version(Path("model_store/reference"))
    assert newest is not None
    assert seen[0].published == newest
    assert (newest / "atm.json").is_file()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)  # where there is no store
    assert dtem("calibrate", []) == 2
    assert "expected exactly one of --run, --published, --weights" in capsys.readouterr().err


def test_trials_of_another_search_are_refused(
    calibrated: Path, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(calibrated, tmp_path / "found")
    assert dtem("calibrate", [*command, "--seed", "5"]) == 2
    assert "was written by a search with other options" in capsys.readouterr().err


def test_embedding_is_calibrated_as_adaptive_dtem(command: list[str], tmp_path: Path) -> None:
    torch.manual_seed(3)
    own = DecoupledEmbedding(EmbeddingConfig(depth=3, width=32, dim=8, r=30))
    own.save(tmp_path / "own.safetensors")
    plan = [*command, "--metric", "embedding", "--embedding", str(tmp_path / "own.safetensors"), "--unlabelled"]
    assert dtem("calibrate", plan) == 0
    found = load_calibration(tmp_path / "found" / "atm.json")
    assert (found.policy, found.calibrated.is_labelled) == ("adaptive-dtem", False)
    assert found.model(tiny_vit(), own).metric is own
    torch.nn.init.zeros_(next(own.parameters()))
    with pytest.raises(CalibrationMismatch, match="calibrated for embedding"):
        found.model(tiny_vit(), own)
    with pytest.raises(CalibrationMismatch, match="needs the embedding"):
        found.model(tiny_vit())


def test_folder_is_divided_into_images_of_the_search_and_of_the_report(command: list[str], tmp_path: Path) -> None:
    for index in range(30):
        folder = tmp_path / "val" / f"class{index % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw("test", index).image).save(folder / f"{index}.png")
    data = ["--data", str(tmp_path / "val"), "--n-images", "20", "--n-unseen", "10"]
    assert dtem("calibrate", [*command, *data]) == 0
    found = load_calibration(tmp_path / "found" / "atm.json")
    assert (found.calibrated.split, found.unseen.split) == ("val (calibration part)", "val (unseen part)")
    assert (found.calibrated.n_images, found.unseen.n_images) == (20, 10)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--n-images", "0"], "0 is not in the range x>=1"),
        (["--max-accuracy-drop", "-1"], "--max-accuracy-drop -1.0: expected at least 0"),
        (["--max-accuracy-drop", "nan"], "--max-accuracy-drop nan"),
        (["--split-depth", "4"], "--split-depth 4: expected from 0 to the ViT's 3 blocks"),
        (["--split", "test"], "calibrate on train or validation"),
        (["--metric", "embedding"], "--metric embedding needs an embedding"),
        (["--data", "FOLDER", "--n-unseen", "500"], "has 3 images; 60 to calibrate and 500"),
        (["--data", "FOLDER", "--n-images", "2", "--n-unseen", "1"], "has 1 classes, the model 10 outputs"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(
    command: list[str], tmp_path: Path, extra: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "few" / "all").mkdir(parents=True)
    for index in range(3):
        Image.fromarray(draw("test", index).image).save(tmp_path / "few" / "all" / f"{index}.png")
    extra = [str(tmp_path / "few") if word == "FOLDER" else word for word in extra]
    assert dtem("calibrate", [*command, *extra]) == 2
    assert message in capsys.readouterr().err


def test_calibration_of_other_weights_or_another_file_is_refused(calibrated: Path, tmp_path: Path) -> None:
    file = tmp_path / "atm.json"
    shutil.copy(calibrated / "atm.json", file)
    found = load_calibration(file)
    other: Any = tiny_vit()
    torch.nn.init.ones_(other.head.bias)
    with pytest.raises(CalibrationMismatch, match=r"calibrated for weights .* calibrate anew"):
        found.model(other)
    replace(found, metric="keys").save(file)
    assert load_calibration(file).metric == "keys"
    content = json.loads(file.read_text())
    for change in (
        {"format": "other"},
        {"metric": "values"},
        {"policy": "adaptive-dtem"},
        {"thresholds": {"alpha": 1}},
    ):
        file.write_text(json.dumps({**content, **change}))
        with pytest.raises(CalibrationMismatch, match="is not a calibration"):
            load_calibration(file)
    file.write_text("[]")
    with pytest.raises(CalibrationMismatch, match="is not a calibration"):
        load_calibration(file)
    with pytest.raises(FileNotFoundError):
        load_calibration(tmp_path / "none.json")


@pytest.mark.parametrize("points", [0.1, 0.25, 1.0])
def test_images_to_show_a_bound_are_the_fewest(points: float) -> None:
    n_images = images_to_show(points)
    assert resolution_points(n_images) <= points < resolution_points(n_images - 1)


@pytest.mark.parametrize(
    ("drop", "n_images", "message"),
    [
        (1.0, 200, "warning: on 200 images, a loss of up to 2 points counts as within the bound of 1; 78"),
        (1.0, 1000, "on 1000 images, a loss of up to 1.2 points counts as within the bound"),
        (0.0, 200, "warning: on 200 images, a loss of up to 0.97 points counts as within the bound of 0; 19"),
        (0.0, 2000, "on 2000 images, a loss of up to 0.098 points counts as within the bound"),
    ],
)
def test_bound_that_the_images_cannot_show_warns(drop: float, n_images: int, message: str) -> None:
    assert calibrate.shown_bound(drop, n_images).startswith(message)
