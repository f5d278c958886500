import itertools
from math import comb

import numpy as np
import pytest

from training.evaluate.paired import PairedCounts, count_pairs


def test_counts_are_the_two_by_two_table() -> None:
    base = np.array([1, 1, 1, 0, 0, 0, 0], bool)
    other = np.array([1, 0, 0, 1, 1, 1, 0], bool)
    counts = count_pairs(base, other)
    assert counts == PairedCounts(n_both=1, n_only_base=2, n_only_other=3, n_neither=1)
    assert counts.n_images == 7
    assert counts.difference == pytest.approx(other.mean() - base.mean())


def test_interval_is_that_of_the_prime_minister_survey() -> None:
    """Agresti's survey, 1600 people asked twice: 794, 150, 86, 570. Wald gives 0.040 ± 0.019."""
    counts = PairedCounts(n_both=794, n_only_base=150, n_only_other=86, n_neither=570)
    assert counts.difference == pytest.approx(-0.04)
    low, high = counts.interval()
    assert (low, high) == pytest.approx((-0.058683, -0.021217), abs=1e-6)
    assert (low + high) / 2 == pytest.approx(-64 / 1602)


def test_mcnemar_is_the_binomial_tail_counted_out() -> None:
    for n_base, n_other in itertools.product(range(8), range(8)):
        n, fewer = n_base + n_other, min(n_base, n_other)
        tail = sum(comb(n, k) for k in range(fewer + 1)) / 2**n
        expected = min(1.0, 2 * tail)
        assert PairedCounts(3, n_base, n_other, 2).mcnemar() == pytest.approx(expected)


def test_mcnemar_of_the_survey_is_clear() -> None:
    # (150 - 86)^2 / (150 + 86) = 17.36 by the normal approximation, p = 3.1e-5; the exact one is a
    # little larger
    assert PairedCounts(794, 150, 86, 570).mcnemar() == pytest.approx(3.7e-5, rel=0.05)


def test_interval_covers_the_true_difference_as_often_as_it_says() -> None:
    generator = np.random.default_rng(5)
    shares = [0.86, 0.03, 0.05, 0.06]
    hits = 0
    for counts in generator.multinomial(400, shares, 4000):
        low, high = PairedCounts(*(int(n) for n in counts)).interval()
        hits += low <= shares[2] - shares[1] <= high
    assert 0.94 < hits / 4000 < 0.965


def test_without_discordant_images_the_interval_still_has_a_width() -> None:
    counts = PairedCounts(90, 0, 0, 10)
    low, high = counts.interval()
    assert low == -high < 0
    assert counts.mcnemar() == 1


def test_swapped_sides_mirror_the_result() -> None:
    one, other = PairedCounts(50, 9, 21, 20), PairedCounts(50, 21, 9, 20)
    assert one.interval() == pytest.approx(tuple(-bound for bound in reversed(other.interval())))
    assert one.mcnemar() == pytest.approx(other.mcnemar())


def test_other_images_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="expected the same images"):
        count_pairs(np.ones(3, bool), np.ones(4, bool))
    with pytest.raises(ValueError, match="at least one image"):
        count_pairs(np.ones(0, bool), np.ones(0, bool))
