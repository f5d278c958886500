import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.observability.logs import REQUEST_ID, JsonFormatter, TextFormatter, name_request, with_fields

HOSTILE = 'a\n{"level": "FAKE"}\r\x1b[31m\x00\x85\u2028\udc80'
ROOT = Path(__file__).parents[3]
FORMATTERS = [JsonFormatter(), TextFormatter()]


@pytest.fixture(autouse=True)
def _reset_request_id() -> object:
    token = REQUEST_ID.set(None)
    yield
    REQUEST_ID.reset(token)


def make_record(message: str, *arguments: object, error: BaseException | None = None, **fields: Any) -> Any:
    info = None if error is None else (type(error), error, error.__traceback__)
    record = logging.LogRecord("app.thing", logging.WARNING, "thing.py", 1, message, arguments, info)
    record.created = 1_700_000_000.1234
    record.__dict__.update(with_fields(**fields))
    return record


def raised(message: str) -> ValueError:
    try:
        raise ValueError(message)
    except ValueError as error:
        return error


def test_json_has_time_level_logger_message_and_fields() -> None:
    line = JsonFormatter().format(make_record("took %d", 3, status=200, stages=[1, 2]))
    assert json.loads(line) == {
        "time": "2023-11-14T22:13:20.123Z",
        "level": "WARNING",
        "logger": "app.thing",
        "message": "took 3",
        "status": 200,
        "stages": [1, 2],
    }


def test_json_has_the_request_id_of_its_context() -> None:
    REQUEST_ID.set("abc")
    assert json.loads(JsonFormatter().format(make_record("x")))["request_id"] == "abc"


def test_fields_never_replace_standard_keys() -> None:
    REQUEST_ID.set("abc")
    document = json.loads(JsonFormatter().format(make_record("x", level="FAKE", request_id="FAKE", mine=1)))
    assert (document["level"], document["request_id"], document["mine"]) == ("WARNING", "abc", 1)


def test_json_has_the_traceback_in_one_string() -> None:
    line = JsonFormatter().format(make_record("x", error=raised(HOSTILE)))
    assert len(line.splitlines()) == 1
    exception = json.loads(line)["exception"]
    assert exception.startswith("Traceback")
    assert "in raised" in exception


@pytest.mark.parametrize("formatter", FORMATTERS)
def test_record_is_one_line_despite_hostile_content(formatter: logging.Formatter) -> None:
    line = formatter.format(make_record("path %s", HOSTILE, path=HOSTILE))
    assert len(line.splitlines()) == 1
    # An unpaired surrogate could not be encoded.
    line.encode("utf-8")
    assert "\x1b" not in line


def test_text_is_readable() -> None:
    REQUEST_ID.set("abc")
    line = TextFormatter().format(make_record("took %d", 3, status=200))
    assert line == "2023-11-14T22:13:20.123Z WARNING app.thing [abc]: took 3 status=200"


def test_text_indents_tracebacks() -> None:
    first, *others = TextFormatter().format(make_record("x", error=raised(HOSTILE))).splitlines()
    assert first.endswith("app.thing: x")
    assert others[0] == "    Traceback (most recent call last):"
    assert all(line.startswith("    ") for line in others)


@pytest.mark.parametrize("formatter", FORMATTERS)
def test_record_with_a_value_that_json_cannot_encode_is_written(formatter: logging.Formatter) -> None:
    assert "float" in formatter.format(make_record("x", kind=float))


@pytest.mark.parametrize("given", [b"a", b"A-1.b_c:d", b"x" * 128])
def test_name_request_takes_a_valid_id(given: bytes) -> None:
    assert name_request({"headers": [(b"host", b"x"), (b"x-request-id", given)]}) == given.decode()
    assert REQUEST_ID.get() == given.decode()


@pytest.mark.parametrize("given", [b"", b"x" * 129, b"a b", b"a\nb", b"a\n", b"a\xc3\xa9", b'a"b', b"<b>", b"a,b"])
def test_name_request_replaces_an_invalid_id(given: bytes) -> None:
    scope = {"headers": [(b"x-request-id", given)]}
    first, second = name_request(scope), name_request(scope)
    assert len(first) == len(second) == 32
    assert first != second


PROGRAM = """
import logging, threading, warnings
from app.observability.logs import configure_logs
configure_logs("info", "json")
logging.getLogger("PIL").error("what the client sent")
logging.getLogger("x").debug("below the level")
warnings.warn("a warning")
thread = threading.Thread(target=lambda: 1 / 0, name="engine")
thread.start()
thread.join()
raise ValueError("the end")
"""


def test_configure_logs_formats_logs_warnings_and_uncaught_exceptions() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, check=False, capture_output=True, cwd=ROOT, env=environment, timeout=60, text=True)
    assert done.returncode == 1
    warning, crash, end = (json.loads(line) for line in done.stderr.splitlines())
    assert (warning["level"], "a warning" in warning["message"]) == ("WARNING", True)
    assert (crash["level"], crash["message"]) == ("CRITICAL", "uncaught exception in thread engine")
    assert "ZeroDivisionError" in crash["exception"]
    assert end["message"] == "uncaught exception"
    assert "the end" in end["exception"]
