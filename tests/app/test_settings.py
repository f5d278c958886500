from pathlib import Path

import pytest

from app.errors import SettingsError
from app.settings import Settings, read_settings


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"DTEM_{name.upper()}", raising=False)


def test_read_settings_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTEM_PORT", "9000")
    monkeypatch.setenv("DTEM_MODEL_STORE", "/models")
    settings = read_settings()
    assert (settings.port, settings.model_store, settings.host) == (9000, Path("/models"), "127.0.0.1")


def test_read_settings_treats_an_empty_value_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTEM_PORT", "")
    assert read_settings().port == 8000


def test_read_settings_reads_its_argument_and_not_the_process_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTEM_PORT", "9000")
    monkeypatch.setenv("DTEM_HOST", "0.0.0.0")
    monkeypatch.setenv("DTEM_UNKNOWN", "1")
    settings = read_settings({"DTEM_PORT": "7000", "dtem_max_files": "3", "PATH": "/bin"})
    assert (settings.port, settings.host, settings.max_files) == (7000, "127.0.0.1", 3)
    assert read_settings({}) == Settings()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"DTEM_PORT": "70000"}, ["DTEM_PORT=70000"]),
        ({"DTEM_PORT": "http"}, ["DTEM_PORT=http"]),
        ({"DTEM_ENGINE": "tflite"}, ["DTEM_ENGINE=tflite", "onnxruntime", "torchscript"]),
        ({"DTEM_PROT": "9000"}, ["DTEM_PROT", "no such setting", "DTEM_PORT"]),
        ({"DTEM_MAX_FILES": "100"}, ["DTEM_MAX_FILES (100)", "DTEM_MAX_QUEUE_IMAGES (64)"]),
        ({"DTEM_SHARE_WEIGHTS": "1", "DTEM_ENGINE": "torchscript"}, ["DTEM_SHARE_WEIGHTS"]),
        ({"DTEM_MAX_PIXELS": "0"}, ["DTEM_MAX_PIXELS=0"]),
        ({"DTEM_LOG_FORMAT": "xml"}, ["DTEM_LOG_FORMAT=xml", "json", "text"]),
        ({"DTEM_TRACE_ENDPOINT": "collector:4318"}, ["DTEM_TRACE_ENDPOINT=collector:4318", "http://"]),
        ({"DTEM_TRACE_ENDPOINT": "http://"}, ["DTEM_TRACE_ENDPOINT=http://", "not an http"]),
        ({"DTEM_TRACE_ENDPOINT": "http://x:port"}, ["DTEM_TRACE_ENDPOINT=http://x:port"]),
        ({"DTEM_TRACE_ENDPOINT": "http://[::1"}, ["DTEM_TRACE_ENDPOINT=http://[::1"]),
        ({"DTEM_TRACE_SAMPLE_RATIO": "0.5"}, ["DTEM_TRACE_SAMPLE_RATIO needs DTEM_TRACE_ENDPOINT"]),
        ({"DTEM_TRACE_ENDPOINT": "http://x:4318/"}, ["DTEM_TRACE_ENDPOINT=http://x:4318/", "/v1/traces"]),
        ({"DTEM_TRACE_ENDPOINT": "http://x/v1", "DTEM_TRACE_SAMPLE_RATIO": "2"}, ["DTEM_TRACE_SAMPLE_RATIO=2"]),
        ({"DTEM_API_KEYS": "x", "DTEM_API_KEY_FILE": "y"}, ["DTEM_API_KEYS", "DTEM_API_KEY_FILE", "exclusive"]),
        ({"DTEM_TLS_CERTIFICATE": "c.pem"}, ["DTEM_TLS_CERTIFICATE", "DTEM_TLS_KEY"]),
        ({"DTEM_TLS_KEY": "k.pem"}, ["DTEM_TLS_CERTIFICATE", "DTEM_TLS_KEY"]),
        ({"DTEM_DRAIN_GRACE_SECONDS": "19.5"}, ["DTEM_DRAIN_GRACE_SECONDS (19.5)", "DTEM_DRAIN_SECONDS (20)"]),
        ({"DTEM_RELOAD_SECONDS": "-1"}, ["DTEM_RELOAD_SECONDS=-1"]),
    ],
)
def test_read_settings_refuses_with_one_line(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], words: list[str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        read_settings()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "environment",
    [
        {"DTEM_API_KEYS": "hunter2", "DTEM_API_KEY_FILE": "y"},
        {"DTEM_API_KEYS": "hunter2", "DTEM_PORT": "x"},
        {"DTEM_TRACE_ENDPOINT": "http://me:hunter2@collector:4318/v1/traces"},
    ],
)
def test_read_settings_never_reveals_a_secret(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        read_settings()
    assert "hunter2" not in str(caught.value)


def test_settings_hide_their_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTEM_API_KEYS", "hunter2")
    assert "hunter2" not in repr(read_settings())


def test_settings_describe_every_field() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []
