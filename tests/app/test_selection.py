import pytest

from app.catalogue import Catalogue
from app.errors import InvalidParameter, RateNotExported, ServiceError, UnknownModel, UnknownPolicy, UnknownVersion
from app.selection import Query, select


def chosen(catalogue: Catalogue, **words: str) -> tuple[str, int | None]:
    entry = select(catalogue, Query(**words)).variant.entry
    return entry.policy, entry.r


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({}, ("tome", 8)),
        ({"r": "16"}, ("tome", 16)),
        ({"r": "0"}, ("tome", 0)),
        ({"policy": "tome"}, ("tome", 8)),
        ({"policy": "none"}, ("none", 0)),
        ({"policy": "none", "r": "0"}, ("none", 0)),
        ({"model": "tiny", "version": "1", "r": "8"}, ("tome", 8)),
        ({"policy": "atm"}, ("atm", None)),
    ],
)
def test_select_finds_exactly_what_is_asked(
    catalogue: Catalogue, words: dict[str, str], expected: tuple[str, int | None]
) -> None:
    assert chosen(catalogue, **words) == expected


def test_select_lists_the_rates_of_the_policy_when_one_is_missing(catalogue: Catalogue) -> None:
    with pytest.raises(RateNotExported) as caught:
        select(catalogue, Query(r="3"))
    assert caught.value.members == {"field": "r", "value": 3, "policy": "tome", "accepted": [0, 8, 16]}
    with pytest.raises(RateNotExported) as caught:
        select(catalogue, Query(r="8", policy="none"))
    assert caught.value.members["accepted"] == [0]


@pytest.mark.parametrize(
    "r", ["abc", "-1", "16.0", "", " 16", "+16", "016", "1e1", "1_6", "١٦", "9" * 5000, "16\x00", "NaN"]
)
def test_select_refuses_rates_that_are_not_whole_numbers(catalogue: Catalogue, r: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        select(catalogue, Query(r=r))
    assert caught.value.members["accepted"] == [0, 8, 16]
    assert len(caught.value.detail) < 300


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ({"model": "nope"}, UnknownModel),
        ({"model": ""}, UnknownModel),
        ({"version": "2"}, UnknownVersion),
        ({"version": "01"}, UnknownVersion),
        ({"policy": "dtem"}, UnknownPolicy),
        ({"top_k": "0"}, InvalidParameter),
        ({"top_k": "4"}, InvalidParameter),
        ({"top_k": "all"}, InvalidParameter),
    ],
)
def test_select_refuses_what_there_is_not(
    catalogue: Catalogue, words: dict[str, str], error: type[ServiceError]
) -> None:
    with pytest.raises(error):
        select(catalogue, Query(**words))


def test_select_top_k_defaults_to_all_classes_when_they_are_few(catalogue: Catalogue) -> None:
    assert select(catalogue, Query()).top_k == 3
    assert select(catalogue, Query(top_k="1")).top_k == 1


@pytest.mark.parametrize("r", ["0", "8", "many"])
def test_select_refuses_a_rate_for_a_policy_that_adapts(catalogue: Catalogue, r: str) -> None:
    with pytest.raises(InvalidParameter, match="'atm' has no rates, it adapts to each image") as caught:
        select(catalogue, Query(policy="atm", r=r))
    assert caught.value.members == {"field": "r", "value": r, "policy": "atm", "accepted": []}
