"""The steps of dtem prepare; tests/e2e/test_own_model.py runs them."""

from pathlib import Path

import click
import pytest

from dtem.commands import prepare
from dtem.main import dtem, main


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The steps that were run, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    for name in ("val", "train", "runs/mine/unmerged"):
        Path(name).mkdir(parents=True)
    seen: list[list[str]] = []

    def run(step: list[str]) -> int:
        with dtem.commands[step[0]].make_context(step[0], list(step[1:]), parent=click.Context(dtem)):
            seen.append(step)
        return 0

    monkeypatch.setattr(prepare, "_run", run)
    return seen


PREPARE = ["prepare", "mine.pth", "--data", "val", "--name", "mine", "--mean", "0.5,0.25,0.5", "--rates", "0,4"]


def test_every_step_is_a_command_that_is_accepted(steps: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PREPARE, "--train", "train", "--arguments", '{"img_size": 112}']) == 0
    assert [step[0] for step in steps] == ["inspect", "learn", "calibrate", "export", "summary"]
    assert "--mean 0.5,0.25,0.5" in " ".join(steps[0])
    assert '{"img_size": 112}' in steps[0]
    shown = capsys.readouterr().out
    assert "$ dtem learn --recipe runs/mine/unmerged/dtem.toml --out runs/mine/dtem" in shown
    assert "--run runs/mine/dtem" in " ".join(steps[3])


def test_learning_and_calibration_can_be_left_out(steps: list[list[str]]) -> None:
    assert main([*PREPARE, "--no-adaptive"]) == 0
    assert [step[0] for step in steps] == ["inspect", "export", "summary"]
    assert "--calibrations" not in steps[1]
    assert "--run runs/mine/unmerged" in " ".join(steps[1])


def test_failed_step_ends_the_command_with_its_status(steps: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "_run", lambda step: 130)
    assert main(PREPARE) == 130
    assert steps == []


def test_same_command_publishes_one_version(steps: list[list[str]]) -> None:
    for number in ("1", "3"):
        Path("model_store/mine", number).mkdir(parents=True)
    assert main(PREPARE) == 0
    Path("model_store/mine/4").mkdir()
    assert main(PREPARE) == 0
    assert [step[0] for step in steps].count("export") == 1
    assert [step[1] for step in steps if step[0] == "summary"] == ["model_store/mine/4"] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--name", "Pets"], "name 'Pets': expected lower-case letters"),
        (["--max-accuracy-drop", "2"], "runs/mine is of a command with other max_accuracy_drop: choose another --out"),
        (["--store", "file"], "file is not a folder"),
        (["--train", "nowhere"], "nowhere is no folder"),
    ],
)
def test_wrong_use_is_refused_before_anything_is_written(
    steps: list[list[str]], changes: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").touch()
    if "--max-accuracy-drop" in changes:
        assert main(PREPARE) == 0
    before = sorted(map(str, Path().rglob("*")))
    n_steps = len(steps)
    capsys.readouterr()
    assert main([*PREPARE, *changes]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert (sorted(map(str, Path().rglob("*"))), len(steps)) == (before, n_steps)


def test_folder_of_a_command_that_did_nothing_is_free(steps: list[list[str]]) -> None:
    Path("runs/mine/unmerged").rmdir()
    assert main(PREPARE) == 0
    assert main([*PREPARE, "--mean", "0.1,0.1,0.1"]) == 0


def test_data_is_required(steps: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "mine.pth", "--name", "mine"]) == 2
    assert "--data" in capsys.readouterr().err
    assert steps == []
