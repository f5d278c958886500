import json

import pytest

from app.api.problems import problem_document, protocol_error_response
from app.errors import (
    BudgetNotMet,
    InferenceFailed,
    NotAnImage,
    QueueFull,
    ServiceError,
)


@pytest.mark.parametrize(
    "error", [InferenceFailed(), NotAnImage("No image.", accepted=["PNG"]), QueueFull("Full.", retry_after_seconds=3)]
)
def test_about_leaves_the_original_error_unchanged(error: ServiceError) -> None:
    before = problem_document(error)
    named = error.about("Image 2").about("Request 1")
    assert named.detail == f"Request 1: Image 2: {before['detail']}"
    assert problem_document(named) == {**before, "detail": named.detail}
    assert named.headers == error.headers
    assert problem_document(error) == before


def test_protocol_error_appends_what_is_accepted() -> None:
    response = protocol_error_response(NotAnImage("No \ud800 image.", accepted=["JPEG", "PNG"]))
    assert json.loads(bytes(response.body)) == {"error": "No \ud800 image. Accepted: JPEG, PNG."}
    response = protocol_error_response(QueueFull("Full.", retry_after_seconds=3))
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")
    assert json.loads(bytes(response.body)) == {"error": "Full."}
    far = BudgetNotMet("Too little.", accepted="a number", minimum=0.5, maximum=None)
    assert json.loads(bytes(protocol_error_response(far).body)) == {
        "error": "Too little. Accepted: a number. Minimum: 0.5."
    }
