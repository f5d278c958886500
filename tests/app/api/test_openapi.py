from typing import Any

import jsonschema
import pytest
from starlette.testclient import TestClient

from app.errors import PROBLEMS
from app.store.selection import Query
from tests.app.odd_images import encode, make_photo

PNG = encode(make_photo(8, 8), "PNG")


@pytest.fixture
def document(client: TestClient) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/openapi.json").json()
    return found


def validate(document: dict[str, Any], path: str, method: str, response: Any) -> None:
    """Validate a response against the schema of its path and status."""
    described = document["paths"][path][method]["responses"][str(response.status_code)]["content"]
    media_type = response.headers["content-type"].split(";")[0]
    schema = {**described[media_type]["schema"], "components": document["components"]}
    jsonschema.Draft202012Validator(schema).validate(response.json())


@pytest.mark.parametrize(
    ("method", "path", "query", "body"),
    [
        ("post", "/classify", "?r=8", {"content": PNG}),
        ("post", "/classify", "?policy=none", {"content": PNG}),
        ("post", "/classify", "", {"files": [("file", PNG), ("file", b"x")]}),
        ("post", "/classify", "", {"content": b""}),
        ("post", "/classify", "?model=x", {"content": PNG}),
        ("post", "/classify", "", {"content": bytes(21_000_000)}),
        ("post", "/classify", "", {"content": b"text"}),
        ("post", "/classify", "?r=3", {"content": PNG}),
        ("get", "/models", "", {}),
        ("get", "/models", "?x=1", {}),
        ("get", "/health/live", "", {}),
        ("get", "/health/ready", "", {}),
    ],
)
def test_responses_match_openapi(
    client: TestClient, document: dict[str, Any], method: str, path: str, query: str, body: dict[str, Any]
) -> None:
    validate(document, path, method, client.request(method, path + query, **body))


INFER = "/v2/models/{name}/infer"
PIXELS = {"inputs": [{"name": "pixels", "shape": [1, 8, 8, 3], "datatype": "UINT8", "data": [7] * 192}]}


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("get", "/v2", {}),
        ("get", "/v2/health/live", {}),
        ("get", "/v2/health/ready", {}),
        ("get", "/v2/models", {}),
        ("get", "/v2/models/stats", {}),
        ("get", "/v2/models/{name}", {}),
        ("get", "/v2/models/{name}/versions/{version}", {}),
        ("get", "/v2/models/{name}/ready", {}),
        ("get", "/v2/models/{name}/config", {}),
        ("get", "/v2/models/{name}/versions/{version}/config", {}),
        ("get", "/v2/models/{name}/stats", {}),
        ("post", "/v2/repository/index", {}),
        ("post", INFER, {"json": PIXELS}),
        ("post", "/v2/models/{name}/versions/{version}/infer", {"json": PIXELS}),
        ("post", INFER, {"json": {}}),
        ("post", INFER, {"json": {**PIXELS, "parameters": {"r": 3}}}),
        ("post", INFER, {"content": b"", "headers": {"Content-Encoding": "br"}}),
        ("post", INFER, {"content": bytes(21_000_000)}),
    ],
)
def test_responses_under_v2_match_openapi(
    client: TestClient, document: dict[str, Any], method: str, path: str, body: dict[str, Any]
) -> None:
    validate(document, path, method, client.request(method, path.format(name="tiny", version="1"), **body))


def test_infer_documents_the_body_it_accepts(client: TestClient, document: dict[str, Any]) -> None:
    content = document["paths"][INFER]["post"]["requestBody"]["content"]
    assert content["application/octet-stream"]["schema"]["format"] == "binary"
    schema = {**content["application/json"]["schema"], "components": document["components"]}
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    requests: list[dict[str, Any]] = [PIXELS, {"inputs": 1}, {"inputs": [{}]}, {**PIXELS, "id": 1}]
    for request in requests:
        assert validator.is_valid(request) == (client.post(INFER.format(name="tiny"), json=request).status_code == 200)


@pytest.mark.parametrize("path", [INFER, "/v2/models/{name}/versions/{version}/infer"])
def test_infer_documents_every_status(document: dict[str, Any], path: str) -> None:
    documented = set(document["paths"][path]["post"]["responses"])
    assert documented == {"200"} | {str(status) for status, _ in PROBLEMS.values()} - {"405", "499"}


def test_classify_documents_every_status(document: dict[str, Any]) -> None:
    documented = set(document["paths"]["/classify"]["post"]["responses"])
    # 405 is of other methods, and 499 reaches no client.
    assert documented == {"200"} | {str(status) for status, _ in PROBLEMS.values()} - {"405", "499"}


def test_classify_documents_binary_bodies_and_the_form(document: dict[str, Any]) -> None:
    content = document["paths"]["/classify"]["post"]["requestBody"]["content"]
    assert content["image/jpeg"]["schema"] == {"type": "string", "format": "binary"}
    assert content["multipart/form-data"]["schema"]["properties"]["file"]["items"]["format"] == "binary"


def test_classify_documents_its_parameters(document: dict[str, Any]) -> None:
    parameters = {item["name"]: item for item in document["paths"]["/classify"]["post"]["parameters"]}
    assert list(parameters) == list(Query.model_fields)
    assert parameters["r"]["schema"]["type"] == "integer"
    assert all(item["description"] for item in parameters.values())


def test_openapi_has_no_framework_error_schema(document: dict[str, Any]) -> None:
    assert "HTTPValidationError" not in document["components"]["schemas"]
