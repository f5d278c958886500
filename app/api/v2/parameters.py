"""Parameters: translates the parameters of a request to a `selection.Query`. Pure functions."""

import math
from collections.abc import Mapping
from typing import Any

from app.errors import InvalidParameter, UnknownParameter, echo
from app.store.selection import Query

BINARY_OUTPUT = "binary_data_output"
TIMEOUT = "timeout"
DEADLINE = "deadline_ms"
IN_THE_PATH = ("model", "version")
# Replaced by `classification` of a requested output.
PER_OUTPUT = "top_k"
SELECTORS = [name for name in Query.model_fields if name not in (*IN_THE_PATH, PER_OUTPUT)]
ACCEPTED = [*SELECTORS, BINARY_OUTPUT, TIMEOUT]
# Parameters of Triton that are not supported. Its clients send an empty value when they do not use them.
RESERVED = {
    "sequence_id": "models are stateless",
    "sequence_start": "models are stateless",
    "sequence_end": "models are stateless",
    "priority": "requests have no priorities",
}
EMPTY_VALUES = (0, "", False)
MICROSECONDS_PER_MS = 1000


def read_query(parameters: Mapping[str, Any], model: str, version: str) -> Query:
    """Return the query with which `/classify` would select the same variant.

    Raises: UnknownParameter, InvalidParameter.
    """
    texts: dict[str, str] = {}
    for name, value in parameters.items():
        if name in RESERVED and value in EMPTY_VALUES:
            continue
        _require_known(name)
        if name == TIMEOUT:
            texts |= _read_timeout(value, parameters)
        elif name != BINARY_OUTPUT:
            texts[name] = format_value(name, value)
    return Query(**{**texts, "model": model, "version": version})


def _require_known(name: str) -> None:
    if name in RESERVED:
        raise UnknownParameter(f"Unsupported parameter {name!r}: {RESERVED[name]}.", field=name)
    if name not in ACCEPTED:
        detail = f"Unknown parameter {echo(name)!r}."
        raise UnknownParameter(detail, field=echo(name), accepted=ACCEPTED)


def _read_timeout(value: Any, parameters: Mapping[str, Any]) -> dict[str, str]:
    """Translate Triton's timeout to a deadline; 0 means none. Units: microseconds."""
    if type(value) is not int or value < 0:
        detail = f"parameters.timeout={echo(str(value))} is not a non-negative integer, in microseconds."
        raise InvalidParameter(detail, field=TIMEOUT, value=echo(str(value)))
    if value == 0:
        return {}
    _require_known(DEADLINE)
    if DEADLINE in parameters:
        raise InvalidParameter("parameters.timeout and parameters.deadline_ms are mutually exclusive.", field=TIMEOUT)
    return {DEADLINE: format_value(TIMEOUT, value / MICROSECONDS_PER_MS)}


def format_value(name: str, value: Any) -> str:
    """Format a value as in a URL query: 8, 8.0 and "8" are the same rate.

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
    detail = f"parameters.{echo(name)}={echo(repr(value))} is not a number, string or boolean."
    raise InvalidParameter(detail, field=echo(name), value=echo(repr(value)))


def read_flag(parameters: Mapping[str, Any], name: str, default: bool) -> bool:
    """Raises: InvalidParameter."""
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        detail = f"parameters.{name}={echo(repr(value))} is neither true nor false."
        raise InvalidParameter(detail, field=name, value=echo(repr(value)))
    return value
