import json
import shutil
from pathlib import Path

import pytest

from benchmarks.errors import MeasurementError
from benchmarks.load import wrk

RESULT = {"n_requests": 200, "seconds": 2.0, "p50_ms": 1.5, "p99_ms": 3.0}
NO_ERRORS = {"connect": 0, "read": 0, "write": 0, "status": 0, "timeout": 0}


def output(**changes: object) -> str:
    return "Running 2s test\n" + wrk.LINE + json.dumps({**RESULT, "errors": NO_ERRORS, **changes}) + "\n"


def test_the_result_is_found_in_the_output() -> None:
    found = wrk.read_result(output(), "http://x", 0.1)
    assert found == wrk.Saturation(200, 2.0, 1.5, 3.0, 0.1)
    assert found.per_second == 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (output(errors={**NO_ERRORS, "status": 3}), "'status': 3"),
        (output(n_requests=0), "none was answered"),
        ("unable to connect", "unable to connect"),
    ],
)
def test_a_run_with_failed_requests_is_refused(text: str, message: str) -> None:
    with pytest.raises(MeasurementError, match=message):
        wrk.read_result(text, "http://x", 0.1)


def test_a_missing_client_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MeasurementError, match="apt-get install wrk"):
        wrk.find_wrk()


def test_the_script_names_every_image(tmp_path: Path) -> None:
    images = [tmp_path / name for name in ("a.jpg", 'quote".jpg')]
    script = wrk.write_script(tmp_path / "post.lua", images).read_text()
    assert json.dumps(str(images[0])) in script
    assert 'quote\\".jpg' in script
    assert "%%" not in script
