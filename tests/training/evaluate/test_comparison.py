import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.training.commands import dtem
from training.evaluate.paired import count_pairs
from training.evaluate.results import Row, write_evaluation

N_IMAGES = 200
ABOUT: dict[str, Any] = {"model": "runs/one", "dataset": "digits", "split": "test", "n_images": N_IMAGES}


def _row(policy: str, r: int, share: float, gmacs: float) -> Row:
    is_right = np.random.default_rng([r, len(policy)]).random(N_IMAGES) < share
    return Row(policy, r, 197 - 12 * r, gmacs, float(is_right.mean()), (0.0, 1.0), N_IMAGES, 100.0, is_right)


ROWS = [
    _row("none", 0, 0.9, 4.0),
    _row("tome", 4, 0.85, 3.0),
    _row("tome", 8, 0.7, 2.0),
    _row("dtem", 8, 0.8, 2.1),
    _row("dtem", 12, 0.75, 1.0),
]


@pytest.fixture
def evaluation(tmp_path: Path) -> str:
    write_evaluation(tmp_path / "one", ABOUT, ROWS)
    return str(tmp_path / "one.json")


def _compared(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    assert dtem("compare", [*arguments, "--out", str(tmp_path / "result")]) == 0
    found: list[dict[str, Any]] = json.loads((tmp_path / "result.json").read_text())["comparisons"]
    return found


def test_compare_pairs_policies_at_the_rates_that_both_have(evaluation: str, tmp_path: Path) -> None:
    (found,) = _compared(tmp_path, evaluation)
    counts = count_pairs(ROWS[2].scores, ROWS[3].scores)
    assert [(side["policy"], side["r"]) for side in (found["base"], found["other"])] == [("tome", 8), ("dtem", 8)]
    assert found["difference_points"] == pytest.approx(100 * (ROWS[3].value - ROWS[2].value))
    assert found["ci95_points"] == pytest.approx([100 * bound for bound in counts.interval()])
    assert found["mcnemar_p"] == counts.mcnemar()
    assert found["gmacs_percent"] == pytest.approx(5)
    table = (tmp_path / "result.md").read_text()
    assert f"| tome r=8 | dtem r=8 | {100 * ROWS[2].value:.2f} | {100 * ROWS[3].value:.2f} |" in table
    with Image.open(tmp_path / "result.png") as picture:
        assert len(set(picture.convert("RGB").get_flattened_data())) > 50


@pytest.mark.parametrize(("base", "r"), [("none", 0), ("none-r0", 0), ("tome-r4", 4)])
def test_one_row_as_base_is_compared_with_all_of_the_other(evaluation: str, base: str, r: int, tmp_path: Path) -> None:
    found = _compared(tmp_path, evaluation, "--base", base, "--other", "tome-r8,dtem")
    assert [one["base"]["r"] for one in found] == [r, r, r]
    assert [(one["other"]["policy"], one["other"]["r"]) for one in found] == [("tome", 8), ("dtem", 8), ("dtem", 12)]


def test_two_evaluations_are_compared_on_the_same_images(evaluation: str, tmp_path: Path) -> None:
    trained = [_row("dtem", 8, 0.95, 2.1)]
    write_evaluation(tmp_path / "two", {**ABOUT, "model": "runs/two"}, trained)
    (found,) = _compared(tmp_path, evaluation, str(tmp_path / "two.json"), "--base", "none")
    assert (found["base"]["model"], found["other"]["model"]) == ("runs/one", "runs/two")
    assert found["base"]["top1"] == ROWS[0].value
    assert found["other"]["top1"] == trained[0].value
    assert found["gmacs_percent"] == pytest.approx(-47.5)
    assert "| runs/one none r=0 | runs/two dtem r=8 |" in (tmp_path / "result.md").read_text()


@pytest.mark.parametrize("change", [{"split": "validation"}, {"dataset": "imagenet"}, {"n_images": 100}])
def test_other_images_are_refused(
    evaluation: str, change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_evaluation(tmp_path / "two", {**ABOUT, **change}, ROWS)
    assert dtem("compare", [evaluation, str(tmp_path / "two.json"), "--out", str(tmp_path / "result")]) == 2
    assert "only the same images can be paired" in capsys.readouterr().err
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "tme"], "no row 'tme' in the evaluation of runs/one: it has none-r0, tome-r4"),
        (["--other", "dtem-r4"], "no row 'dtem-r4'"),
        (["--other", "dtem-r12"], "no rate in common"),
        (["nowhere.json"], "no evaluation nowhere.json"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    evaluation: str, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dtem("compare", [evaluation, *arguments, "--out", str(tmp_path / "result")]) == 2
    assert message in capsys.readouterr().err
