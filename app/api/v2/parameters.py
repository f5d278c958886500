"""Parameters: what a request asks for besides its tensors, in the words of `selection.Query`. Pure functions."""

import math
from collections.abc import Mapping
from typing import Any

from app.errors import InvalidParameter, UnknownParameter, echo
from app.store.selection import Query

BINARY_OUTPUT = "binary_data_output"
TIMEOUT = "timeout"
DEADLINE = "deadline_ms"
IN_THE_PATH = ("model", "version")
PER_OUTPUT = "top_k"  # is `classification` of a requested output here
SELECTORS = [name for name in Query.model_fields if name not in (*IN_THE_PATH, PER_OUTPUT)]
ACCEPTED = [*SELECTORS, BINARY_OUTPUT, TIMEOUT]
# Triton's own, which its clients send at these values when they mean nothing by them.
RESERVED = {
    "sequence_id": "the models keep no state between requests",
    "sequence_start": "the models keep no state between requests",
    "sequence_end": "the models keep no state between requests",
    "priority": "all requests wait in one queue",
}
MEANS_NOTHING = (0, "", False)
MICROSECONDS_PER_MS = 1000


def read_query(parameters: Mapping[str, Any], model: str, version: str) -> Query:
    """Turn a request's parameters into what `/classify` would have been asked.

    Raises: UnknownParameter, InvalidParameter.
    """
    words: dict[str, str] = {}
    for name, value in parameters.items():
        if name in RESERVED and value in MEANS_NOTHING:
            continue
        _require_known(name)
        if name == TIMEOUT:
            words |= _read_timeout(value, parameters)
        elif name != BINARY_OUTPUT:
            words[name] = write_word(name, value)
    return Query(**{**words, "model": model, "version": version})


def _require_known(name: str) -> None:
    if name in RESERVED:
        raise UnknownParameter(f"parameters.{name} has no meaning here: {RESERVED[name]}.", field=name)
    if name not in ACCEPTED:
        detail = f"There is no parameter {echo(name)!r}."
        raise UnknownParameter(detail, field=echo(name), accepted=ACCEPTED)


def _read_timeout(value: Any, parameters: Mapping[str, Any]) -> dict[str, str]:
    """Read Triton's timeout, in microseconds, as a deadline; 0 is none."""
    if type(value) is not int or value < 0:
        detail = f"parameters.timeout={echo(str(value))} is not a whole number of microseconds."
        raise InvalidParameter(detail, field=TIMEOUT, value=echo(str(value)))
    if value == 0:
        return {}
    _require_known(DEADLINE)
    if DEADLINE in parameters:
        raise InvalidParameter("parameters.timeout and parameters.deadline_ms say the same; give one.", field=TIMEOUT)
    return {DEADLINE: write_word(TIMEOUT, value / MICROSECONDS_PER_MS)}


def write_word(name: str, value: Any) -> str:
    """Write a value as it would stand in a query: 8, 8.0 and "8" are the same rate.

    Raises: InvalidParameter.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(value)
    detail = f"parameters.{echo(name)}={echo(repr(value))} is not a number, a string, true or false."
    raise InvalidParameter(detail, field=echo(name), value=echo(repr(value)))


def read_flag(parameters: Mapping[str, Any], name: str, default: bool) -> bool:
    """Raises: InvalidParameter."""
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        detail = f"parameters.{name}={echo(repr(value))} is neither true nor false."
        raise InvalidParameter(detail, field=name, value=echo(repr(value)))
    return value
