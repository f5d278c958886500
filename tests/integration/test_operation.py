import json
import socket
import ssl
import subprocess
from pathlib import Path

import pytest

from tests.app.certificates import encrypt_key, make_certificate
from tests.app.odd_images import encode, make_photo
from tests.integration.server import Address, Server, on_both
from tests.integration.test_http import send_raw, status_of
from tests.integration.test_start_and_stop import assert_one_error_line, run_failing

PNG = encode(make_photo(8, 8), "PNG")
SECONDS = 60
KEY = "s3cret-key-of-the-client"
FIXED = ("X-Content-Type-Options", "X-Frame-Options", "Referrer-Policy", "Cross-Origin-Resource-Policy")


def settled_log(server: Server) -> str:
    """Read the log, with the lines of all previous requests: each is written just after its response."""
    assert server.ask("GET", "/health/live")[0] == 200
    return server.log


def log_lines(server: Server) -> list[dict[str, object]]:
    """Parse the log, in which every line is a JSON object."""
    return [json.loads(line) for line in settled_log(server).splitlines()]


def test_every_log_line_is_json_for_any_client_input(store: Path, tmp_path: Path) -> None:
    fake = b'{"level": "FAKE", "message": "forged"}'
    with Server(store, tmp_path / "log", log_level="debug") as server:
        for head in (
            b"POST /classify HTTP/1.1\r\nHost: x\r\nX-Request-ID: a\r\n b\r\nContent-Length: 0",
            b"POST /classify HTTP/1.1\r\nHost: x\r\nX-Request-ID: " + fake + b"\r\nContent-Length: 0",
            b"POST /classify HTTP/1.1\r\nHost: x\r\nX-Request-ID: \xff\xfe\r\nContent-Length: 0",
            b"GET /a%0A" + fake.replace(b" ", b"") + b"%0d%1b[31m%E2%80%A8 HTTP/1.1\r\nHost: x",
            b"GET /\xed\xa0\x80 HTTP/1.1\r\nHost: x",
            b"BREW /models HTTP/1.1\r\nHost: x",
            b"nonsense",
        ):
            send_raw(server, head + b"\r\nConnection: close\r\n\r\n", is_half_closed=True)
        name = 'filename="a\\n' + fake.decode().replace('"', "'") + '\u2028.png"'
        form = f'--XX\r\nContent-Disposition: form-data; name="file"; {name}\r\n\r\n'.encode() + PNG
        headers = {"Content-Type": "multipart/form-data; boundary=XX"}
        assert server.ask("POST", "/classify", form + b"\r\n--XX--\r\n", headers)[0] == 200
        assert server.ask("POST", "/classify", PNG[:60])[0] == 400
        lines = log_lines(server)
    assert len(lines) > 8
    for line in lines:
        assert {"time", "level", "logger", "message"} <= set(line)
        assert line["level"] in ("DEBUG", "INFO", "WARNING")
        # The line contains no image data.
        assert len(str(line)) < 2000
    assert all(set(str(line.get("request_id", "a"))) <= set("0123456789abcdef") for line in lines)


def test_text_log_format_is_one_line_per_request(store: Path, tmp_path: Path) -> None:
    with Server(store, tmp_path / "log", log_format="text") as server:
        server.ask("POST", "/classify?r=8", PNG, {"X-Request-ID": "abc-1"})
        assert "INFO app.api.boundary [abc-1]: request method=POST path=/classify status=200" in settled_log(server)


def test_requests_on_one_connection_have_separate_ids(store: Path, tmp_path: Path) -> None:
    with Server(store, tmp_path / "log") as server:
        for request_id in ("one", "two"):
            reply = server.request("POST", "/classify", b"text", {"X-Request-ID": request_id})
            assert reply.headers["X-Request-ID"] == json.loads(reply.body)["request_id"] == request_id
        ask = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n%s\r\ntext"
        answers = send_raw(server, ask % b"X-Request-ID: three\r\n" + ask % b"Connection: close\r\n")
        assert answers.count(b"x-request-id: three") == 1
        assert answers.count(b"x-request-id: ") == 2
        ids = [line["request_id"] for line in log_lines(server) if line["message"] == "request"]
    assert ids[:3] == ["one", "two", "three"]
    assert len(set(ids)) == 4


def test_keys_are_required_except_for_health_and_docs(store: Path, tmp_path: Path) -> None:
    with Server(store, tmp_path / "log", log_level="debug", api_keys=f"other,{KEY}") as server:
        assert 'curl -H "X-API-Key: $KEY" --data-binary' in server.announcement
        for method, path in (("POST", "/classify"), ("GET", "/models"), ("GET", "/metrics"), ("GET", "/v2")):
            refused = server.request(method, path, PNG if method == "POST" else None)
            assert refused.status == 401
            assert refused.headers["WWW-Authenticate"].startswith("Bearer")
            assert refused.headers["X-Request-ID"]
        for path in ("/health/live", "/health/ready", "/docs", "/openapi.json"):
            assert server.ask("GET", path)[0] == 200
        for headers in ({"Authorization": f"Bearer {KEY}"}, {"X-API-Key": KEY}):
            assert server.ask("POST", "/classify", PNG, headers)[0] == 200
            assert server.ask("GET", "/models", None, headers)[0] == 200
        wrong = server.request("POST", "/classify", bytes(30_000_000), {"X-API-Key": KEY + "x"})
        assert (wrong.status, json.loads(wrong.body)["code"]) == (401, "unauthorized")
        assert server.ask("OPTIONS", "/classify", None, {"Origin": "https://x", "X-API-Key": KEY})[0] == 405
        assert KEY not in settled_log(server)
        assert KEY.encode() not in server.ask("GET", "/metrics", None, {"X-API-Key": KEY})[1]


def test_request_without_a_key_is_refused_before_its_body(store: Path, tmp_path: Path) -> None:
    with Server(store, tmp_path / "log", api_keys=KEY) as server:
        head = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\nExpect: 100-continue\r\n\r\n"
        answer = send_raw(server, head, is_half_closed=True)
    assert status_of(answer) == 401
    assert b"100 Continue" not in answer


@pytest.mark.parametrize("text", ["", "a b", "a,,b"])
def test_bad_key_file_stops_the_start(store: Path, tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    status, errors = run_failing(model_store=store, port=0, api_key_file=file)
    assert status == 1
    assert_one_error_line(errors, f"DTEM_API_KEY_FILE={file}")


@pytest.mark.parametrize(
    ("name", "value"), [("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "9000"), ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "x")]
)
def test_bad_opentelemetry_variable_stops_the_start(
    store: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    status, errors = run_failing(model_store=store, port=0, trace_endpoint="http://127.0.0.1:9/v1/traces")
    assert status == 1
    assert_one_error_line(errors, "DTEM_TRACE_ENDPOINT=http://127.0.0.1:9/v1/traces", "must be")


def test_tls_serves_only_https(store: Path, tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    with Server(store, tmp_path / "log", tls_certificate=certificate, tls_key=key) as server:
        assert f"ready: https://127.0.0.1:{server.port}" in server.announcement
        reply = server.request("POST", "/classify?r=8", PNG)
        assert reply.status == 200
        assert reply.headers["Strict-Transport-Security"] == "max-age=31536000"
        assert b"200" not in send_raw(server, b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n", is_half_closed=True)
        old = ssl.create_default_context(cafile=str(certificate))
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS)
        with old.wrap_socket(connection, server_hostname="127.0.0.1") as secure:
            assert secure.version() == "TLSv1.2"
        assert server.ask("GET", "/health/ready")[0] == 200
        assert server.stop() == 0
        assert "Traceback" not in server.log


def test_curl_over_tls(store: Path, tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    image = tmp_path / "red.png"
    image.write_bytes(PNG)
    with Server(store, tmp_path / "log", tls_certificate=certificate, tls_key=key, api_keys=KEY) as server:
        command = ["curl", "-sS", "--cacert", str(certificate), "-H", f"Authorization: Bearer {KEY}"]
        url = f"https://127.0.0.1:{server.port}/classify?r=8"
        done = subprocess.run(
            [*command, "--data-binary", f"@{image}", url], check=True, capture_output=True, timeout=SECONDS
        )
        assert json.loads(done.stdout)["r"] == 8


def test_bad_tls_files_stop_the_start(store: Path, tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    other = make_certificate(tmp_path, "other")[1]
    for wrong, words in (
        (tmp_path / "nowhere", "No such file"),
        (other, "the key does not match the certificate"),
        (encrypt_key(key), "passphrase"),
    ):
        status, errors = run_failing(model_store=store, port=0, tls_certificate=certificate, tls_key=wrong)
        assert status == 1
        assert_one_error_line(errors, f"DTEM_TLS_KEY={wrong}", words)
    status, errors = run_failing(model_store=store, port=0, tls_certificate=certificate)
    assert status == 1
    assert_one_error_line(errors, "DTEM_TLS_CERTIFICATE", "DTEM_TLS_KEY")


@on_both
def test_every_response_has_the_headers_of_the_server(server: Address) -> None:
    for method, path in (
        ("GET", "/docs"),
        ("HEAD", "/docs"),
        ("GET", "/models"),
        ("POST", "/models"),
        ("GET", "/nothing"),
        ("POST", "/classify"),
        ("OPTIONS", "/classify"),
        ("GET", "/health/live"),
    ):
        headers = server.request(method, path, b"" if method == "POST" else None, {"Origin": "https://x"}).headers
        for name in (*FIXED, "Cache-Control", "Content-Security-Policy", "X-Request-ID"):
            assert len(headers.get_all(name) or []) == 1, (method, path, name)
        assert "Strict-Transport-Security" not in headers
        # Ray's proxies send a Server header.
        assert "Server" not in headers or not isinstance(server, Server)
        assert not [name for name in headers if name.lower().startswith("access-control-")]
