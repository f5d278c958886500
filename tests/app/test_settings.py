from pathlib import Path

import pytest

from app.errors import SettingsError
from app.settings import Settings, read_settings


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"DTEM_{name.upper()}", raising=False)


def test_read_settings_takes_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTEM_PORT", "9000")
    monkeypatch.setenv("DTEM_MODEL_STORE", "/models")
    settings = read_settings()
    assert (settings.port, settings.model_store, settings.host) == (9000, Path("/models"), "127.0.0.1")


def test_read_settings_takes_an_empty_value_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTEM_PORT", "")
    assert read_settings().port == 8000


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"DTEM_PORT": "70000"}, ["DTEM_PORT=70000"]),
        ({"DTEM_PORT": "http"}, ["DTEM_PORT=http"]),
        ({"DTEM_FORMAT": "tflite"}, ["DTEM_FORMAT=tflite", "onnx"]),
        ({"DTEM_PROT": "9000"}, ["DTEM_PROT", "no such setting", "DTEM_PORT"]),
        ({"DTEM_MAX_FILES": "100"}, ["DTEM_MAX_FILES (100)", "DTEM_MAX_QUEUE_IMAGES (64)"]),
        ({"DTEM_SHARE_WEIGHTS": "1", "DTEM_FORMAT": "torchscript"}, ["DTEM_SHARE_WEIGHTS"]),
        ({"DTEM_MAX_PIXELS": "0"}, ["DTEM_MAX_PIXELS=0"]),
        ({"DTEM_DRAIN_GRACE_SECONDS": "19.5"}, ["DTEM_DRAIN_GRACE_SECONDS (19.5)", "DTEM_DRAIN_SECONDS (20)"]),
        ({"DTEM_RELOAD_SECONDS": "-1"}, ["DTEM_RELOAD_SECONDS=-1"]),
    ],
)
def test_read_settings_refuses_with_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], words: list[str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        read_settings()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_settings_describe_every_field() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []
