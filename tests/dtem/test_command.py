"""Every command starts, refuses and ends in the same way, and explains itself without importing either half."""

import importlib
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

import click
import pytest

from dtem import training
from dtem.commands.serve import PACKAGED_STORE
from dtem.main import COMMANDS, dtem, main
from dtem.training import run_training
from training.cli import compare
from training.data.digits import SPLITS
from training.export.formats import FORMAT_NAMES, PRECISIONS
from training.merging.policies import ADAPTIVE_METRICS, FIXED_POLICIES
from training.tasks import TASKS

NAMES = list(dtem.commands)
COMPARE = ["compare", "a.json", "--out", "b"]


def raising(error: BaseException) -> Callable[[Namespace], int]:
    def run(_: Namespace) -> int:
        raise error

    return run


@pytest.mark.parametrize("name", NAMES)
def test_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Examples:" in text
    assert f"dtem {name} " in text


def test_help_imports_neither_half() -> None:
    code = """
import sys
from dtem.main import dtem, main
for name in dtem.commands:
    main([name, "--help"])
sys.exit(", ".join({"torch", "numpy", "pydantic", "fastapi", "timm"} & set(sys.modules)) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["exprt"], "dtem: No such command 'exprt'. Did you mean 'export'?\n"),
        (["export", "--naem", "x"], "dtem export: No such option '--naem'. (Did you mean one of: '--name'"),
        (["export"], "dtem export: Missing option '--name'.\n"),
        (["export", "--name", "x", "y"], "dtem export: Got unexpected extra argument (y)\n"),
        (["evaluate", "--rates", "0,a"], "'0,a': expected rates such as 0,8,16"),
        (["evaluate", "--rates", "8,8"], "'8,8': expected distinct rates of at least 0"),
        (["evaluate", "--rates", "16:0:2"], "'16:0:2': expected distinct rates of at least 0"),
        (["evaluate", "--arguments", "{"], "'{' is no JSON"),
        (["evaluate", "--arguments", "[1]"], "'[1]': expected a JSON object"),
        (
            ["serve", "--port", "70000"],
            "dtem serve: Invalid value for '--port': 70000 is not in the range 0<=x<=65535.\n",
        ),
    ],
)
def test_wrong_use_is_status_2_and_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_without_a_command_it_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    text = capsys.readouterr().out
    assert all(name in text for name in NAMES)


@pytest.mark.parametrize("error", [ValueError("n 3: expected\n at most 2"), OSError("n 3: expected at most 2")])
def test_refusal_is_status_2_and_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "run", raising(error))
    assert main(COMPARE) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "dtem compare: n 3: expected at most 2\n")


def test_defect_propagates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "run", raising(RuntimeError("a defect")))
    with pytest.raises(RuntimeError, match="a defect"):
        main(COMPARE)


def test_interruption_is_status_130_and_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "run", raising(KeyboardInterrupt()))
    assert main(COMPARE) == 130
    assert capsys.readouterr().err == "dtem compare: interrupted; run the same command again to go on\n"


def test_command_line_repeats_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def run(options: Namespace) -> int:
        seen.append(options.command_line)
        return 0

    monkeypatch.setattr(compare, "run", run)
    assert main(["compare", "a b.json", "--out", "c"]) == 0
    assert seen == ["dtem compare 'a b.json' --out c"]


def test_missing_packages_are_named_with_the_line_that_installs_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(training, "import_module", fail)
    assert main(COMPARE) == 2
    message = capsys.readouterr().err
    assert message.startswith("dtem compare: the package torch is missing")
    assert "-m pip install huggingface-hub joblib jsonschema matplotlib" in message
    assert "--torch-backend cpu" in message


def test_missing_module_of_our_own_is_a_defect() -> None:
    with click.Context(dtem, obj=[]), pytest.raises(ModuleNotFoundError, match="no_such"):
        run_training("no_such")


def test_help_names_everything_that_is_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    """The registries cannot be imported for a quick help."""
    for name, accepted in (
        ("export", [*FORMAT_NAMES, *PRECISIONS, *TASKS, *SPLITS]),
        ("evaluate", list(FIXED_POLICIES)),
        ("calibrate", list(ADAPTIVE_METRICS)),
    ):
        main([name, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert [word for word in accepted if word not in text] == []


def test_every_module_of_commands_is_a_command() -> None:
    package = importlib.import_module("dtem.commands")
    modules = {path.stem for path in Path(package.__path__[0]).glob("*.py")} - {"__init__"}
    assert modules == {module.__name__.rpartition(".")[2] for module in COMMANDS} == set(NAMES)


def test_console_script_is_installed() -> None:
    (script,) = entry_points(group="console_scripts", name="dtem")
    assert script.load() is main


def test_reference_model_is_found_from_the_package() -> None:
    assert list(PACKAGED_STORE.glob("reference/*/manifest.json"))
