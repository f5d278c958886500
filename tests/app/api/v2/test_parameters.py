from typing import Any

import pytest

from app.api.v2.parameters import ACCEPTED, format_value, read_flag, read_query
from app.errors import InvalidParameter, ServiceError, UnknownParameter


@pytest.mark.parametrize(
    ("value", "text"),
    [(8, "8"), (8.0, "8"), ("8", "8"), (2.5, "2.5"), (True, "true"), (False, "false"), ("dtem", "dtem"), (-1, "-1")],
)
def test_format_value_formats_as_in_a_url_query(value: Any, text: str) -> None:
    assert format_value("r", value) == text


@pytest.mark.parametrize("value", [None, [], {}, [8], float("inf"), float("nan")])
def test_format_value_refuses_other_values(value: Any) -> None:
    with pytest.raises(InvalidParameter, match=r"parameters\.r=.* is not a number, string or boolean"):
        format_value("r", value)


def test_query_takes_its_model_from_the_path() -> None:
    query = read_query({"r": 8, "policy": "tome", "binary_data_output": True}, "tiny", "1")
    assert query.model_dump(exclude_none=True) == {"model": "tiny", "version": "1", "r": "8", "policy": "tome"}


@pytest.mark.parametrize("name", ["rate", "R", "model", "version", "top_k", "triton_x", "headers", "", "\ud800"])
def test_unknown_parameters_are_refused_with_the_accepted_ones(name: str) -> None:
    with pytest.raises(UnknownParameter) as caught:
        read_query({name: 1}, "tiny", "1")
    assert caught.value.members["accepted"] == ACCEPTED
    assert {"r", "policy", "timeout", "binary_data_output"} <= set(ACCEPTED)


@pytest.mark.parametrize("name", ["sequence_id", "sequence_start", "sequence_end", "priority"])
def test_reserved_parameters_are_refused_unless_empty(name: str) -> None:
    for nothing in (0, "", False):
        assert read_query({name: nothing}, "tiny", "1") == read_query({}, "tiny", "1")
    with pytest.raises(UnknownParameter, match=f"Unsupported parameter '{name}': "):
        read_query({name: 1}, "tiny", "1")


def test_timeout_of_zero_means_none() -> None:
    assert read_query({"timeout": 0}, "tiny", "1") == read_query({}, "tiny", "1")


@pytest.mark.parametrize("value", [-1, 0.5, "5", True, None])
def test_timeout_must_be_a_non_negative_integer(value: Any) -> None:
    with pytest.raises(InvalidParameter, match="is not a non-negative integer, in microseconds"):
        read_query({"timeout": value}, "tiny", "1")


def test_timeout_is_the_deadline_in_microseconds() -> None:
    assert read_query({"timeout": 2500}, "tiny", "1") == read_query({"deadline_ms": 2.5}, "tiny", "1")
    with pytest.raises(InvalidParameter, match="are mutually exclusive"):
        read_query({"timeout": 2500, "deadline_ms": 2}, "tiny", "1")


def test_every_selector_of_classify_is_accepted() -> None:
    asked = {"max_gmacs": 0.7, "min_accuracy": "0.9", "deadline_ms": 40, "allow_degrade": True, "max_r": 16}
    texts = {"max_gmacs": "0.7", "min_accuracy": "0.9", "deadline_ms": "40", "allow_degrade": "true", "max_r": "16"}
    query = read_query(asked, "tiny", "1")
    assert query.model_dump(exclude_none=True) == {"model": "tiny", "version": "1", **texts}


@pytest.mark.parametrize("value", ["true", 1, 0, None, []])
def test_flag_must_be_a_boolean(value: Any) -> None:
    assert read_flag({}, "binary_data", default=True) is True
    assert read_flag({"binary_data": False}, "binary_data", default=True) is False
    with pytest.raises(ServiceError, match=r"parameters\.binary_data=.* is neither true nor false"):
        read_flag({"binary_data": value}, "binary_data", default=True)
