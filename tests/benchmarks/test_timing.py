import itertools

import pytest

from benchmarks.timing import paired_ratio, time_in_turns


def test_runs_take_turns_and_the_first_round_is_not_counted() -> None:
    order: list[str] = []
    ticks = itertools.count()
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = time_in_turns(runs, 2, clock=lambda: float(next(ticks)))
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert seconds == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


def test_ratio_is_of_the_same_round_and_its_interval_is_that_of_a_sign_test() -> None:
    ratio = paired_ratio([2.0 * k for k in range(1, 11)], [float(k) for k in range(1, 11)])
    assert (ratio.median, ratio.ci95) == (2.0, (2.0, 2.0))
    ratio = paired_ratio([float(k) for k in range(1, 11)], [1.0] * 10)
    assert (ratio.median, ratio.ci95) == (5.5, (2.0, 9.0))  # of 10 values the 2nd and the 9th: 97.9 %


def test_too_few_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="5 rounds"):
        paired_ratio([1.0] * 5, [1.0] * 5)
