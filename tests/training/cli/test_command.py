"""Every study starts, refuses and ends in the same way."""

import argparse
import importlib
from pathlib import Path

import pytest

from training.cli.command import run_command

COMMANDS = ["training.studies.background", "training.studies.study"]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--n", type=int, default=0)


def run(body: object, *arguments: str, refusals: tuple[type[Exception], ...] = ()) -> int:
    return run_command("check", "Check.", options, body, arguments, refusals=refusals)  # type: ignore[arg-type]


def failing(error: BaseException) -> object:
    def body(_: argparse.Namespace) -> None:
        raise error

    return body


def test_status_is_0_or_what_the_command_returns() -> None:
    assert run(lambda options: None) == 0
    assert run(lambda options: options.n, "--n", "7") == 7


@pytest.mark.parametrize("error", [ValueError("n 3: expected\n at most 2"), OSError("n 3: expected at most 2")])
def test_refusal_is_status_2_and_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(failing(error)) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "check refused: n 3: expected at most 2\n")


def test_refusals_of_a_command_are_refused_and_other_errors_propagate() -> None:
    assert run(failing(RuntimeError("no")), refusals=(RuntimeError,)) == 2
    with pytest.raises(RuntimeError):
        run(failing(RuntimeError("a defect")))


def test_interruption_is_status_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(failing(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "check interrupted\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(name)
    with pytest.raises(SystemExit, match="0"):
        module.main(["--help"])
    text = capsys.readouterr().out
    assert f"python -m {name}" in text
    with pytest.raises(SystemExit, match="2"):
        module.main(["--no-such-option"])


def test_list_of_commands_is_complete() -> None:
    files = Path("training/studies").glob("*.py")
    found = {".".join(file.with_suffix("").parts) for file in files if "def main(" in file.read_text()}
    assert found == set(COMMANDS)
