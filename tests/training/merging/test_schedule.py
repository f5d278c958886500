from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.merging import max_r, resolve_schedule, tokens_per_block


@pytest.mark.parametrize(("r", "left"), [(0, 197), (8, 101), (11, 65), (12, 53), (13, 41), (16, 11)])
def test_constant_schedule_leaves_the_published_tokens(r: int, left: int) -> None:
    resolved = resolve_schedule(r, depth=12, n_tokens=197, exhausted="reduce")
    tokens = tokens_per_block(resolved, 197)
    assert (len(tokens), tokens[0], tokens[-1]) == (13, 197, left)


def test_exhausted_tokens_are_an_error_that_names_block_and_limit() -> None:
    with pytest.raises(ValueError, match=r"block 11 cannot remove r=16.*21 that reach it.*can remove 10"):
        resolve_schedule(16, depth=12, n_tokens=197)


def test_reduce_shows_what_the_last_block_gives() -> None:
    assert resolve_schedule(16, depth=12, n_tokens=197, exhausted="reduce") == (16,) * 11 + (10,)


@pytest.mark.parametrize(
    ("schedule", "resolved"),
    [
        ((13, -1), (26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0)),
        ((13, 1), (0, 2, 4, 7, 9, 11, 14, 16, 18, 21, 23, 26)),
        ((5, 0), (5,) * 12),
        ((10, -0.3), (13, 12, 11, 11, 10, 10, 9, 9, 8, 8, 7, 7)),
        ((0, -1), (0,) * 12),
    ],
)
def test_linear_schedule_is_exact(schedule: tuple[int, float], resolved: tuple[int, ...]) -> None:
    assert resolve_schedule(schedule, depth=12, n_tokens=197) == resolved


@given(r=st.integers(0, 40), depth=st.integers(2, 40))
def test_linear_schedule_runs_from_2r_to_0_and_keeps_the_mean(r: int, depth: int) -> None:
    falling = resolve_schedule((r, -1), depth=depth, n_tokens=10**6)
    assert (falling[0], falling[-1]) == (2 * r, 0)
    assert list(falling) == sorted(falling, reverse=True)
    assert r * depth - depth < sum(falling) <= r * depth
    assert resolve_schedule((r, 1), depth=depth, n_tokens=10**6)[-1] == 2 * r


def test_linear_schedule_of_one_block_is_its_mean() -> None:
    assert resolve_schedule((7, -1), depth=1, n_tokens=100) == (7,)


def test_list_schedule_is_taken_as_it_stands_and_a_resolved_one_again() -> None:
    resolved = resolve_schedule([3, 0, 5], depth=3, n_tokens=20)
    assert resolved == (3, 0, 5)
    assert resolve_schedule(resolved, depth=3, n_tokens=20) == resolved
    assert resolve_schedule([3, 1], depth=2, n_tokens=20) == (3, 1)


def test_list_of_two_is_never_read_as_linear() -> None:
    with pytest.raises(ValueError, match="needs 12 of them, not 2"):
        resolve_schedule([13, -1], depth=12, n_tokens=197)


@pytest.mark.parametrize(
    ("schedule", "error"),
    [
        (-1, ValueError),
        ([1, -2, 3], ValueError),
        ([1, 2], ValueError),
        ((4, 1.5), ValueError),
        ((4, float("nan")), ValueError),
        ((-4, 1), ValueError),
        (True, TypeError),
        (1.5, TypeError),
        ("16", TypeError),
        (None, TypeError),
        ([1, 2.0, 3], TypeError),
        ([1, False, 3], TypeError),
        ((4, "1"), TypeError),
        ((4, True), TypeError),
        ((4.0, 1), TypeError),
    ],
)
def test_malformed_schedule_is_refused(schedule: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        resolve_schedule(schedule, depth=3, n_tokens=197)


@pytest.mark.parametrize(
    "arguments",
    [
        {"depth": 0, "n_tokens": 9},
        {"depth": 1, "n_tokens": 0},
        {"depth": 1, "n_tokens": 4, "n_protected": 5},
        {"depth": 1, "n_tokens": 4, "n_protected": -1},
        {"depth": 1, "n_tokens": 4, "exhausted": "clamp"},
    ],
)
def test_impossible_setting_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be|needs at least"):
        resolve_schedule(0, **arguments)


@given(r=st.integers(0, 60), depth=st.integers(1, 20), n_tokens=st.integers(6, 300), n_protected=st.integers(0, 5))
def test_reduced_schedule_never_asks_for_more_than_there_is(
    r: int, depth: int, n_tokens: int, n_protected: int
) -> None:
    resolved = resolve_schedule(r, depth=depth, n_tokens=n_tokens, n_protected=n_protected, exhausted="reduce")
    tokens = tokens_per_block(resolved, n_tokens)
    for taken, before in zip(resolved, tokens, strict=False):
        assert taken == min(r, max_r(before, n_protected))
    assert tokens[-1] >= n_protected
