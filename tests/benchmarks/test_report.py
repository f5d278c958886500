import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from benchmarks.errors import MeasurementError
from benchmarks.report import Benchmark, describe_settings, run_benchmark
from deploy.local.process import LaunchError


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--speed", type=int, default=1)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    if options.speed == 0:
        raise MeasurementError("nothing moves")
    if options.speed < 0:
        raise LaunchError("cannot start:\nno such setting")
    return {"about": {}, "speed": options.speed}


def tables(content: dict[str, Any]) -> str:
    return f"| speed |\n|---:|\n| {content['speed']} |\n"


def run(*arguments: str) -> int:
    benchmark = Benchmark(
        name="speed",
        title="Speed",
        summary="How fast.",
        add_options=add_options,
        measure=measure,
        tables=tables,
        draw_figure=lambda content: Figure(),
        has_failed=lambda content: bool(content["speed"] > 10),
    )
    return run_benchmark(benchmark, "Measure speed.", arguments)


def test_a_report_is_title_sentence_command_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "speed"
    assert run("--speed", "3", "--out", str(out)) == 0
    page = out.with_suffix(".md").read_text()
    command = f"python -m benchmarks.speed --speed 3 --out {out}"
    assert page == f"# Speed\n\nHow fast.\n\n```\n{command}\n```\n\n{tables({'speed': 3})}"
    assert page in capsys.readouterr().out
    assert json.loads(out.with_suffix(".json").read_text()) == {"command": command, "about": {}, "speed": 3}
    assert out.with_suffix(".png").exists()


def test_a_report_can_be_rendered_again_without_a_measurement(tmp_path: Path) -> None:
    assert run("--speed", "3", "--out", str(tmp_path / "one")) == 0
    assert run("--speed", "0", "--render", str(tmp_path / "one.json"), "--out", str(tmp_path / "two")) == 0
    for suffix in (".md", ".json"):
        assert (tmp_path / f"two{suffix}").read_text() == (tmp_path / f"one{suffix}").read_text()


@pytest.mark.parametrize(
    ("speed", "line"),
    [("0", "speed refused: nothing moves\n"), ("-1", "speed refused: cannot start: no such setting\n")],
)
def test_a_measurement_without_a_valid_result_is_refused(
    speed: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--speed", speed, "--out", str(tmp_path / "speed")) == 2
    assert capsys.readouterr().err == line
    assert not list(tmp_path.iterdir())


def test_a_failed_benchmark_is_reported_and_ends_with_1(tmp_path: Path) -> None:
    assert run("--speed", "11", "--out", str(tmp_path / "speed")) == 1
    assert (tmp_path / "speed.md").exists()


def test_settings_are_described() -> None:
    assert describe_settings([]) == "defaults"
    assert describe_settings([["log_level", "debug"], ["port", "1"]]) == "log_level=debug, port=1"
