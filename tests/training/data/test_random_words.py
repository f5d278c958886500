import numpy as np
import pytest

from training.data.random_words import RandomWords


def test_words_never_change() -> None:
    words = RandomWords(1, 2, 3)
    assert [words.integer(0, 999_999) for _ in range(4)] == PINNED_INTEGERS
    assert words.bytes(2, 3).tolist() == PINNED_BYTES
    assert words.permutation(6).tolist() == PINNED_PERMUTATION


PINNED_INTEGERS = [670472, 111014, 511509, 356176]
PINNED_BYTES = [[247, 242, 11], [54, 228, 211]]
PINNED_PERMUTATION = [3, 5, 4, 2, 0, 1]


def test_integer_reaches_both_ends_and_nothing_beyond() -> None:
    words = RandomWords(0)
    assert {words.integer(-2, 3) for _ in range(300)} == {-2, -1, 0, 1, 2, 3}


def test_integer_is_uniform() -> None:
    words = RandomWords(5)
    counts = np.bincount([words.integer(0, 9) for _ in range(10_000)], minlength=10)
    assert counts.min() > 880
    assert counts.max() < 1120


def test_chance_happens_as_often_as_asked() -> None:
    words = RandomWords(9)
    assert sum(words.chance(30) for _ in range(10_000)) == pytest.approx(3000, abs=200)


def test_permutation_holds_every_number_once() -> None:
    assert sorted(RandomWords(4).permutation(50).tolist()) == list(range(50))


def test_seeds_differ() -> None:
    first, second = RandomWords(1, 2), RandomWords(2, 1)
    assert [first.integer(0, 99) for _ in range(8)] != [second.integer(0, 99) for _ in range(8)]
