from pathlib import Path
from typing import Any

import pytest

from app.api.keys import Keys, read_keys
from app.errors import SettingsError, Unauthorized
from app.settings import Settings
from tests.app.conftest import ClientFactory
from tests.app.odd_images import encode, make_photo

PNG = encode(make_photo(8, 8), "PNG")
PATHS = ["/classify", "/models", "/models/tiny", "/metrics", "/v2", "/v2/models/tiny/infer", "/", "/healthy"]
OPEN_PATHS = ["/health/live", "/health/ready", "/v2/health/ready", "/docs", "/openapi.json"]


def scope(path: str = "/classify", *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"type": "http", "path": path, "headers": list(headers)}


@pytest.mark.parametrize("path", PATHS)
def test_keys_refuse_a_request_without_a_key(path: str) -> None:
    with pytest.raises(Unauthorized) as caught:
        Keys(["k1"]).require(scope(path))
    assert caught.value.headers == {"WWW-Authenticate": 'Bearer realm="dtem-serve"'}


@pytest.mark.parametrize("path", OPEN_PATHS)
def test_keys_leave_health_and_documentation_open(path: str) -> None:
    Keys(["k1"]).require(scope(path))


@pytest.mark.parametrize("path", PATHS)
def test_without_keys_no_key_is_required(path: str) -> None:
    Keys([]).require(scope(path))


@pytest.mark.parametrize(
    "headers",
    [
        [(b"authorization", b"Bearer k1")],
        [(b"authorization", b"bearer k2")],
        [(b"authorization", b"BEARER  k2 ")],
        [(b"x-api-key", b"k1")],
        [(b"x-api-key", b"wrong"), (b"authorization", b"Bearer k2")],
        [(b"authorization", b"Basic eA=="), (b"x-api-key", b"k2")],
    ],
)
def test_keys_accept_a_known_key(headers: list[tuple[bytes, bytes]]) -> None:
    Keys(["k1", "k2"]).require(scope("/classify", *headers))


@pytest.mark.parametrize(
    "headers",
    [
        [(b"authorization", b"Bearer k")],
        [(b"authorization", b"Bearer k1k2")],
        [(b"authorization", b"Bearer k1,k2")],
        [(b"authorization", b"Bearer ")],
        [(b"x-api-key", b"")],
        [(b"x-api-key", b"\xff\xfe")],
        [(b"x-api-key", b"K1")],
    ],
)
def test_keys_refuse_an_unknown_key(headers: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(Unauthorized) as caught:
        Keys(["k1", "k2"]).require(scope("/classify", *headers))
    assert 'error="invalid_token"' in caught.value.headers["WWW-Authenticate"]


@pytest.mark.parametrize("authorization", [b"", b"Basic k1", b"k1", b"Bearer"])
def test_other_authorization_schemes_are_refused(authorization: bytes) -> None:
    with pytest.raises(Unauthorized):
        Keys(["k1"]).require(scope("/classify", (b"authorization", authorization)))


def test_keys_are_not_in_their_repr() -> None:
    assert "hunter2" not in repr(Keys(["hunter2"])) + repr(vars(Keys(["hunter2"])))


def test_read_keys_reads_a_list() -> None:
    keys = read_keys(Settings.model_validate({"api_keys": "k1, k2"}))
    for key in (b"k1", b"k2"):
        keys.require(scope("/classify", (b"x-api-key", key)))


def test_read_keys_reads_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("k1\n\n  k2\r\n")
    keys = read_keys(Settings(api_key_file=file))
    for key in (b"k1", b"k2"):
        keys.require(scope("/classify", (b"x-api-key", key)))


def test_read_keys_without_a_setting_requires_none() -> None:
    assert not read_keys(Settings()).are_required


@pytest.mark.parametrize(
    ("text", "words"), [(",", "key 1 of 2 is empty"), ("hunter2,", "key 2 of 2 is empty"), ("hunter2 x", "key 1 of 1")]
)
def test_read_keys_refuses_a_list_without_revealing_it(text: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words) as caught:
        read_keys(Settings.model_validate({"api_keys": text}))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no key"),
        (b"\n \n", "no key"),
        (b"hunter2\xff", "not ASCII"),
        (b"hunter2,x", "key 1 of 1"),
        (None, "No such"),
    ],
)
def test_read_keys_refuses_a_file_by_name(tmp_path: Path, data: bytes | None, words: str) -> None:
    file = tmp_path / "keys"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(SettingsError, match=words) as caught:
        read_keys(Settings(api_key_file=file))
    assert str(file) in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_application_refuses_and_counts_requests_without_a_key(make_client: ClientFactory) -> None:
    client = make_client(api_keys="hunter2")
    for path in ("/classify", "/models"):
        response = client.request("POST" if path == "/classify" else "GET", path, content=PNG)
        assert response.status_code == 401
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["code"] == "unauthorized"
    key = {"Authorization": "Bearer hunter2"}
    assert client.post("/classify", content=PNG, headers=key).status_code == 200
    metrics = client.get("/metrics", headers=key).text
    assert 'dtem_refusals_total{reason="unauthorized"} 2.0' in metrics
    assert 'dtem_requests_total{code="401"' in metrics


def test_body_of_a_refused_request_is_not_read(make_client: ClientFactory) -> None:
    client = make_client(api_keys="hunter2", max_body_bytes=10)
    # 401 instead of 413 shows that the body was not read.
    assert client.post("/classify", content=bytes(1000)).status_code == 401


def test_openapi_describes_how_to_send_a_key(make_client: ClientFactory) -> None:
    client = make_client(api_keys="hunter2")
    document = client.get("/openapi.json")
    assert "hunter2" not in document.text + client.get("/docs").text
    assert document.json()["security"] == [{"bearer": []}, {"key": []}]
    assert document.json()["paths"]["/health/live"]["get"]["security"] == []
    assert "security" not in document.json()["paths"]["/classify"]["post"]


def test_openapi_has_no_security_if_no_keys_are_required(make_client: ClientFactory) -> None:
    document = make_client().get("/openapi.json").json()
    assert "security" not in document
    assert "securitySchemes" not in document["components"]
