import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from benchmarks.errors import MeasurementError
from benchmarks.load.open_loop import LOST, CallResult, ClientLoad
from benchmarks.overload.__main__ import main
from benchmarks.overload.effective_accuracy import (
    Point,
    best_fixed,
    compare,
    count_by_second,
    effective_accuracy,
    judge,
    summarise,
)
from benchmarks.overload.measure import make_traffic
from benchmarks.overload.report import draw_figure, tables
from tests.app.tiny_store import write_store
from tests.benchmarks.answers import make_result

ABOUT = {"model": "m", "policy": "tome", "deadline_ms": 100.0, "n_images": 9, "rounds": 2, "seconds": 3}
ABOUT |= {"capacity": 10.0, "baseline": "r=0", "setting": [], "max_lag_ms": 10.0}


def result(status: int, latency_ms: float | None = None, index: int = 0, r: int | None = 8) -> CallResult:
    return make_result(status, latency_ms, {"predictions": [{"index": index}], "r": r})


def point(arm: str, n_correct: list[int], *, index: int = 0, load: float = 1, is_kept: bool = True) -> Point:
    blocks = [(10, correct) for correct in n_correct]
    share = sum(n_correct) / (10 * len(n_correct))
    shares = {"correct": share, "incorrect": 1 - share, "late": 0.0, "refused": 0.0, "failed": 0.0}
    found = 8.0 if arm == "adaptive" else None
    return Point(load, index, arm, 10 * len(n_correct), shares, found, 5.0, 9.0, 0.1, 1.0, is_kept, blocks)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seen", "outcome"),
    [
        (result(200, 99.9, index=3), ("correct", 8)),
        (result(200, 99.9, index=4), ("incorrect", 8)),
        (result(200, 100.1, index=3), ("late", 8)),
        (result(200, 50, index=3, r=None), ("correct", None)),
        (result(429, 1), ("refused", None)),
        (result(503, 1), ("refused", None)),
        (result(504, 101), ("late", None)),
        (result(500, 1), ("failed", None)),
        (result(LOST), ("failed", None)),
    ],
)
def test_an_answer_counts_if_it_is_correct_and_in_time(seen: CallResult, outcome: tuple[str, int | None]) -> None:
    assert judge(seen, 3, 100) == outcome


def test_an_unexpected_status_is_refused() -> None:
    with pytest.raises(MeasurementError, match="unexpected status 422"):
        judge(result(422, 1), 3, 100)


def test_a_point_counts_all_requests_offered() -> None:
    seen = [result(200, 10, 1, 0), result(200, 30, 2, 16), result(200, 150, 1, 8), result(429, 1)]
    found = summarise((1.5, 0, "adaptive"), seen, [1, 1, 1, 1], [0.2, 0.9, 1.0, 2.5], 100, ClientLoad(0.2, 12), 10)
    assert (found.load, found.round, found.arm, found.n_offered) == (1.5, 0, "adaptive", 4)
    assert found.shares == {"correct": 0.25, "incorrect": 0.25, "late": 0.25, "refused": 0.25, "failed": 0.0}
    assert found.mean_r == 8
    assert found.p50_ms == pytest.approx(30)
    assert found.blocks == [(2, 1), (1, 0), (1, 0)]
    # The client lagged by 12 ms.
    assert not found.is_kept


def test_no_arrivals_are_no_blocks() -> None:
    assert count_by_second([], []) == []
    assert summarise((1, 0, "r=0"), [], [], [], 100, ClientLoad(0, 0), 10).mean_r is None


def test_effective_accuracy_covers_kept_rounds() -> None:
    points = [point("r=0", [5, 5]), point("r=0", [0, 0], index=1, is_kept=False)]
    assert effective_accuracy(points) == pytest.approx(0.5)
    assert effective_accuracy(points[1:]) is None


def test_arms_are_compared_by_second_in_rounds_kept_in_both() -> None:
    adaptive = [point("adaptive", [9, 8, 9]), point("adaptive", [0, 0, 0], index=1)]
    fixed = [point("r=0", [4, 3, 4]), point("r=0", [9, 9, 9], index=1, is_kept=False)]
    found = compare(adaptive, fixed)
    assert found is not None
    assert [found.value, *found.ci95] == pytest.approx([0.5] * 3)
    assert compare(adaptive[1:], fixed) is None


def test_the_interval_widens_with_the_spread_between_seconds() -> None:
    fixed = [point("r=0", [5] * 20)]
    steady = compare([point("adaptive", [6] * 20)], fixed)
    unsteady = compare([point("adaptive", [10, 2] * 10)], fixed)
    assert steady is not None
    assert unsteady is not None
    assert [steady.value, unsteady.value] == pytest.approx([0.1, 0.1])
    assert unsteady.ci95[0] < 0 < unsteady.ci95[1]
    assert list(steady.ci95) == pytest.approx([0.1, 0.1])


def test_the_best_fixed_arm_is_found_for_each_load() -> None:
    points = [point("adaptive", [9]), point("r=0", [4]), point("r=16", [7]), point("r=0", [9], load=0.5)]
    assert best_fixed(points, 1, "adaptive") == "r=16"
    assert best_fixed(points, 0.5, "adaptive") == "r=0"
    assert best_fixed(points, 2, "adaptive") is None


def test_the_report_has_a_row_per_load_and_arm() -> None:
    points = [
        one
        for index in (0, 1)
        for one in (
            point("adaptive", [9, 8, 9], index=index),
            point("r=0", [4, 5, 4], index=index),
            point("r=16", [7, 7, 7], index=index, is_kept=index == 0),
            point("adaptive", [2, 1, 1], index=index, load=4),
            point("r=0", [0, 0, 0], index=index, load=4, is_kept=False),
        )
    ]
    content = {"about": ABOUT, "points": [asdict(one) for one in points]}
    table = tables(content)
    assert "| 1 | 10 | 86.7 | r=16 | 70.0 | +16.7 (" in table
    assert "| 4 | 40 | 13.3 | — | — | — | 8.0 |" in table
    assert "| r=0 | 43.3 | — |" in table
    assert "3 of 10 points are discarded" in table
    assert len(draw_figure(content).axes) == 3


def test_traffic_is_the_same_for_a_seed() -> None:
    one, same, other = (make_traffic(100, 2, 50, seed) for seed in (1, 1, 2))
    assert one == same != other
    assert len(one.times) == len(one.images)
    assert set(one.images) <= set(range(50))
    assert np.std(one.images) > 5


def test_an_unknown_policy_is_refused_with_the_known_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--published", str(write_store(tmp_path)), "--policy", "atm"]) == 2
    assert "policy 'atm': " in capsys.readouterr().err


@pytest.mark.slow
def test_all_arms_receive_the_same_arrivals(tmp_path: Path) -> None:
    folder, out = write_store(tmp_path / "store"), tmp_path / "overload"
    small = ["--loads", "0.1,0.2", "--seconds", "1", "--rounds", "1", "--connections", "2", "--n-images", "5"]
    assert main(["--published", str(folder), "--policy", "tome", *small, "--out", str(out)]) == 0
    points = [Point(**one) for one in json.loads(out.with_suffix(".json").read_text())["points"]]
    assert {(one.load, one.arm) for one in points} == {
        (load, arm) for load in (0.1, 0.2) for arm in ("r=0", "r=8", "r=16", "adaptive")
    }
    for load in (0.1, 0.2):
        assert len({one.n_offered for one in points if one.load == load}) == 1
    assert all(one.shares["failed"] == 0 for one in points)
    assert out.with_suffix(".png").stat().st_size > 10_000
