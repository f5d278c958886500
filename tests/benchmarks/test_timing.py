import itertools

import pytest

from benchmarks.timing import paired_ratio, time_interleaved


def test_runs_are_interleaved_and_the_first_round_is_a_warm_up() -> None:
    order: list[str] = []
    ticks = itertools.count()
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = time_interleaved(runs, 2, clock=lambda: float(next(ticks)))
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert seconds == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


def test_ratio_is_within_rounds_and_its_interval_that_of_a_sign_test() -> None:
    ratio = paired_ratio([2.0 * k for k in range(1, 11)], [float(k) for k in range(1, 11)])
    assert [ratio.median, *ratio.ci95] == pytest.approx([2.0, 2.0, 2.0])
    ratio = paired_ratio([float(k) for k in range(1, 11)], [1.0] * 10)
    # The 2nd and the 9th of 10 values: 97.9 %.
    assert [ratio.median, *ratio.ci95] == pytest.approx([5.5, 2.0, 9.0])


def test_too_few_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="5 rounds"):
        paired_ratio([1.0] * 5, [1.0] * 5)
