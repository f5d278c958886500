import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.training.learn.tiny_run import logged, tiny_recipe, tiny_training, write_run
from training.learn.learning_rate import half_cosine, warmup
from training.learn.losses import LOSSES


def test_cross_entropy_smooths_labels() -> None:
    logits, labels = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([1])
    smoothed = torch.tensor([[0.1, 0.8, 0.1]])
    found = LOSSES["cross-entropy"](logits, labels, label_smoothing=0.3)
    torch.testing.assert_close(found, -(smoothed * logits.log_softmax(1)).sum())


def test_one_entry_adds_a_loss_that_a_recipe_can_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def constant(logits: Tensor, targets: Tensor, *, label_smoothing: float) -> Tensor:
        return logits.sum() * 0 + 3

    monkeypatch.setitem(LOSSES, "constant", constant)
    recipe = tiny_recipe(write_run(tmp_path, seed='seed = 5\nloss = "constant"'))
    tiny_training(recipe, tmp_path / "run").run(until=1, checkpoint_every=1)
    assert logged(tmp_path / "run")[0]["embedding_loss"] == 3


def test_unknown_loss_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"recipe\.toml: loss 'hinge': expected one of cross-entropy"):
        tiny_recipe(write_run(tmp_path, seed='seed = 5\nloss = "hinge"'))


def test_run_from_before_there_were_losses_resumes(tmp_path: Path) -> None:
    recipe = tiny_recipe(write_run(tmp_path))
    tiny_training(recipe, tmp_path / "run").run(until=1, checkpoint_every=1)
    file = tmp_path / "run" / "recipe.json"
    old = json.loads(file.read_text())
    del old["loss"]
    file.write_text(json.dumps(old))
    resumed = tiny_training(recipe, tmp_path / "run")
    resumed.resume()
    assert resumed.n_steps_taken == 1
    with pytest.raises(ValueError, match="differs in seed"):
        tiny_training(replace(recipe, seed=6), tmp_path / "run").resume()


def test_schedule_warms_up_and_falls_to_its_end() -> None:
    assert [warmup(n, 4) for n in (0, 1, 4, 9)] == [0, 0.25, 1, 1]
    assert warmup(0, 0) == 1
    assert [half_cosine(share, 3.0, 1.0) for share in (0, 0.5, 1, 2)] == pytest.approx([3, 2, 1, 1])
